"""Writes a data set of the needle benchmark: H.264 files, and `records.jsonl` with questions and ground truth.

    PYTHONPATH=examples python -m needle.generate --output needles --num_videos 100 --duration 3600 --split test

Every record is a conversation in LLaVA's format, ready for `python -m mambamia_hf.training`, with the options, the
answer and the needles beside it. A second call continues where the first one stopped.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mambamia_hf.files import atomic_write

from .plan import SPLITS, TASKS
from .questions import task_question
from .video import write_needle_video


Record = dict[str, Any]


def write_sample(folder: Path, task: str, seed: int, settings: dict[str, Any]) -> Record:
    """Writes one video and returns its record."""
    torch.set_num_threads(1)
    name = f"{task}_{settings['split']}_{seed}"
    video = write_needle_video(folder / f"{name}.mp4", seed, task=task, **settings)
    question = task_question(video, seed)
    return {
        "id": name,
        "video": f"{name}.mp4",
        "conversations": [
            {"from": "human", "value": f"<video>\n{question.prompt}"},
            {"from": "gpt", "value": question.answer},
        ],
        "task": task,
        "options": question.options,
        "answer": question.answer,
        "seed": seed,
        "needles": [asdict(needle) for needle in video.needles],
        "settings": settings,
    }


def read_records(file: Path) -> dict[str, Record]:
    """The records of an earlier call by their ids; a line that was cut off does not count."""
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["id"]: record for record in records if (file.parent / record["video"]).is_file()}


def write_records(file: Path, records: dict[str, Record]) -> None:
    with atomic_write(file) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records.values()))


def planned_samples(arguments: argparse.Namespace) -> dict[str, tuple[str, int, dict[str, Any]]]:
    """Task, seed and settings of every video, by the ids of their records."""
    names = ("split", "duration", "fps", "size", "num_frames", "needle_seconds")
    settings = {name: getattr(arguments, name) for name in names}
    clips = arguments.background or [None]
    return {
        f"{task}_{arguments.split}_{seed}": (task, seed, {**settings, "background": clips[seed % len(clips)]})
        for task in arguments.task
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.num_videos)
    }


def generate(arguments: argparse.Namespace) -> None:
    wanted = planned_samples(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "records.jsonl"
    records = read_records(file)
    for name, (_, _, settings) in wanted.items():
        if name in records and records[name]["settings"] != settings:
            raise ValueError(f"{file} has {name} with other settings; give the same ones or another output folder.")
    write_records(file, records)

    missing = [name for name in wanted if name not in records]
    with (
        ProcessPoolExecutor(arguments.workers) as pool,
        open(file, "a") as lines,
        tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="video") as bar,
    ):
        jobs = [pool.submit(write_sample, arguments.output, *wanted[name]) for name in missing]
        try:
            for job in as_completed(jobs):
                record = job.result()
                records[record["id"]] = record
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    # Sorted, so that it does not matter which video was finished first.
    others = {name: record for name, record in records.items() if name not in wanted}
    write_records(file, others | {name: records[name] for name in wanted})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--num_videos", type=int, default=100, help="videos per task")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--first_seed", type=int, default=0, help="seed of the first video; the next ones count up")
    parser.add_argument("--duration", type=float, default=3600, help="seconds of a video")
    parser.add_argument("--fps", type=float, default=2, help="frame rate of the files")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 128], help="height and width of the files")
    parser.add_argument("--num_frames", type=int, default=384, help="most frames that a model samples from a video")
    parser.add_argument(
        "--needle_seconds", type=float, help="how long a needle is shown; by default as sampling needs it"
    )
    parser.add_argument(
        "--background", nargs="+", metavar="CLIP", help="videos to show behind the needles, instead of textures"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    try:
        generate(parser.parse_args(arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
