"""TensorBoard and Weights & Biases get what is logged, from Transformers' own integrations."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_runs import command_line, run
from transformers import TrainerState


# Bytes in a block of LevelDB's log.
_BLOCK = 32768

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


def logged(state: TrainerState, name: str) -> list[tuple[int, float]]:
    """Step and value of everything logged under a name, as the integrations call it."""
    name = name.removeprefix("train/").replace("eval/", "eval_")
    return [(entry["step"], entry[name]) for entry in state.log_history if name in entry]


def test_tensorboard(training_folder, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"eval_data": training_folder / "data.json", "eval_strategy": "steps", "eval_steps": 2}
    trainer = run(training_folder, tmp_path, report_to="tensorboard", per_device_train_batch_size=1, **settings)
    (folder,) = (tmp_path / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    names = set(events.Tags()["scalars"])
    assert names >= {"train/loss", "train/learning_rate", *OURS}
    for name in ["train/loss", *OURS]:
        assert logged(trainer.state, name), name
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged(trainer.state, name)], name
    assert json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])["num_train_epochs"]


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a run that was not sent: LevelDB's log format behind a header of 7 bytes."""
    content, place, record = file.read_bytes(), 7, b""
    while place < len(content):
        if _BLOCK - place % _BLOCK < 7:  # too little is left of the block for the head of a part
            place += _BLOCK - place % _BLOCK
            continue
        _, length, part = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb(training_folder, tmp_path):
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="Weights & Biases is not installed")
    settings = {"eval_data": training_folder / "data.json", "eval_strategy": "steps", "eval_steps": 2}
    command = command_line(training_folder, tmp_path, report_to="wandb", per_device_train_batch_size=1, **settings)
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    with open(tmp_path / "printed.txt", "w") as printed:  # a pipe would be held open by the process that writes
        subprocess.run(
            [sys.executable, "-m", "mambamia_hf.training", *command],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=240,
            check=True,
        )
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = [protocol.Record.FromString(record) for record in wandb_records(file)]
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    for name in ["train/loss", *OURS]:
        assert logged(state, name), name
        written = [(entry["train/global_step"], entry[name]) for entry in history if name in entry]
        assert written == logged(state, name), name


def test_without_either(training_folder, tmp_path, monkeypatch):
    """A tracker that is not there is an error of `Trainer`, and by default nothing asks for one."""
    for name in ("tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    with pytest.raises(RuntimeError, match="requires tensorboard"):
        run(training_folder, tmp_path / "asked", report_to="tensorboard")
    assert run(training_folder, tmp_path / "default", max_steps=1, report_to="none").state.global_step == 1
