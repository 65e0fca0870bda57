"""Trains MambaMia, MambaMia without one of its parts, and other compressors in its place, and compares them.

    python examples/needle/train.py --output_dir runs/needle
    python examples/ablation.py --needle runs/needle --output_dir runs/ablation

What the first command made is shared: the vision tower, which stays frozen, the stills and the shorter videos, and
their features; its stages after that are not needed. From there on every compressor and a language model learn from
nothing, on the same data for as many steps, three times with different seeds. What counts is how often the answer
about a fresh video of the test split is the right option, word for word, in videos as long as the longest of training
and in videos four times as long. On the MambaMia models, ways to select frames are compared as well.

The 24 runs share the cores, one thread and some five to fifteen minutes each. Those whose JSON is in `output_dir` are
not done again. The results go to `examples/results/`: `ablation.json`, `ablation.md`, `ablation.png`, `budget.png`.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import precompute_features
import torch
import transformers
from baselines import FramePooling, NoCompression, PooledQueries, SelfAttention
from matplotlib.figure import Figure
from needle.train import NUM_FRAMES, OPTIMIZER, RECORDS, record, write_data, write_spaced_video
from torch import Tensor
from train import prepare_model
from transformers import Trainer, TrainingArguments, set_seed

from mambamia_hf import MambaMiaConfig, MambaMiaForConditionalGeneration, MambaMiaProcessor, select_frames
from mambamia_hf.frame_selection import frame_budget
from mambamia_hf.modeling_mambamia import MambaMiaFeaturesOutput
from mambamia_hf.needle import TASKS, multiple_choice
from mambamia_hf.training_data import ConversationCollator, MediaReader, VisionFeatures, load_records


# What differs: settings of the compressor, and the class that takes its place.
MAMBAMIA = "MambaMia"
VARIANTS = {
    MAMBAMIA: ({}, None),
    "without TAA": ({"num_temporal_layers": 0}, None),
    "without GPA": ({"gpa_placement": None}, None),
    "causal": ({"bidirectional": False}, None),
    "3D-pooled queries (BIMBA)": ({}, PooledQueries),
    "2D average pooling": ({}, FramePooling),
    "self-attention": ({}, SelfAttention),
    "no compression": ({"patches_per_anchor": 1}, NoCompression),
}
SEEDS = (0, 1, 2)
TIMES_LONGER = (1, 4)  # test videos than the longest of training
BUDGETS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CALIBRATION_VIDEOS = 60  # of the training split, to find the threshold that keeps half of their frames


@dataclass(frozen=True)
class Settings:
    """Of every run alike: frames of the longest training videos, and how much of what."""

    num_frames: int
    image_steps: int
    video_steps: int
    num_videos: int

    def test_folders(self, output: Path) -> dict[int, Path]:
        """Where the test videos are, by their number of frames."""
        lengths = [times * self.num_frames for times in TIMES_LONGER]
        return {num_frames: output / f"test-{self.num_videos}x{num_frames}" for num_frames in lengths}


def unseen_video(num_frames: int, folder: Path, seed: int) -> list[dict[str, Any]]:
    """A video of the test split with the question of its task, as a record."""
    made = write_spaced_video(folder, seed, random.Random(seed), num_frames, "test")
    question = multiple_choice(made, seed)
    return [record("video", f"{seed}.mp4", num_frames, question.prompt, question.answer) | {"task": made.task}]


def write_test_videos(folder: Path, num_videos: int, num_frames: int, needle: Path):
    """Test videos and their features, made as those of the training videos were."""
    write_data(folder, partial(unseen_video, num_frames), num_videos)
    precompute_features.main(
        f"--model {needle / 'vision'} --data {folder / RECORDS} --media_folder {folder} "
        f"--output {folder / 'features'} --num_frames {max(NUM_FRAMES)}".split()
    )


def open_data(
    folder: Path, features: Path, model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor
) -> tuple[list[dict[str, Any]], ConversationCollator]:
    """The records of a folder, and what makes batches of them from features."""
    features = VisionFeatures(features, MediaReader(processor, num_frames=max(NUM_FRAMES)).settings(model))
    return load_records([folder / RECORDS]), ConversationCollator(processor, features)


def build(variant: str, seed: int, needle: Path) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    """An untrained model with the trained vision tower, and its processor."""
    changes, compressor_class = VARIANTS[variant]
    trained = MambaMiaForConditionalGeneration.from_pretrained(needle / "vision")
    processor = MambaMiaProcessor.from_pretrained(needle / "vision")
    config = MambaMiaConfig.from_pretrained(needle / "vision")
    for name, value in changes.items():
        setattr(config.compressor_config, name, value)
    # Dropping frames would favour what remembers them. That Δ costs concerns only what has a Δ, and keeps its meaning.
    config.frame_dropout, config.delta_loss_coef = 0.0, 1.0
    processor.num_frame_tokens = config.num_frame_tokens
    set_seed(seed)
    model = MambaMiaForConditionalGeneration(config)
    model.model.vision_tower = trained.model.vision_tower
    if compressor_class is not None:
        model.model.compressor = compressor_class(config.compressor_config)
    return model, processor


def train(
    model: MambaMiaForConditionalGeneration,
    stage: str,
    records: list[dict[str, Any]],
    collator: ConversationCollator,
    steps: int,
    batch_size: int,
    seed: int,
):
    """What learns in `stage` learns, with the settings of `examples/needle/train.py`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            warmup_steps=0.05,
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
            **OPTIMIZER,
        )
        model = prepare_model(model, stage)
        Trainer(model=model, args=arguments, train_dataset=records, data_collator=collator).train()


@dataclass
class CompressedVideo:
    """A test video as a trained model compressed it, and the question about it."""

    task: str
    input_ids: Tensor
    labels: Tensor
    tokens: Tensor
    deltas: Tensor | None

    @property
    def num_frames(self) -> int:
        return len(self.tokens)


@torch.no_grad()
def compress(
    model: MambaMiaForConditionalGeneration, collator: ConversationCollator, records: Iterable[dict[str, Any]]
) -> list[CompressedVideo]:
    videos = []
    for one in records:
        batch = collator([one])
        encoded = model.get_video_features(
            video_features=batch["video_features"], frame_mask=batch["frame_mask"], delta_threshold=0.0
        )
        deltas = None if encoded.frame_deltas is None else encoded.frame_deltas[0]
        input_ids, labels = batch["input_ids"][0], batch["labels"][0]
        videos.append(CompressedVideo(one.get("task"), input_ids, labels, encoded.last_hidden_state[0], deltas))
    return videos


@torch.no_grad()
def accuracy(
    model: MambaMiaForConditionalGeneration, videos: list[CompressedVideo], select: Callable[[CompressedVideo], Tensor]
) -> dict[str, float]:
    """How often the model answers right, task by task, when it sees the frames that `select` says."""
    right = defaultdict(list)
    for video in videos:
        kept = select(video)
        stays = torch.ones_like(video.input_ids, dtype=torch.bool)
        placeholders = video.input_ids == model.config.video_token_id
        stays[placeholders] = kept.repeat_interleave(video.tokens.shape[1])
        seen = {"video": MambaMiaFeaturesOutput(pooler_output=[video.tokens[kept].flatten(0, 1)])}
        logits = model(input_ids=video.input_ids[stays][None], mm_encoder_outputs=seen).logits[0, :-1]
        # The right answer is what the model would say if the best next token is right at every place of it.
        labels = video.labels[stays][1:]
        right[video.task].append(bool((logits.argmax(dim=-1) == labels)[labels != -100].all()))
    return {task: mean(answers) for task, answers in right.items()}


def every_frame(video: CompressedVideo) -> Tensor:
    return torch.ones(video.num_frames, dtype=torch.bool)


def uniform(ratio: float) -> Callable[[CompressedVideo], Tensor]:
    """Keeps the middle frames of as many equal stretches as there are frames to keep."""

    def select(video: CompressedVideo) -> Tensor:
        count = frame_budget(video.num_frames, None, ratio)
        kept = torch.zeros(video.num_frames, dtype=torch.bool)
        kept[((torch.arange(count) + 0.5) * video.num_frames / count).long()] = True
        return kept

    return select


def by_delta(**budget: float) -> Callable[[CompressedVideo], Tensor]:
    return lambda video: select_frames(video.deltas[None], **budget)[0]


def share_kept(videos: list[CompressedVideo], select: Callable[[CompressedVideo], Tensor]) -> float:
    return mean(select(video).float().mean().item() for video in videos)


def threshold_for_half(videos: list[CompressedVideo]) -> float:
    """The δ that keeps half of the frames, by bisection."""
    low, high = 0.0, max(video.deltas.sum().item() for video in videos)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if share_kept(videos, by_delta(threshold=middle)) > 0.5 else (low, middle)
    return high


def compare_selections(
    model: MambaMiaForConditionalGeneration, test: list[CompressedVideo], training: list[CompressedVideo]
) -> dict[str, Any]:
    threshold = threshold_for_half(training)
    selections = {
        "no selection": every_frame,
        "uniform 50 %": uniform(0.5),
        "Δ threshold, about 50 %": by_delta(threshold=threshold),
        "exact budget, 50 %": by_delta(keep_ratio=0.5),
    }
    return {
        "threshold": threshold,
        "selections": {
            name: {"kept": share_kept(test, select), "accuracy": accuracy(model, test, select)}
            for name, select in selections.items()
        },
        "budgets": {
            str(ratio): {
                "exact budget": accuracy(model, test, by_delta(keep_ratio=ratio)),
                "uniform": accuracy(model, test, uniform(ratio)),
            }
            for ratio in BUDGETS
        },
    }


def run(variant: str, seed: int, settings: Settings, needle: Path, output: Path) -> dict[str, Any]:
    """Trains and scores one variant with one seed."""
    torch.set_num_threads(1)
    model, processor = build(variant, seed, needle)
    stills, still_collator = open_data(needle / "stills", needle / "features", model, processor)
    videos, video_collator = open_data(needle / "videos", needle / "features", model, processor)
    videos = [one for one in videos if one["length"] <= settings.num_frames]
    start = time.process_time()
    train(model, "image", stills, still_collator, settings.image_steps, 48, seed)
    train(model, "video", videos, video_collator, settings.video_steps, 12, seed)
    seconds = time.process_time() - start

    model.eval()
    calibration = compress(model, video_collator, videos[:CALIBRATION_VIDEOS]) if variant == MAMBAMIA else []
    tests = {}
    for num_frames, folder in settings.test_folders(output).items():
        records, test_collator = open_data(folder, folder / "features", model, processor)
        unseen = compress(model, test_collator, records)
        tests[str(num_frames)] = {"accuracy": accuracy(model, unseen, every_frame)}
        if variant == MAMBAMIA:
            tests[str(num_frames)] |= compare_selections(model, unseen, calibration)
    return {
        "variant": variant,
        "seed": seed,
        "settings": vars(settings),
        "parameters": model.model.compressor.num_parameters(),
        "frame_tokens": processor.num_frame_tokens,
        "training_seconds": seconds,
        "tests": tests,
    }


def run_all(settings: Settings, needle: Path, output: Path, workers: int) -> list[dict[str, Any]]:
    """The results of all runs, of which those that are not there yet are done now.

    Raises:
        ValueError: if one that is there was made with other settings.
    """
    files = {
        (variant, seed): output / f"{variant.replace(' ', '_')}-{seed}.json" for seed in SEEDS for variant in VARIANTS
    }
    for file in files.values():
        if file.is_file() and json.loads(file.read_text())["settings"] != vars(settings):
            raise ValueError(f"'{file}' was made with other settings than {settings}; choose another output_dir.")
    for num_frames, folder in settings.test_folders(output).items():
        write_test_videos(folder, settings.num_videos, num_frames, needle)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(run, *job, settings, needle, output): file for job, file in files.items() if not file.is_file()
        }
        for job in as_completed(jobs):
            result = job.result()
            jobs[job].write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            scores = {num_frames: test["accuracy"] for num_frames, test in result["tests"].items()}
            print(result["variant"], result["seed"], scores, flush=True)
    return [json.loads(file.read_text()) for file in files.values()]


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "std": stdev(values)}


def over_seeds(accuracies: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the runs, of each task and of the mean of all tasks."""
    rows = [{**one, "all": mean(one[task] for task in TASKS)} for one in accuracies]
    return {task: spread([row[task] for row in rows]) for task in (*TASKS, "all")}


def summarise(results: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Everything that the table and the plots show."""
    runs = {variant: [one for one in results if one["variant"] == variant] for variant in VARIANTS}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "settings": {**vars(settings), "seeds": len(SEEDS), **versions},
        "variants": {
            variant: {
                "parameters": of_variant[0]["parameters"],
                "frame_tokens": of_variant[0]["frame_tokens"],
                "training_seconds": mean(one["training_seconds"] for one in of_variant),
                "accuracy": {
                    num_frames: over_seeds([one["tests"][num_frames]["accuracy"] for one in of_variant])
                    for num_frames in of_variant[0]["tests"]
                },
            }
            for variant, of_variant in runs.items()
        },
        "tests": {
            num_frames: summarise_selections([one["tests"][num_frames] for one in runs[MAMBAMIA]])
            for num_frames in runs[MAMBAMIA][0]["tests"]
        },
        "runs": results,
    }


def summarise_selections(tests: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the seeds, what `compare_selections` gave."""
    return {
        "selections": {
            name: {
                "kept": mean(one["selections"][name]["kept"] for one in tests),
                "accuracy": over_seeds([one["selections"][name]["accuracy"] for one in tests]),
            }
            for name in tests[0]["selections"]
        },
        "budgets": {
            ratio: {how: over_seeds([one["budgets"][ratio][how] for one in tests]) for how in of_ratio}
            for ratio, of_ratio in tests[0]["budgets"].items()
        },
    }


def percent(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}"


def markdown(summary: dict[str, Any]) -> str:
    settings, columns = summary["settings"], (*TASKS, "all")
    lines = [
        f"Accuracy in percent, mean and standard deviation over {settings['seeds']} seeds; chance is 25. All were "
        f"trained for {settings['image_steps']} steps on stills and {settings['video_steps']} on videos of up to "
        f"{settings['num_frames']} frames.",
    ]
    for num_frames, test in summary["tests"].items():
        lines += [
            "",
            f"{settings['num_videos']} test videos of {num_frames} frames:",
            "",
            f"| compressor | parameters | tokens a frame | {' | '.join(columns)} | CPU minutes of training |",
            f"| --- | ---: | ---: |{' ---: |' * len(columns)} ---: |",
        ]
        for name, one in summary["variants"].items():
            scores = " | ".join(percent(one["accuracy"][num_frames][column]) for column in columns)
            minutes = one["training_seconds"] / 60
            lines.append(f"| {name} | {one['parameters']:,} | {one['frame_tokens']} | {scores} | {minutes:.1f} |")
        lines += [
            "",
            f"The same {num_frames} frames, selected at inference, on the MambaMia models above:",
            "",
            f"| selection | frames kept | {' | '.join(columns)} |",
            f"| --- | ---: |{' ---: |' * len(columns)}",
        ]
        for name, one in test["selections"].items():
            scores = " | ".join(percent(one["accuracy"][column]) for column in columns)
            lines.append(f"| {name} | {one['kept']:.0%} | {scores} |")
    return "\n".join(lines) + "\n"


def plot_variants(summary: dict[str, Any], path: Path):
    columns, names = (*TASKS, "all"), list(summary["variants"])
    figure = Figure(figsize=(9, 7), layout="constrained")
    rows = figure.subplots(len(summary["tests"]), len(columns), sharex=True, sharey=True)
    for row, num_frames in zip(rows, summary["tests"], strict=True):
        for axis, column in zip(row, columns, strict=True):
            scores = [summary["variants"][name]["accuracy"][num_frames][column] for name in names]
            axis.barh(
                names,
                [100 * score["mean"] for score in scores],
                xerr=[100 * score["std"] for score in scores],
                color=["tab:blue" if name == MAMBAMIA else "tab:gray" for name in names],
            )
            axis.axvline(25, color="black", linewidth=0.8, linestyle=":")
            axis.set(title=f"{column}\n{num_frames} frames", xlim=(0, 100))
    for axis in rows[-1]:
        axis.set_xlabel("accuracy, %")
    rows[0, 0].invert_yaxis()
    figure.savefig(path, dpi=120)


def plot_budgets(summary: dict[str, Any], path: Path):
    """The runs as thin lines and their mean as a thick one."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    rows = figure.subplots(len(summary["tests"]), len(TASKS), sharex=True, sharey=True)
    runs = [one for one in summary["runs"] if one["variant"] == MAMBAMIA]
    shares = [100 * ratio for ratio in BUDGETS]
    for row, (num_frames, test) in zip(rows, summary["tests"].items(), strict=True):
        for axis, task in zip(row, TASKS, strict=True):
            for how, label, colour in (("exact budget", "by Δ", "tab:blue"), ("uniform", "uniform", "tab:orange")):
                for one in runs:
                    scores = [100 * budget[how][task] for budget in one["tests"][num_frames]["budgets"].values()]
                    axis.plot(shares, scores, color=colour, linewidth=0.8, alpha=0.5)
                means = [100 * budget[how][task]["mean"] for budget in test["budgets"].values()]
                axis.plot(shares, means, color=colour, linewidth=2, marker="o", markersize=3, label=label)
            axis.axhline(25, color="black", linewidth=0.8, linestyle=":")
            axis.set(title=f"{task}, {num_frames} frames", ylim=(0, 105))
        row[0].set_ylabel("accuracy, %")
    for axis in rows[-1]:
        axis.set_xlabel("frames kept, %")
    rows[-1, -1].legend(loc="upper right")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--needle", type=Path, required=True, help="output_dir of examples/needle/train.py")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="for the test videos and the result of each run"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="for table and plots")
    parser.add_argument("--num_frames", type=int, default=32, help="of the longest training videos")
    parser.add_argument("--image_steps", type=int, default=100)
    parser.add_argument("--video_steps", type=int, default=1200)
    parser.add_argument("--num_videos", type=int, default=300, help="test videos of each length")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    arguments = parser.parse_args()
    settings = Settings(arguments.num_frames, arguments.image_steps, arguments.video_steps, arguments.num_videos)
    results = run_all(settings, arguments.needle, arguments.output_dir, arguments.workers)

    summary = summarise(results, settings)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "ablation.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    (arguments.results / "ablation.md").write_text(markdown(summary))
    plot_variants(summary, arguments.results / "ablation.png")
    plot_budgets(summary, arguments.results / "budget.png")
    print(markdown(summary))


if __name__ == "__main__":
    main()
