"""Trains a model on conversations about images and videos, in one of three stages, with the stock `Trainer`.

    python examples/train.py --stage align --model MODEL --data train.json --media_folder media --output_dir runs/align
    python examples/train.py examples/configs/video.yaml --model runs/align --data train.json --output_dir runs/video
    accelerate launch --config_file examples/configs/fsdp2.yaml examples/train.py examples/configs/video.yaml ...

A YAML file holds the same arguments, those of `StageArguments` and of `TrainingArguments`; what follows it on the
command line goes before it. `docs/training.md` says more.
"""

import json
import logging
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from mambamia_hf import MambaMiaForConditionalGeneration
from mambamia_hf.training_data import ConversationCollator, MediaReader, VisionFeatures, open_dataset


logger = logging.getLogger(__name__)

# Which parts learn in which stage, and how fast unless `learning_rate` says otherwise. The vision tower never learns.
# An image has no time: what compares frames, the compressor's second stage, would learn a Δ there that means nothing.
STAGES = {
    "image": (("compressor", "language_model"), 2e-5),
    "align": (("compressor", "temporal_layers"), 1e-4),
    "video": (("compressor", "temporal_layers", "language_model"), 2e-5),
}

# How the names of the weights of each part begin; a weight belongs to the first part that fits.
PARTS = {
    "vision_tower": ("model.vision_tower.",),
    "temporal_layers": ("model.compressor.temporal_layers.",),
    "compressor": ("model.compressor.", "model.end_of_frame"),
    "language_model": ("model.language_model.", "lm_head."),
}


@dataclass
class StageArguments:
    """What to train on what; everything else is `TrainingArguments`."""

    stage: str = field(metadata={"help": "Which parts learn.", "choices": list(STAGES)})
    model: str = field(metadata={"help": "Folder or Hub name of the model to start from."})
    data: list[str] = field(metadata={"help": "JSON or JSONL files of records, or one dataset for `datasets`."})
    streaming: bool = field(default=False, metadata={"help": "Read the data as a stream, in the order it comes in."})
    media_folder: str | None = field(default=None, metadata={"help": "What relative paths of media are relative to."})
    features: str | None = field(default=None, metadata={"help": "Folder of precomputed features to use for pixels."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video at most."})
    fps: float | None = field(default=None, metadata={"help": "Frames of a second at most."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a sample at most."})
    video_stretch: float = field(
        default=1.0,
        metadata={"help": "How many times longer the videos to be read are than those to be learned from."},
    )
    lora_rank: int = field(default=0, metadata={"help": "Trains the language model by LoRA of this rank; 0: in full."})
    dtype: str = field(default="float32", metadata={"help": "Type of the weights; bfloat16 suits a LoRA."})


def parse_arguments(arguments: list[str] | None) -> tuple[StageArguments, TrainingArguments]:
    """The arguments of a command line, which may begin with a YAML file of such."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        settings = yaml.safe_load(Path(arguments.pop(0)).read_text(encoding="utf-8"))
        for name, value in reversed(settings.items()):
            values = value if isinstance(value, list) else [value]
            texts = [json.dumps(value) if isinstance(value, dict) else str(value) for value in values]
            if value is not None:
                arguments = [f"--{name}", *texts, *arguments]
    parser = HfArgumentParser((StageArguments, TrainingArguments))
    parser.set_defaults(learning_rate=None)
    stage, training = parser.parse_args_into_dataclasses(arguments)
    learns, learning_rate = STAGES[stage.stage]
    if stage.lora_rank and "language_model" not in learns:
        raise ValueError(
            f"lora_rank={stage.lora_rank} and the language model does not learn in stage {stage.stage}; leave "
            "lora_rank out or choose stage image or video."
        )
    if stage.video_stretch < 1:
        raise ValueError(f"video_stretch must be at least 1, not {stage.video_stretch}; 1 leaves videos as they are.")
    training.learning_rate = learning_rate if training.learning_rate is None else training.learning_rate
    training.remove_unused_columns = False  # the collator needs the records as they are
    training.accelerator_config.dispatch_batches = False  # batches of a stream differ in shape
    return stage, training


def part_of(name: str) -> str:
    """The part that the weight of this name belongs to."""
    return next(part for part, beginnings in PARTS.items() if name.startswith(beginnings))


def prepare_model(
    model: MambaMiaForConditionalGeneration, stage: str, lora_rank: int = 0
) -> MambaMiaForConditionalGeneration | PeftModel:
    """Lets the parts learn that learn in a stage, the language model by LoRA where there is a `lora_rank`."""
    learns, _ = STAGES[stage]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in learns)
    if not lora_rank:
        return model
    layers = {
        name.rpartition(".")[2]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_rank,
        lora_alpha=2 * lora_rank,
        lora_dropout=0.05,
        target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(layers))})",
        modules_to_save=["compressor"],  # learns in full; an `end_of_frame` vector stays as it is
    )
    adapted = get_peft_model(model, lora)
    adapted.model.model.compressor.float()  # small steps would be lost on bfloat16, in which the rest may stay
    if "temporal_layers" not in learns:
        adapted.model.model.compressor.modules_to_save.default.temporal_layers.requires_grad_(False)
    return adapted


class ThroughputCallback(TrainerCallback):
    """Adds frames and tokens a second and the peak memory, over all processes, to what `Trainer` logs."""

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        self.counts = torch.zeros(2, dtype=torch.float64)
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.start = time.perf_counter()

    def _count(self, model: nn.Module, args: tuple, batch: dict[str, Any]):
        if model.training:
            images = batch.get("pixel_values", batch.get("image_features", ()))
            frames = batch["frame_mask"].sum() if "frame_mask" in batch else 0
            self.counts += torch.tensor([len(images) + int(frames), int(batch["attention_mask"].sum())])

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs):
        if "loss" not in logs:
            return
        seconds = time.perf_counter() - self.start
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        counts, peak = self.counts.to(args.device), torch.tensor(float(peak), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
        frames, tokens = (counts / seconds).tolist()
        logs |= {"frames_per_second": frames, "tokens_per_second": tokens, "peak_memory_gb": peak.item() / 1e9}
        state.log_history[-1] |= logs
        self.counts.zero_()
        self.start = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()


def earlier_checkpoint(training: TrainingArguments) -> str | None:
    """The checkpoint to go on from.

    Raises:
        ValueError: if the output folder has one of an earlier run and nothing says to go on from it.
    """
    last = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    if training.resume_from_checkpoint is None and last is not None:
        raise ValueError(
            f"There is '{last}' of an earlier run: go on from it with --resume_from_checkpoint true, or choose "
            f"another output_dir."
        )
    return last if training.resume_from_checkpoint in (None, "true", "True") else training.resume_from_checkpoint


def reported_samples(folder: Path) -> dict[str, set[tuple[str, int]]]:
    """Ids and checksums of the samples that were skipped, and of those that were cut, in any process so far."""
    samples = {"skipped": set(), "cut": set()}
    for file in folder.glob("samples_*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            note = json.loads(line)
            samples[note["event"]].add((note["sample"], note["checksum"]))
    return samples


def main(arguments: list[str] | None = None) -> Trainer:
    stage, training = parse_arguments(arguments)
    set_seed(training.seed)
    checkpoint = earlier_checkpoint(training)
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with training.main_process_first(local=False):
        if checkpoint is None and training.process_index == 0:
            for earlier in output.glob("samples_*.jsonl"):
                earlier.unlink()
    report = output / f"samples_{training.process_index}.jsonl"

    processor = AutoProcessor.from_pretrained(stage.model)
    model = AutoModelForImageTextToText.from_pretrained(stage.model, dtype=stage.dtype)
    model.config.compressor_config.length_scale = stage.video_stretch
    media = MediaReader(processor, stage.media_folder, stage.num_frames, stage.fps)
    if stage.features is not None:
        media = VisionFeatures(stage.features, media.settings(model))
    dataset = open_dataset(stage.data, stage.streaming)
    collator = ConversationCollator(processor, media, stage.max_length, report, stage.video_stretch)
    if stage.features is not None and isinstance(dataset, list):
        collator.require_features(dataset)  # now rather than after hours
    trainer = Trainer(
        model=prepare_model(model, stage.stage, stage.lora_rank),
        args=training,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
    )
    # Before the callbacks that write logs somewhere.
    trainer.callback_handler.callbacks.insert(0, ThroughputCallback())
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"Out of memory with per_device_train_batch_size={training.per_device_train_batch_size} and "
            f"num_frames={stage.num_frames}: lower them, raise gradient_accumulation_steps, turn on "
            f"gradient_checkpointing and bf16, precompute features, or shard with FSDP2; see docs/training.md."
        ) from error
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        samples = reported_samples(output)
        print(
            f"{len(samples['skipped'])} samples were skipped and {len(samples['cut'])} were cut to max_length; "
            f"{output}/samples_*.jsonl say which and why."
        )
    return trainer


if __name__ == "__main__":
    main()
