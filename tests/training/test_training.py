"""Whole runs: data in every form, and what they leave behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversations import arguments
from original_checkpoint import image_model
from published_data import write_llava_pretrain, write_llava_video, write_vista
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from training_runs import change_settings, losses, parts_that_moved, run
from transformers import AutoModelForImageTextToText, AutoProcessor, SiglipImageProcessor

from mambamia_hf.training import features, load_mixture, parse_record
from mambamia_hf.training.collator import reported_samples
from mambamia_hf.training.stages import STAGES


EXAMPLES = Path(__file__).parents[2] / "examples" / "train"


def test_what_is_written_loads_and_says_how_many_were_skipped(training_folder, tmp_path, capsys):
    run(training_folder, tmp_path, "align")
    assert "1 samples were skipped and 0 were cut" in capsys.readouterr().out
    samples = reported_samples(tmp_path)
    assert [name for name, _ in samples["skipped"]] == ["broken"] and samples["cut"] == set()
    AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).video_processor.num_frames == 384


def test_frame_dropout_is_that_of_the_model_unless_given(training_folder, tmp_path):
    shutil.copytree(training_folder / "model", tmp_path / "model")
    change_settings(tmp_path / "model", frame_dropout=0.9)
    kept = run(training_folder, tmp_path / "kept", model=tmp_path / "model")
    assert kept.model.config.frame_dropout == 0.9
    none = run(training_folder, tmp_path / "none", model=tmp_path / "model", frame_dropout=0)
    assert none.model.config.frame_dropout == 0 and losses(none) != losses(kept)


def test_workers(training_folder, tmp_path):
    expected = losses(run(training_folder, tmp_path / "0", "align"))
    assert losses(run(training_folder, tmp_path / "2", "align", dataloader_num_workers=2)) == expected


def test_stream(training_folder, tmp_path):
    whole = run(training_folder, tmp_path / "whole", "align", train_sampling_strategy="sequential")
    stream = run(training_folder, tmp_path / "stream", "align", data="data.jsonl", streaming=True)
    assert losses(stream) == losses(whole)


def test_features_in_place_of_pixels(training_folder, tmp_path):
    command = {"model": training_folder / "model", "data": training_folder / "data.json", "num_workers": 0}
    command |= {"media_folder": training_folder, "num_frames": 3, "output": tmp_path / "features"}
    features.main(arguments(**command))
    expected = losses(run(training_folder, tmp_path / "pixels", "align"))
    settings = {"stage": "align", "features": tmp_path / "features"}
    assert losses(run(training_folder, tmp_path / "run", media_folder="nowhere", **settings)) == pytest.approx(
        expected, rel=1e-3
    )
    with pytest.raises(ValueError, match="made with video num_frames 3 and it is 2 now"):
        run(training_folder, tmp_path / "wrong", num_frames=2, **settings)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_gradients_give_the_steps_of_whole_batches(training_folder, tmp_path, checkpointing):
    """Their samples have very different numbers of tokens to learn."""
    model = AutoModelForImageTextToText.from_pretrained(training_folder / "model")
    model.config.compressor_config.gpa_dropout = 0.0
    model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(training_folder / "model").save_pretrained(tmp_path / "model")
    settings = {"model": tmp_path / "model", "learning_rate": 1e-3, "activation_checkpointing": checkpointing}
    whole = run(training_folder, tmp_path / "whole", per_device_train_batch_size=4, **settings)
    parts = run(
        training_folder, tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-4)


def test_a_video_that_is_longer_than_max_length(training_folder, tmp_path):
    with pytest.raises(ValueError, match="images and videos of sample 'video[0-9]' reach up to its token"):
        run(training_folder, tmp_path, max_length=20, max_steps=8)


def test_out_of_memory_comes_with_advice(training_folder, tmp_path):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = torch.nn.modules.module.register_module_forward_pre_hook(exhausted)
    try:
        with pytest.raises(RuntimeError, match="per_device_train_batch_size=3, .* and num_frames=3: lower them"):
            run(training_folder, tmp_path)
    finally:
        hook.remove()


def run_recipe(name: str, *folders: Path, **settings):
    command = ["bash", EXAMPLES / name, *folders]
    command += arguments(max_steps=2, bf16=False, use_cpu=True, num_frames=3, dataloader_num_workers=0, **settings)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(list(map(str, command)), check=True, env=environment)


def written(output: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in output.glob("*/model.safetensors")}


@pytest.mark.slow
def test_the_recipe(training_folder, tmp_path):
    """Stage follows stage; what has ended is not done again."""
    data, output = tmp_path / "the data", tmp_path / "the output"
    data.mkdir()
    (data / "media").symlink_to(training_folder)
    for stage in STAGES:
        shutil.copy(training_folder / "data.json", data / f"{stage}.json")
    shutil.copy(training_folder / "data.json", data / "video_eval.json")
    run_recipe("run.sh", training_folder / "model", data, output)
    models = written(output)
    run_recipe("run.sh", training_folder / "model", data, output)
    assert written(output) == models and len(models) == 3
    before = load_file(output / "align" / "model.safetensors")
    after = load_file(output / "video" / "model.safetensors")
    assert parts_that_moved(before, after) == set(STAGES["video"].learns)
    evaluated = [stage for stage in STAGES if "eval_accuracy" in (output / stage / "trainer_state.json").read_text()]
    assert evaluated == ["video"]


@pytest.mark.slow
def test_the_recipe_of_the_paper(tmp_path):
    """From an image model with an MLP, on the data sets as they are published, all of which are used."""
    image_model(text={"vocab_size": 400}).write(tmp_path / "llava")
    tiny_tokenizer().save_pretrained(tmp_path / "llava")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "llava")
    data, output = tmp_path / "the data", tmp_path / "the output"
    write_llava_pretrain(data / "LLaVA-Pretrain")
    write_llava_video(data / "LLaVA-Video-178K")
    write_vista(data / "VISTA-400K")
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "report_to": "none"}
    run_recipe("paper.sh", tmp_path / "llava", data, output, **settings)
    for stage in ("align", "video"):
        state = json.loads((output / stage / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        assert not (output / stage / "samples_0.jsonl").exists()
    models = written(output)
    run_recipe("paper.sh", tmp_path / "llava", data, output, **settings)
    assert written(output) == models and len(models) == 3
    start, align, video = (load_file(output / name / "model.safetensors") for name in ("start", "align", "video"))
    assert parts_that_moved(start, align) == set(STAGES["align"].learns)
    assert parts_that_moved(align, video) == set(STAGES["video"].learns)
    mixture = load_mixture(data / "video.yaml")
    assert len(mixture) == 4 * 2 * 3 * 2 + 12
    assert len(list(data.rglob("*.mp4"))) == len({path for one in mixture for _, path in parse_record(one)[1]})
