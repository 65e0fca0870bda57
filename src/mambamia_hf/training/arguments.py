"""The arguments of training: ours and those of `TrainingArguments`, from a command line and a YAML file."""

import json
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import IntervalStrategy

from .stages import STAGES


@dataclass
class StageArguments:
    """What to train on what; everything else is `TrainingArguments`."""

    stage: str = field(metadata={"help": "Which parts learn.", "choices": list(STAGES)})
    model: str = field(metadata={"help": "Folder or Hub name of the model to start from."})
    data: list[str] = field(
        metadata={"help": "JSON or JSONL files of records, a YAML file of several data sets, or a dataset."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data as a stream, in its own order."})
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Data to evaluate on while training and at its end, as those of --data."}
    )
    eval_split: str = field(
        default="validation", metadata={"help": "The split of eval_data where it is one dataset, as train[:1%%]."}
    )
    media_folder: str | None = field(default=None, metadata={"help": "Folder that relative paths start from."})
    features: str | None = field(default=None, metadata={"help": "Folder of precomputed features, used for pixels."})
    num_frames: int | None = field(default=None, metadata={"help": "Largest number of frames per video."})
    fps: float | None = field(default=None, metadata={"help": "Largest number of frames per second."})
    max_length: int | None = field(default=None, metadata={"help": "Largest number of tokens per sample."})
    length_scale: float = field(
        default=1.0,
        metadata={"help": "Prepares the model for videos up to so many times longer than those it learns from."},
    )
    frame_dropout: float | None = field(
        default=None, metadata={"help": "Largest share of a video's frames left out at random; default: the model's."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of a LoRA for the language model; 0 trains it in full."})
    dtype: str = field(default="float32", metadata={"help": "Type of the weights; bfloat16 suits a LoRA."})


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[StageArguments, TrainingArguments]:
    """Parses a command line, whose first argument may be a YAML file; later arguments override the file.

    Args:
        arguments: the command line without the program's name, by default that of this process.

    Returns:
        Our arguments and those of `Trainer`.

    Raises:
        ValueError: if arguments do not fit together.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments[:1] = _yaml_arguments(Path(arguments[0]))
    parser = HfArgumentParser(
        (StageArguments, TrainingArguments),  # type: ignore[arg-type]  # its type of a class is that of an instance
        prog="python -m mambamia_hf.training",
        description="A first argument may be a YAML file of the arguments below; later arguments override it.",
    )
    if not hasattr(TrainingArguments, "activation_checkpointing"):  # its name since Transformers 5.23
        parser.add_argument(
            "--activation_checkpointing",
            dest="gradient_checkpointing",
            type=string_to_bool,
            nargs="?",
            const=True,
            default=SUPPRESS,
        )
    parser.set_defaults(learning_rate=None)
    stage, training = parser.parse_args_into_dataclasses(arguments)
    _check(stage, training)
    if training.learning_rate is None:
        training.learning_rate = STAGES[stage.stage].learning_rate
    if training.include_num_input_tokens_seen == "no":
        training.include_num_input_tokens_seen = "non_padding"
    training.logging_nan_inf_filter = False  # it hides that training has failed
    training.remove_unused_columns = False  # the collator needs the records as they are
    training.accelerator_config.dispatch_batches = False  # batches of a stream differ in shape
    return stage, training


def with_zero3(training: TrainingArguments) -> bool:
    """Whether DeepSpeed splits the weights."""
    return training.deepspeed_plugin is not None and training.deepspeed_plugin.zero_stage == 3


def _yaml_arguments(file: Path) -> list[str]:
    """The settings of a YAML file as a command line, so that both are checked and converted alike."""
    arguments = []
    for name, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            texts = [json.dumps(value) if isinstance(value, dict) else str(value) for value in values]
            arguments += [f"--{name}", *texts]
    return arguments


def _check(stage: StageArguments, training: TrainingArguments) -> None:
    if stage.lora_rank and "language_model" not in STAGES[stage.stage].learns:
        raise ValueError(
            f"lora_rank={stage.lora_rank} and the language model does not learn in stage {stage.stage}; leave "
            f"lora_rank out or choose stage image or video."
        )
    if not stage.length_scale >= 1:
        raise ValueError(f"length_scale must be at least 1, not {stage.length_scale}; 1 leaves videos as they are.")
    if not 0 <= (stage.frame_dropout or 0) <= 1:
        raise ValueError(f"frame_dropout must lie between 0 and 1, not {stage.frame_dropout}; 0 drops no frame.")
    _check_evaluation(stage, training)
    if stage.lora_rank and with_zero3(training):
        raise ValueError(
            f"lora_rank={stage.lora_rank} does not go with DeepSpeed's ZeRO-3, from whose split weights an adapter "
            f"cannot start everywhere; use examples/train/ddp.yaml, or leave lora_rank out."
        )
    if training.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor must be 0, not {training.label_smoothing_factor}: Trainer would compare each "
            f"token's scores with that token instead of the next one."
        )


def _check_evaluation(stage: StageArguments, training: TrainingArguments) -> None:
    if stage.eval_data is None:
        for name in ("do_eval", "eval_on_start", "load_best_model_at_end"):
            if getattr(training, name):
                strategy = IntervalStrategy(training.eval_strategy)
                setting = name if strategy == IntervalStrategy.NO else f"eval_strategy={strategy.value}"
                raise ValueError(f"{setting} needs data to evaluate on: give --eval_data, or leave it out.")
    elif training.prediction_loss_only:
        raise ValueError(
            "prediction_loss_only must be False: the loss that Trainer computes alone counts samples that cannot be "
            "read as 0."
        )


__all__ = ["StageArguments", "parse_arguments", "with_zero3"]
