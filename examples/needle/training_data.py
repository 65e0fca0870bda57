"""Writes stills or short videos and their questions, for training and for tests with as many frames each.

    PYTHONPATH=examples python -m needle.training_data videos --output videos --count 12000
    PYTHONPATH=examples python -m needle.training_data test_videos --output test --count 300 --num_frames 32

The records are in `OUTPUT/records/train.jsonl`, the media in `OUTPUT`. They are there when all of it is, and then a
second call does nothing.
"""

import argparse
import json
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mambamia_hf.files import atomic_write

from .plan import TASKS, NeedleVideo
from .questions import multiple_choice, needle_multiple_choice, needle_questions, questions
from .video import needle_image, write_needle_video


NUM_FRAMES = (16, 32, 64, 128)
QUESTIONS_PER_VIDEO = 3
RECORDS = Path("records", "train.jsonl")  # alone in its folder, so that `datasets` can load the folder

Record = dict[str, Any]


def write_still(folder: Path, seed: int) -> list[Record]:
    """Writes a JPEG still and asks one question about it."""
    image, needle = needle_image(seed)
    image.save(folder / f"{seed}.jpg", quality=90)
    rng = random.Random(seed)
    question = needle_multiple_choice(needle, "image", seed)
    asked = (question.prompt, question.answer) if rng.random() < 0.5 else rng.choice(needle_questions(needle, "image"))
    return [make_record("image", f"{seed}.jpg", 1, *asked)]


def write_training_video(folder: Path, seed: int) -> list[Record]:
    """Writes an H.264 file of 16 to 128 frames and asks three questions about it."""
    rng = random.Random(seed)
    num_frames = rng.choice(NUM_FRAMES)
    video = write_spaced_video(folder, seed, rng, num_frames, "train")
    records = []
    for variant in range(QUESTIONS_PER_VIDEO):
        question = multiple_choice(video, QUESTIONS_PER_VIDEO * seed + variant)
        asked = (question.prompt, question.answer)
        if video.task == "retrieval" and rng.random() < 0.3:
            asked = rng.choice(questions(video))
        records.append(make_record("video", f"{seed}.mp4", num_frames, *asked))
    return records


def write_test_video(folder: Path, seed: int, num_frames: int) -> list[Record]:
    """Writes an H.264 file of the test split and asks the question of its task; the record names the task."""
    video = write_spaced_video(folder, seed, random.Random(seed), num_frames, "test")
    question = multiple_choice(video, seed)
    record = make_record("video", f"{seed}.mp4", num_frames, question.prompt, question.answer)
    return [record | {"task": video.task}]


def write_spaced_video(folder: Path, seed: int, rng: random.Random, num_frames: int, split: str) -> NeedleVideo:
    """`SEED.mp4` with frames half a second to ten seconds apart, so that each of them is sampled."""
    seconds = 0.5 * 20 ** rng.random()
    return write_needle_video(
        folder / f"{seed}.mp4",
        seed,
        task=TASKS[seed % len(TASKS)],
        split=split,
        duration=num_frames * seconds,
        fps=1 / seconds,
        num_frames=num_frames,
    )


def make_record(kind: str, path: str, num_frames: int, question: str, answer: str) -> Record:
    """A conversation in LLaVA's format, with the number of frames as its `length` to group samples by."""
    turns = [{"from": "human", "value": f"<{kind}>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": path, kind: path, "length": num_frames, "conversations": turns}


def write_data(folder: Path, write_sample: Callable[[Path, int], list[Record]], count: int) -> None:
    """Writes the samples of seeds 0 to `count - 1` with all cores, then their records."""
    file = folder / RECORDS
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        samples = tqdm(pool.map(partial(write_sample, folder), range(count), chunksize=16), folder.name, count)
        lines = [json.dumps(record) + "\n" for records in samples for record in records]
    with atomic_write(file) as unfinished:
        unfinished.write_text("".join(lines))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("stills", "videos", "test_videos"))
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, required=True, help="stills or videos")
    parser.add_argument("--num_frames", type=int, default=32, help="frames of each test video")
    options = parser.parse_args(arguments)
    write_sample = {
        "stills": write_still,
        "videos": write_training_video,
        "test_videos": partial(write_test_video, num_frames=options.num_frames),
    }
    write_data(options.output, write_sample[options.kind], options.count)


if __name__ == "__main__":
    main()
