"""Asks a checkpoint about fresh needle videos and writes how often it is right, task by task.

    PYTHONPATH=examples python -m needle.evaluate --output examples/results/needle_hour.json

Every video is a new H.264 file of the test split, looked at by `encode_video` and answered by `generate`. An answer
counts if it is right word for word. A time counts if it is off by at most one interval between sampled frames, or by a
second where they are closer.
"""

import argparse
import json
import os
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.files import atomic_write

from .plan import TASKS
from .questions import Question, accepted_answers, task_question
from .video import write_needle_video


@cache
def load(checkpoint: str) -> tuple[MambaMiaForConditionalGeneration, MambaMiaProcessor]:
    model = MambaMiaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, MambaMiaProcessor.from_pretrained(checkpoint)


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes in which PyTorch runs on one thread each."""
    return ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def matches(question: Question, given: str, interval: float) -> bool:
    """Whether the answer `given` is right, where sampled frames are `interval` seconds apart."""
    return given in accepted_answers(question, interval)


@dataclass
class Sample:
    """A question about a video as the model takes it.

    Args:
        question: the question.
        inputs: what the processor returns for what the model remembers of the video.
        interval: seconds between sampled frames.
    """

    question: Question
    inputs: dict[str, Any]
    interval: float


@torch.no_grad()
def read_sample(arguments: argparse.Namespace, task: str, seed: int) -> Sample:
    """Writes the video of a seed and looks at it, once for all shares of its frames."""
    model, processor = load(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        video = write_needle_video(
            Path(folder) / "video.mp4",
            seed,
            task=task,
            split="test",
            duration=arguments.duration,
            fps=arguments.fps,
            size=tuple(arguments.size),
            num_frames=arguments.num_frames,
            background=arguments.background and arguments.background[seed % len(arguments.background)],
        )
        memory = model.encode_video(video.path, processor, num_frames=arguments.num_frames)
    question = task_question(video, seed)
    content = [{"type": "video", "video": memory}, {"type": "text", "text": question.prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return Sample(question, inputs, arguments.duration / len(memory))


@torch.no_grad()
def is_right(arguments: argparse.Namespace, sample: Sample) -> dict[float, bool]:
    """Whether the answer is right, for every share of the frames that is kept."""
    model, processor = load(arguments.model)
    length = sample.inputs["input_ids"].shape[1]
    right = {}
    for ratio in arguments.keep_ratios:
        output = model.generate(**sample.inputs, keep_ratio=ratio, do_sample=False)
        given = processor.batch_decode(output[:, length:], skip_special_tokens=True)[0]
        right[ratio] = matches(sample.question, given, sample.interval)
    return right


def evaluate(arguments: argparse.Namespace, task: str, seed: int) -> dict[float, bool]:
    """`is_right` of the sample of a seed."""
    return is_right(arguments, read_sample(arguments, task, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=str(BUNDLED_CHECKPOINT), help="folder or Hub id; by default the bundled one"
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--num_videos", type=int, default=300, help="videos per task")
    parser.add_argument("--first_seed", type=int, default=0, help="of the test split")
    parser.add_argument("--duration", type=float, default=3600, help="seconds of a video")
    parser.add_argument("--fps", type=float, default=1, help="frame rate of the files")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), help="height and width of the files")
    parser.add_argument("--num_frames", type=int, default=384, help="most frames sampled from a video")
    parser.add_argument("--background", type=Path, nargs="+", help="videos to show behind the needles")
    parser.add_argument("--keep_ratios", type=float, nargs="+", default=[1.0, 0.5, 0.25], help="shares of frames kept")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()

    seeds = range(arguments.first_seed, arguments.first_seed + arguments.num_videos)
    right = {ratio: defaultdict(int) for ratio in arguments.keep_ratios}
    with worker_pool(arguments.workers) as pool:
        jobs = [(task, pool.submit(evaluate, arguments, task, seed)) for seed in seeds for task in arguments.tasks]
        for task, job in tqdm(jobs):
            for ratio, answer_is_right in job.result().items():
                right[ratio][task] += answer_is_right
    results = {
        "num_videos": arguments.num_videos,
        "seconds": arguments.duration,
        "fps": arguments.fps,
        "num_frames": arguments.num_frames,
        "background": [path.name for path in arguments.background or []] or "procedural",
        "accuracy": {
            str(ratio): {task: count / arguments.num_videos for task, count in counts.items()}
            for ratio, counts in right.items()
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.output) as unfinished:
        unfinished.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
