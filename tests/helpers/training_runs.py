"""Short runs of `python -m mambamia_hf.training`."""

import json
from pathlib import Path

import torch
from conversations import arguments
from torch import Tensor
from transformers import Trainer

from mambamia_hf.training.__main__ import main
from mambamia_hf.training.stages import part_of


def run(folder: Path, output: Path, *args, **settings) -> Trainer:
    """Trains within this process; see `command_line`."""
    return main(command_line(folder, output, *args, **settings))


def command_line(
    folder: Path, output: Path, stage: str = "video", data: str | Path = "data.json", **settings
) -> list[str]:
    """To train on what the fixture `training_folder` has made, for 4 steps of 3 samples or as `settings` say."""
    settings = {
        "stage": stage,
        "model": folder / "model",
        "data": folder / data,
        "media_folder": folder,
        "num_frames": 3,
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return arguments(**settings)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parts_that_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {part_of(name) for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def change_settings(model: Path, **settings) -> None:
    """Of a saved model."""
    config = json.loads((model / "config.json").read_text()) | settings
    (model / "config.json").write_text(json.dumps(config))
