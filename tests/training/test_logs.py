"""Frames per second, memory, tokens, and the mean loss."""

import json

import pytest
from conversations import record
from training_runs import losses, run


def test_throughput_and_memory(training_folder, tmp_path):
    """One epoch in one batch, whose frames and tokens are known."""
    trainer = run(training_folder, tmp_path, max_steps=1, per_device_train_batch_size=12)
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    frames, tokens = 2 + 5 * 3 + 3, int(trainer.data_collator(trainer.train_dataset)["attention_mask"].sum())
    assert entry["num_input_tokens_seen"] == tokens
    assert 0 < entry["frames_per_second"] < frames / 1e-3
    assert 0.1 < entry["peak_memory_gb"] < 100


def test_files_get_them(training_folder, tmp_path):
    run(training_folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    logged = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert {"frames_per_second", "train_tokens_per_second", "peak_memory_gb"} <= logged[0].keys()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_without_a_usable_sample_do_not_lower_the_mean_loss(training_folder, tmp_path, accumulation):
    """A rate of 0 keeps the model as it is, so that the loss of a text is the same at every step."""
    broken = record("broken", "<video>\nWhat?", "Nothing.", video="broken.mp4")
    text = record("text", "Hello.", "Hi!")
    steps = [[text] * accumulation, [broken] * accumulation, [text] + [broken] * (accumulation - 1)]
    steps += 3 * [[broken] * accumulation]
    (tmp_path / "data.json").write_text(json.dumps(sum(steps, [])))
    settings = {"data": tmp_path / "data.json", "train_sampling_strategy": "sequential", "learning_rate": 0.0}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "max_steps": 6}
    one_by_one = losses(run(training_folder, tmp_path / "1", **settings))
    assert len(one_by_one) == 2 and one_by_one[0] == pytest.approx(one_by_one[1])
    trainer = run(training_folder, tmp_path / "3", logging_steps=3, **settings)
    assert losses(trainer) == [pytest.approx(one_by_one[0])]
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(one_by_one[0])
    by_four = run(training_folder, tmp_path / "4", logging_steps=4, **settings)
    assert by_four.state.log_history[-1]["train_loss"] == pytest.approx(one_by_one[0])


def test_a_loss_that_is_no_number_ends_the_training(training_folder, tmp_path):
    with pytest.raises(ValueError, match=r"The loss is (nan|inf) after step|are not finite numbers"):
        run(
            training_folder, tmp_path, learning_rate=1e30, max_steps=8, max_grad_norm=0.0, lr_scheduler_type="constant"
        )
