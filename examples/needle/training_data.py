"""Writes stills, clips or videos and their questions, for training, and videos of one length for tests.

    PYTHONPATH=examples python -m needle.training_data videos --output videos --count 4500
    PYTHONPATH=examples python -m needle.training_data test_videos --output test --count 300 --num_frames 32

The records are in `OUTPUT/records/train.jsonl`, the media in `OUTPUT`. They are there when all of it is, and then a
second call does nothing.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mambamia_hf.files import atomic_write

from .conversations import Asked, ask_about_still, ask_about_video
from .plan import TASKS, NeedleVideo, plan_video
from .questions import accepted_answers, task_question
from .video import needle_image, write_needle_video


NUM_FRAMES = (16, 32)
# Clips are so short that a model soon finds which time belongs to which frame; counting has no room in them.
CLIP_FRAMES = (6, 8)
CLIP_TASKS = ("retrieval", "when", "nothing")
LONG_VIDEO_FRAMES = (16, 32, 64, 128, 256, 384, 384, 384)  # each with the same probability
FIRST_LONG_VIDEO = 100_000  # the seed; no other stage learns from those from here on
CONVERSATIONS_PER_VIDEO = 2
RECORDS = Path("records", "train.jsonl")  # alone in its folder, so that `datasets` can load the folder

Record = dict[str, Any]


def write_still(folder: Path, seed: int) -> list[Record]:
    """Writes a JPEG still and asks one question about it."""
    image, needle = needle_image(seed)
    image.save(folder / f"{seed}.jpg", quality=90)
    return [make_record("image", f"{seed}.jpg", 1, [ask_about_still(needle, random.Random(seed))])]


def write_training_video(
    folder: Path, seed: int, lengths: Sequence[int] = NUM_FRAMES, tasks: Sequence[str] = TASKS
) -> list[Record]:
    """Writes an H.264 file of one of `lengths` frames and asks all about it, in several conversations."""
    rng = random.Random(seed)
    settings = training_video_settings(seed, rng, lengths, tasks)
    video = write_needle_video(folder / f"{seed}.mp4", seed, **settings)
    records = [
        make_record("video", f"{seed}.mp4", video.total_num_frames, ask_about_video(video, rng))
        for _ in range(CONVERSATIONS_PER_VIDEO)
    ]
    return [record | {"task": video.task} for record in records]


def write_test_video(folder: Path, seed: int, num_frames: int, tasks: Sequence[str]) -> list[Record]:
    """Writes an H.264 file of the test split and asks the question of its task, one of `tasks` in turn.

    `answers` of the record are those that count as right.
    """
    settings = spaced_video(seed, random.Random(seed), num_frames, "test", tasks)
    video = write_needle_video(folder / f"{seed}.mp4", seed, **settings)
    question = task_question(video, seed)
    record = make_record("video", f"{seed}.mp4", num_frames, [Asked(video.task, question.prompt, question.answer)])
    return [record | {"task": video.task, "answers": accepted_answers(question, video.duration / num_frames)}]


def plan_long_video(seed: int) -> NeedleVideo:
    """The plan of a long video for training."""
    return plan_video(seed, **training_video_settings(seed, random.Random(seed), LONG_VIDEO_FRAMES, TASKS))


def training_video_settings(
    seed: int, rng: random.Random, lengths: Sequence[int], tasks: Sequence[str]
) -> dict[str, Any]:
    """Settings of a video of one of `lengths` frames."""
    return spaced_video(seed, rng, rng.choice(lengths), "train", tasks)


def spaced_video(seed: int, rng: random.Random, num_frames: int, split: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Settings, as `plan_video` and `write_needle_video` take them, of a video of up to an hour, with frames half a
    second or more apart, so that each is sampled."""
    shortest, longest = 0.5, 3600 / num_frames
    seconds = round(4 * shortest * (longest / shortest) ** rng.random()) / 4  # H.264 has no rate for any number
    return {
        "task": tasks[seed % len(tasks)],
        "split": split,
        "duration": num_frames * seconds,
        "fps": 1 / seconds,
        "num_frames": num_frames,
    }


def make_record(medium: str, path: str, num_frames: int, asked: Sequence[Asked]) -> Record:
    """A conversation in LLaVA's format, with the number of frames as its `length` to group samples by.

    `kinds` says what is asked, turn by turn.
    """
    turns = [
        {"from": speaker, "value": text}
        for one in asked
        for speaker, text in (("human", one.question), ("gpt", one.answer))
    ]
    turns[0]["value"] = f"<{medium}>\n{turns[0]['value']}"
    kinds = [one.kind for one in asked]
    return {"id": path, medium: path, "length": num_frames, "conversations": turns, "kinds": kinds}


def write_data(folder: Path, write_sample: Callable[[Path, int], list[Record]], seeds: range) -> None:
    """Writes the samples of seeds with all cores, then their records."""
    file = folder / RECORDS
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        samples = tqdm(pool.map(partial(write_sample, folder), seeds, chunksize=16), folder.name, len(seeds))
        lines = [json.dumps(record) + "\n" for records in samples for record in records]
    with atomic_write(file) as unfinished:
        unfinished.write_text("".join(lines))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("stills", "clips", "videos", "long_videos", "test_videos"))
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, required=True, help="stills, clips or videos")
    parser.add_argument("--num_frames", type=int, default=32, help="frames of each test video")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="those of the test videos")
    options = parser.parse_args(arguments)
    write_sample = {
        "stills": write_still,
        "clips": partial(write_training_video, lengths=CLIP_FRAMES, tasks=CLIP_TASKS),
        "videos": write_training_video,
        "long_videos": partial(write_training_video, lengths=LONG_VIDEO_FRAMES),
        "test_videos": partial(write_test_video, num_frames=options.num_frames, tasks=options.tasks),
    }
    first = FIRST_LONG_VIDEO if options.kind == "long_videos" else 0
    write_data(options.output, write_sample[options.kind], range(first, first + options.count))


if __name__ == "__main__":
    main()
