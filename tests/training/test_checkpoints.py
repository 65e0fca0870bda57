"""Where a run goes on, and that it does so exactly."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import losses, run


SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["workers", "stream", "accumulation", "longer videos"])
def test_losses_are_those_of_an_unbroken_run(training_folder, tmp_path, how):
    """With dropout, across the end of an epoch of 4 batches, and in the middle of one."""
    settings = {
        "workers": {"dataloader_num_workers": 2},
        "stream": {"data": "data.jsonl", "streaming": True},
        "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        "longer videos": {"length_scale": 4, "dataloader_num_workers": 2},
    }[how]
    settings |= {"learning_rate": 1e-3, "max_steps": 7, **SAVING}
    unbroken = run(training_folder, tmp_path, **settings)
    for step in (2, 4, 6):
        checkpoint = tmp_path / f"checkpoint-{step}"
        resumed = run(training_folder, tmp_path / "again", resume_from_checkpoint=checkpoint, **settings)
        assert losses(resumed) == losses(unbroken)
        state = load_file(tmp_path / "again" / "model.safetensors")
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            assert torch.equal(tensor, state[name]), name


def test_the_newest_checkpoint(training_folder, tmp_path, capsys):
    broken_first = json.loads((training_folder / "data.json").read_text())[::-1]
    (tmp_path / "data.json").write_text(json.dumps(broken_first))
    settings = {"data": tmp_path / "data.json", "train_sampling_strategy": "sequential", **SAVING}
    run(training_folder, tmp_path, max_steps=2, resume_from_checkpoint=True, **settings)
    with pytest.raises(ValueError, match="checkpoint-2' of an earlier run: go on .* choose another output_dir"):
        run(training_folder, tmp_path, **settings)
    trainer = run(training_folder, tmp_path, resume_from_checkpoint=True, **settings)
    assert trainer.state.global_step == 4 and len(losses(trainer)) == 4
    assert "1 samples were skipped" in capsys.readouterr().out.splitlines()[-1]  # by the earlier part of the run


@pytest.fixture(scope="module")
def finished(training_folder, tmp_path_factory):
    """A run of 4 steps with two checkpoints, and its losses."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, losses(run(training_folder, folder, **SAVING))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_was_not_saved_to_its_end(training_folder, finished, tmp_path, file, caplog):
    """What is left of the second one when the process is killed as it writes a file."""
    folder, expected = finished
    shutil.copytree(folder, tmp_path / "run")  # with the times of the files
    checkpoint = tmp_path / "run" / "checkpoint-4"
    written = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert written[checkpoint / "trainer_state.json"] == max(written.values())
    for path, when in written.items():
        if when > written[checkpoint / file]:
            path.unlink()
    (checkpoint / file).write_bytes((checkpoint / file).read_bytes()[:100])
    resumed = run(training_folder, tmp_path / "run", resume_from_checkpoint=True, **SAVING)
    assert resumed.state.global_step == 4 and losses(resumed) == expected
    assert "checkpoint-4' was not saved to its end" in caplog.text


def test_the_first_checkpoint_was_not_saved_to_its_end(training_folder, finished, tmp_path):
    folder, expected = finished
    (tmp_path / "checkpoint-2").mkdir()
    shutil.copy(folder / "checkpoint-2" / "model.safetensors", tmp_path / "checkpoint-2")
    assert losses(run(training_folder, tmp_path, resume_from_checkpoint=True, **SAVING)) == expected


@pytest.mark.parametrize("files", [["rng_state_0.pth"], ["rng_state.pth", "rng_state_1.pth"], []])
@pytest.mark.parametrize("asked", [True, "checkpoint-2"])
def test_a_checkpoint_of_another_number_of_processes(training_folder, finished, tmp_path, asked, files):
    """Its random numbers are not those of this run."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(finished[0] / "checkpoint-2", checkpoint)
    (checkpoint / "rng_state.pth").unlink()
    for file in files:
        shutil.copy(finished[0] / "checkpoint-2" / "rng_state.pth", checkpoint / file)
    message = f"checkpoint-2' with 1 processes: it has the random states {', '.join(files)}"
    with pytest.raises(ValueError, match=message):
        run(training_folder, tmp_path, resume_from_checkpoint=asked if asked is True else checkpoint, **SAVING)


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("model.safetensors", "weights"),
        ("optimizer.pt", "state of the optimizer"),
        ("scheduler.pt", "state of the schedule"),
        ("rng_state.pth", "random states of none"),
    ],
)
def test_a_part_that_is_gone_or_cut(training_folder, finished, tmp_path, caplog, file, problem):
    """The checkpoint before is taken, and without one training does not begin with other numbers."""
    folder, expected = finished
    shutil.copytree(folder, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).unlink()
    assert losses(run(training_folder, tmp_path / "run", resume_from_checkpoint=True, **SAVING)) == expected
    assert "checkpoint-4' is left out: it has " in caplog.text and problem in caplog.text
    with pytest.raises(ValueError, match=f"it has .*{problem}"):
        (checkpoint / file).unlink()  # saved anew
        run(training_folder, tmp_path / "run", resume_from_checkpoint=checkpoint, **SAVING)
    (checkpoint / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"parts that are not whole: {file}"):
        run(training_folder, tmp_path / "run", resume_from_checkpoint=checkpoint, **SAVING)


def test_a_folder_that_is_no_checkpoint(training_folder, tmp_path):
    with pytest.raises(ValueError, match="it has no whole trainer_state.json"):
        run(training_folder, tmp_path, resume_from_checkpoint=tmp_path / "nowhere")
