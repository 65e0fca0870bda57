"""The command line and its YAML file."""

from pathlib import Path

import pytest
import yaml
from conversations import arguments

from mambamia_hf.training.arguments import parse_arguments
from mambamia_hf.training.stages import STAGES


CONFIGS = Path(__file__).parents[2] / "examples" / "train"


def command_line(folder: Path, **settings) -> list[str]:
    """The arguments that have no default, and more."""
    given = {"stage": "video", "model": "somewhere", "data": "a.json", "output_dir": folder, "use_cpu": True}
    return arguments(**{**given, **settings})


def test_the_command_line_overrides_the_file(tmp_path):
    settings = {
        "stage": "video",
        "model": "somewhere",
        "data": ["a.json", "b.jsonl"],
        "output_dir": str(tmp_path),
        "learning_rate": 1e-3,
        "max_length": 7,
        "media_folder": None,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "use_cpu": True,
    }
    (tmp_path / "a file.yaml").write_text(yaml.safe_dump(settings))
    stage, training = parse_arguments([str(tmp_path / "a file.yaml"), "--max_length", "8", "--data", "c.json"])
    assert (stage.stage, stage.max_length, stage.data, stage.media_folder) == ("video", 8, ["c.json"], None)
    assert (training.learning_rate, training.use_cpu) == (1e-3, True)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    stage, _ = parse_arguments([str(tmp_path / "a file.yaml")])
    assert (stage.max_length, stage.data) == (7, ["a.json", "b.jsonl"])


def test_an_unknown_name_in_a_file(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("modle: elsewhere\n")
    with pytest.raises(ValueError, match="--modle"):
        parse_arguments([str(tmp_path / "a.yaml"), *command_line(tmp_path)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length_scale": 0.5}, "length_scale must be at least 1, not 0.5"),
        ({"frame_dropout": 1.5}, "frame_dropout must lie between 0 and 1, not 1.5"),
        ({"stage": "align", "lora_rank": 4}, "lora_rank=4 and the language model does not learn in stage align"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, not 0.1"),
    ],
)
def test_arguments_that_do_not_fit_together(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(command_line(tmp_path, **settings))


@pytest.mark.parametrize("stage", STAGES)
def test_the_configs_that_come_along(stage, tmp_path):
    settings = command_line(tmp_path, stage=stage, bf16=False)
    given, training = parse_arguments([str(CONFIGS / f"{stage}.yaml"), *settings])
    assert given.stage == stage and training.learning_rate == STAGES[stage].learning_rate
    assert training.gradient_checkpointing and training.seed == 2025
    assert training.get_warmup_steps(1000) == 30


def test_arguments_that_must_not_be_otherwise(tmp_path):
    _, training = parse_arguments(command_line(tmp_path))
    assert not training.remove_unused_columns and training.accelerator_config.dispatch_batches is False
