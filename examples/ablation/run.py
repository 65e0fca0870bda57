"""Trains MambaMia, MambaMia without one of its parts, and other compressors in its place, and scores them.

    PYTHONPATH=examples python -m ablation.run --needle runs/needle --tests runs/ablation/test-32 \\
        runs/ablation/test-128 --output runs/ablation/ablation.jsonl

All share what `examples/needle/run.sh` made: the frozen vision tower, the stills, the shorter videos and the features
of both. Every compressor and a language model learn on them from nothing, for as many steps, with three seeds. A score
is how often the answer about a test video is right, word for word. On the MambaMia models, ways to select frames are
scored as well.

The runs share the cores, one thread each. The output has one row per model, seed, test, task and selection. Runs whose
rows it has are not repeated.
"""

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from needle.training_data import RECORDS, Record
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments, set_seed

from mambamia_hf import MambaMiaConfig, MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.files import atomic_write
from mambamia_hf.frame_selection import frame_budget, select_frames
from mambamia_hf.modeling_encoder import MambaMiaFeaturesOutput
from mambamia_hf.training import ConversationCollator, MediaReader, VisionFeatures, load_records
from mambamia_hf.training.stages import prepare_model

from .baselines import FramePooling, MLPProjector, PooledQueries, SelfAttention


TASKS = ("retrieval", "ordering", "counting")  # no times, so that only the compressors differ
MAMBAMIA = "MambaMia"
# Settings of the compressor that differ, and the class that takes its place.
VARIANTS: dict[str, tuple[dict[str, Any], type | None]] = {
    MAMBAMIA: ({}, None),
    "without TAA": ({"num_temporal_layers": 0}, None),
    "without GPA": ({"gpa_placement": None}, None),
    "causal": ({"bidirectional": False}, None),
    "3D-pooled queries (BIMBA)": ({}, PooledQueries),
    "2D average pooling": ({}, FramePooling),
    "self-attention": ({}, SelfAttention),
    "no compression": ({"patches_per_anchor": 1}, MLPProjector),
}
SEEDS = (0, 1, 2)
KEEP_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CALIBRATION_VIDEOS = 60  # of the training split, to find the threshold that keeps half of their frames
BATCH_SIZE = 50
SAMPLED_FRAMES = 128  # at most, as in the scripts that precompute features

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Args:
        train_frames: frames of the longest training videos.
        image_steps: training steps on stills.
        video_steps: training steps on videos.
    """

    train_frames: int
    image_steps: int
    video_steps: int


@dataclass(frozen=True)
class Selection:
    """Which frames the language model sees.

    Args:
        name: "all", "uniform", "delta_budget" (as many frames, chosen by Δ) or "delta_threshold".
        keep_ratio: share of the frames to keep; "delta_threshold" aims at it.
        delta_threshold: δ of "delta_threshold".
    """

    name: str
    keep_ratio: float
    delta_threshold: float | None = None

    def keep_mask(self, features: MambaMiaFeaturesOutput) -> Tensor:
        """The kept frames of videos without padding, `(num_videos, num_frames)`."""
        num_videos, num_frames = features.keep_mask.shape
        if self.name == "all":
            return torch.ones(num_videos, num_frames, dtype=torch.bool)
        if self.name == "uniform":  # the middle frames of equal stretches
            budget = frame_budget(num_frames, keep_ratio=self.keep_ratio)
            kept = torch.zeros(num_videos, num_frames, dtype=torch.bool)
            kept[:, ((torch.arange(budget) + 0.5) * num_frames / budget).long()] = True
            return kept
        if self.name == "delta_budget":
            return select_frames(features.frame_deltas, keep_ratio=self.keep_ratio)
        return select_frames(features.frame_deltas, threshold=self.delta_threshold)


def open_data(
    folder: Path, features: Path, model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor
) -> tuple[list[Record], ConversationCollator]:
    """The records of a folder of `needle.training_data`, and the collator that reads their features."""
    media = VisionFeatures(features, MediaReader(processor, num_frames=SAMPLED_FRAMES).settings(model))
    return load_records([folder / RECORDS]), ConversationCollator(processor, media)


def questions_of_tasks(records: list[Record]) -> list[Record]:
    """The turns of conversations that ask one of `TASKS`, each as a record of one turn.

    Times are left out: the models that are compared do not read them.
    """
    found = []
    for record in records:
        turns = record["conversations"]
        for number, kind in enumerate(record["kinds"]):
            if kind in TASKS:
                question, answer = turns[2 * number : 2 * number + 2]
                text = question["value"].removeprefix("<video>\n")
                alone = [question | {"value": f"<video>\n{text}"}, answer]
                found.append(record | {"conversations": alone, "kinds": [kind], "task": kind})
    return found


def build(variant: str, seed: int, needle: Path) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    """An untrained model with the trained vision tower, and its processor."""
    changes, compressor_class = VARIANTS[variant]
    trained = MambaMiaForConditionalGeneration.from_pretrained(needle / "vision")
    processor = MambaMiaProcessor.from_pretrained(needle / "vision")
    config = MambaMiaConfig.from_pretrained(needle / "vision")
    for name, value in changes.items():
        setattr(config.compressor_config, name, value)
    # Frame dropout would favour compressors that remember. The cost of Δ only affects those that have a Δ.
    config.frame_dropout, config.delta_loss_coef = 0.0, 1.0
    config.frame_time_format = processor.frame_time_format = None
    processor.tokens_per_frame = config.tokens_per_frame()
    set_seed(seed)
    model = MambaMiaForConditionalGeneration(config)
    model.model.vision_tower = trained.model.vision_tower
    if compressor_class is not None:
        model.model.compressor = compressor_class(config.compressor_config)
    return model, processor


def train(
    model: MambaMiaForConditionalGeneration,
    stage: str,
    records: list[Record],
    collator: ConversationCollator,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Trains the parts that learn in `stage`, with the settings of `examples/needle/run.sh`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            adam_beta2=0.98,
            seed=seed,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
        )
        model = prepare_model(model, stage)
        Trainer(model=model, args=arguments, train_dataset=records, data_collator=collator).train()


@dataclass(frozen=True)
class EncodedVideos:
    """Videos with the same number of frames, compressed by a trained model, and the questions about them.

    Args:
        tasks: the task of each question.
        answers: the right answers.
        input_ids: the prompts with placeholders for every frame, `(num_videos, length)`, padded on the left.
        attention_mask: `(num_videos, length)`, 0 for padding.
        features: of the videos, with every frame kept.
    """

    tasks: list[str]
    answers: list[str]
    input_ids: Tensor
    attention_mask: Tensor
    features: MambaMiaFeaturesOutput


@torch.no_grad()
def compress(
    model: MambaMiaForConditionalGeneration, collator: ConversationCollator, records: Sequence[Record]
) -> list[EncodedVideos]:
    """Runs the compressor over test videos, once for all selections."""
    batches = []
    for start in range(0, len(records), BATCH_SIZE):
        some = records[start : start + BATCH_SIZE]
        batch = collator(some)
        ends = (batch["labels"] != -100).int().argmax(dim=1)  # of the prompts
        prompts = [row[:end] for row, end in zip(batch["input_ids"], ends, strict=True)]
        masks = [torch.ones_like(prompt) for prompt in prompts]
        batches.append(
            EncodedVideos(
                tasks=[record["task"] for record in some],
                answers=[record["conversations"][-1]["value"] for record in some],
                input_ids=pad_sequence(prompts, True, collator.processor.tokenizer.pad_token_id, "left"),
                attention_mask=pad_sequence(masks, True, 0, "left"),
                features=model.get_video_features(
                    patch_features_videos=batch["patch_features_videos"], delta_threshold=0.0
                ),
            )
        )
    return batches


def keep(features: MambaMiaFeaturesOutput, keep_mask: Tensor) -> MambaMiaFeaturesOutput:
    """The features of videos of which every frame was kept, with fewer frames kept."""
    tokens = [
        video.unflatten(0, (len(kept), -1))[kept].flatten(0, 1)
        for video, kept in zip(features.pooler_output, keep_mask, strict=True)
    ]
    return replace(features, pooler_output=tokens, keep_mask=keep_mask)


def accuracy(
    model: MambaMiaForConditionalGeneration,
    processor: MambaMiaProcessor,
    batches: Iterable[EncodedVideos],
    selection: Selection,
) -> dict[str, float]:
    """How often the model answers right, by task, if it sees the selected frames."""
    right = defaultdict(list)
    for batch in batches:
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_encoder_outputs={"video": keep(batch.features, selection.keep_mask(batch.features))},
            do_sample=False,
        )
        given = processor.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        for task, answer, expected in zip(batch.tasks, given, batch.answers, strict=True):
            right[task].append(answer == expected)
    return {task: sum(answers) / len(answers) for task, answers in right.items()}


def share_kept(deltas: list[Tensor], threshold: float) -> float:
    """The share of frames that a threshold keeps, averaged over videos with `deltas (num_frames,)` each."""
    return mean(select_frames(video[None], threshold).float().mean().item() for video in deltas)


def threshold_for_half(deltas: list[Tensor]) -> float:
    """The δ that keeps half of the frames of videos with `deltas (num_frames,)` each, by bisection."""
    low, high = 0.0, max(video.sum().item() for video in deltas)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if share_kept(deltas, middle) > 0.5 else (low, middle)
    return high


@torch.no_grad()
def calibrate(model: MambaMiaForConditionalGeneration, collator: ConversationCollator, records: list[Record]) -> float:
    """The δ that keeps half of the frames of these videos."""
    return threshold_for_half(
        [
            model.get_video_features(
                patch_features_videos=collator([record])["patch_features_videos"], delta_threshold=0.0
            ).frame_deltas[0]
            for record in records
        ]
    )


def run(variant: str, seed: int, settings: Settings, needle: Path, tests: Sequence[Path]) -> list[Row]:
    """Trains and scores one variant with one seed."""
    torch.set_num_threads(1)
    model, processor = build(variant, seed, needle)
    stills, still_collator = open_data(needle / "data/stills", needle / "features/stills", model, processor)
    videos, video_collator = open_data(needle / "data/videos", needle / "features/videos", model, processor)
    videos = questions_of_tasks([record for record in videos if record["length"] <= settings.train_frames])
    start = time.process_time()
    train(model, "image", stills, still_collator, settings.image_steps, 48, seed)
    train(model, "video", videos, video_collator, settings.video_steps, 12, seed)
    seconds = time.process_time() - start
    model.eval()

    selections = [Selection("all", 1.0)]
    if variant == MAMBAMIA:
        selections += [Selection(name, ratio) for name in ("uniform", "delta_budget") for ratio in KEEP_RATIOS]
        threshold = calibrate(model, video_collator, videos[:CALIBRATION_VIDEOS])
        selections.append(Selection("delta_threshold", 0.5, threshold))
    about_run = {
        "variant": variant,
        "seed": seed,
        **vars(settings),
        "parameters": model.model.compressor.num_parameters(),
        "tokens_per_frame": processor.tokens_per_frame,
        "training_seconds": seconds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = []
    for folder in tests:
        records, collator = open_data(folder, folder / "features", model, processor)
        batches = compress(model, collator, records)
        for selection in selections:
            kept = torch.cat([selection.keep_mask(batch.features) for batch in batches]).double().mean().item()
            rows += [
                {
                    **about_run,
                    "num_frames": records[0]["length"],
                    "num_videos": len(records),
                    "selection": selection.name,
                    "keep_ratio": selection.keep_ratio,
                    "delta_threshold": selection.delta_threshold,
                    "frames_kept": kept,
                    "task": task,
                    "accuracy": score,
                }
                for task, score in accuracy(model, processor, batches, selection).items()
            ]
    return rows


def read_rows(file: Path, settings: Settings, tests: Sequence[Path]) -> list[Row]:
    """The rows of earlier runs.

    Raises:
        ValueError: if one was made with other settings or tests.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    records = [load_records([folder / RECORDS]) for folder in tests]
    sizes = [(of_test[0]["length"], len(of_test)) for of_test in records]
    for row in rows:
        used = Settings(row["train_frames"], row["image_steps"], row["video_steps"])
        if used != settings:
            raise ValueError(f"'{file}' has rows of {used}, not {settings}; choose another output.")
        size = row["num_frames"], row["num_videos"]
        if size not in sizes:
            raise ValueError(
                f"'{file}' has rows of a test with (num_frames, num_videos) {size}, and the tests have {sizes}; "
                f"choose another output."
            )
    return rows


def run_all(settings: Settings, needle: Path, tests: Sequence[Path], output: Path, workers: int) -> None:
    """Adds the rows of all runs that `output` lacks, run by run."""
    rows = read_rows(output, settings, tests)
    done = {(row["variant"], row["seed"]) for row in rows}
    order = [(variant, seed) for variant in VARIANTS for seed in SEEDS]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(run, *job, settings, needle, tests) for job in order if job not in done]
        for job in as_completed(jobs):
            rows = sorted(rows + job.result(), key=lambda row: order.index((row["variant"], row["seed"])))
            with atomic_write(output) as unfinished:
                unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
            for row in job.result():
                if row["selection"] == "all":
                    print(row["variant"], row["seed"], row["num_frames"], row["task"], row["accuracy"], flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--needle", type=Path, required=True, help="output folder of examples/needle/run.sh")
    parser.add_argument(
        "--tests", type=Path, nargs="+", required=True, help="folders of test videos, each with its features"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL file of the rows")
    parser.add_argument("--train_frames", type=int, default=32, help="frames of the longest training videos")
    parser.add_argument("--image_steps", type=int, default=100)
    parser.add_argument("--video_steps", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    options = parser.parse_args(arguments)
    settings = Settings(options.train_frames, options.image_steps, options.video_steps)
    run_all(settings, options.needle, options.tests, options.output, options.workers)


if __name__ == "__main__":
    main()
