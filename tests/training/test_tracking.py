"""TensorBoard gets what is logged, from Transformers' own integration."""

import json
import sys

import pytest
from training_runs import run
from transformers import Trainer


# Of ours and of the evaluation, beside what `Trainer` logs.
OURS = {
    "train/frames_per_second",
    "train/peak_memory_gb",
    "eval/loss",
    "eval/accuracy",
    "eval/token_accuracy",
    "eval/samples",
    "eval/skipped",
}


def logged(trainer: Trainer, name: str) -> list[tuple[int, float]]:
    """Step and value of everything logged under a name, as the integrations call it."""
    name = name.removeprefix("train/").replace("eval/", "eval_")
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def test_tensorboard(training_folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"eval_data": training_folder / "data.json", "eval_strategy": "steps", "eval_steps": 2}
    trainer = run(training_folder, tmp_path, report_to="tensorboard", per_device_train_batch_size=1, **settings)
    (folder,) = (tmp_path / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    names = set(events.Tags()["scalars"])
    assert names >= {"train/loss", "train/learning_rate", *OURS}
    for name in ["train/loss", *OURS]:
        assert logged(trainer, name), name
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged(trainer, name)], name
    assert json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])["num_train_epochs"]


def test_without_either(training_folder, tmp_path, monkeypatch):
    """A tracker that is not there is an error of `Trainer`, and by default nothing asks for one."""
    for name in ("tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    with pytest.raises(RuntimeError, match="requires tensorboard"):
        run(training_folder, tmp_path / "asked", report_to="tensorboard")
    assert run(training_folder, tmp_path / "default", max_steps=1, report_to="none").state.global_step == 1
