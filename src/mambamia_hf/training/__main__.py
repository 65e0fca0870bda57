"""Trains a model on conversations about images and videos, in one of three stages, with the stock `Trainer`.

    python -m mambamia_hf.training --stage align --model MODEL --data train.json --output_dir OUTPUT
    python -m mambamia_hf.training examples/train/align.yaml --model MODEL --data train.json --output_dir OUTPUT
    accelerate launch --config_file examples/train/fsdp2.yaml -m mambamia_hf.training examples/train/align.yaml ...

A YAML file holds the same arguments, those of `StageArguments` and of `TrainingArguments`; command-line arguments
override it. `docs/training.md` says more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, set_seed

from .arguments import StageArguments, parse_arguments, with_zero3
from .checkpoints import checkpoint_to_resume
from .collator import ConversationCollator, reported_samples
from .data import open_dataset
from .evaluation import AnswerMetrics, EvaluationSet, LastEvaluationCallback, answer_statistics
from .logs import MediaLogCallback
from .media import MediaReader, VisionFeatures
from .stages import marks_of_turns, prepare_model
from .trainer import StageTrainer


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Trains, saves the model, and says how many samples were skipped or cut.

    Args:
        arguments: the command line without the program's name, by default that of this process.

    Returns:
        The trainer, after training.
    """
    stage, training = parse_arguments(arguments)
    set_seed(training.seed)
    output = Path(str(training.output_dir))
    checkpoint = checkpoint_to_resume(training, output)
    output.mkdir(parents=True, exist_ok=True)
    with training.main_process_first(local=False):
        if checkpoint is None and training.process_index == 0:
            for earlier in output.glob("samples_*.jsonl"):
                earlier.unlink()
    trainer = build_trainer(stage, training, report=output / f"samples_{training.process_index}.jsonl")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"Out of memory with per_device_train_batch_size={training.per_device_train_batch_size}, "
            f"per_device_eval_batch_size={training.per_device_eval_batch_size} and "
            f"num_frames={stage.num_frames}: lower them, raise gradient_accumulation_steps, turn on "
            f"activation_checkpointing and bf16, precompute features, or shard with FSDP2; see docs/training.md."
        ) from error
    trainer.save_model()
    if not training.push_to_hub:  # which writes the card, too
        trainer.create_model_card()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        samples = reported_samples(output)
        unread = f", {len(samples['not evaluated'])} could not be evaluated" if stage.eval_data else ""
        print(
            f"{len(samples['skipped'])} samples were skipped and {len(samples['cut'])} were cut to max_length"
            f"{unread}; {output}/samples_*.jsonl say which and why."
        )
    return trainer


def build_trainer(stage: StageArguments, training: TrainingArguments, report: Path) -> Trainer:
    """A trainer with everything in place; skipped and cut samples go into `report`."""
    processor = AutoProcessor.from_pretrained(stage.model)
    model: Any = AutoModelForImageTextToText.from_pretrained(stage.model, dtype=stage.dtype)
    model.config.compressor_config.length_scale = stage.length_scale
    if stage.frame_dropout is not None:
        model.config.frame_dropout = stage.frame_dropout
    if model.config.delta_loss_coef and with_zero3(training):
        raise ValueError(
            f"delta_loss_coef={model.config.delta_loss_coef} of '{stage.model}' does not go with DeepSpeed's ZeRO-3, "
            f"which wants one order of gradients from all processes, and only videos have that of Δ; use "
            f"examples/train/fsdp2.yaml, or set it to 0."
        )
    reader = MediaReader(processor, stage.media_folder, stage.num_frames, stage.fps)
    media = reader if stage.features is None else VisionFeatures(stage.features, reader.settings(model))
    dataset = open_dataset(stage.data, stage.streaming, stage.media_folder, training.seed)
    collator = ConversationCollator(processor, media, stage.max_length, report, stage.length_scale)
    if not stage.streaming:
        collator.require_features(dataset)  # now rather than after hours
    evaluation = None
    if stage.eval_data is not None:
        records = open_dataset(stage.eval_data, False, stage.media_folder, training.seed, stage.eval_split)
        evaluation = EvaluationSet(records)
        collator.require_features(evaluation)
        collator.require_readable(evaluation)
    trainer = StageTrainer(
        stage,
        model=prepare_model(model, stage.stage, stage.lora_rank, marks_of_turns(processor)),
        args=training,
        train_dataset=dataset,
        eval_dataset=evaluation,
        data_collator=collator,
        processing_class=processor,
        compute_metrics=AnswerMetrics(),
        preprocess_logits_for_metrics=answer_statistics,
        callbacks=[LastEvaluationCallback()] if evaluation is not None else None,
    )
    trainer.callback_handler.callbacks.insert(0, MediaLogCallback())  # before those that write the logs somewhere
    return trainer


if __name__ == "__main__":
    main()
