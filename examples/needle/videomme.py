"""Writes needle videos and multiple-choice questions in the format of Video-MME, for lmms-eval's own task `videomme`.

    PYTHONPATH=examples python -m needle.videomme --output . --count 9
    HF_HOME=huggingface HF_HUB_OFFLINE=1 python -m lmms_eval --model mambamia --tasks videomme

lmms-eval takes the questions from `lmms-eval/Video-MME` in the working directory, in place of the Hub's, and the
videos from where it would unpack the Hub's.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from mambamia_hf.files import atomic_write

from .questions import task_question
from .video import write_needle_video


QUESTIONS = Path("lmms-eval", "Video-MME", "test.jsonl")
VIDEOS = Path("huggingface", "videomme", "data")

# Video-MME's names of lengths, with seconds; of kinds of questions, by task; and of one of its categories.
DURATIONS = {"short": 64, "medium": 640, "long": 2560}
TASK_TYPES = {"retrieval": "Object Recognition", "ordering": "Temporal Reasoning", "counting": "Counting Problem"}
CATEGORY = {"domain": "Knowledge", "sub_category": "Technology"}
NUM_FRAMES = 32
QUESTIONS_PER_VIDEO = 3


def write_video(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Writes the video of a seed, and returns its three questions."""
    task = list(TASK_TYPES)[seed % len(TASK_TYPES)]
    duration = list(DURATIONS)[seed // len(TASK_TYPES) % len(DURATIONS)]
    seconds, name = DURATIONS[duration], f"needle{seed:05}"
    settings: dict[str, Any] = {"duration": seconds, "fps": NUM_FRAMES / seconds, "num_frames": NUM_FRAMES}
    video = write_needle_video(folder / VIDEOS / f"{name}.mp4", seed, task=task, split="test", **settings)
    questions = []
    for number in range(QUESTIONS_PER_VIDEO):
        question = task_question(video, QUESTIONS_PER_VIDEO * seed + number)
        options = [f"{letter}. {option}." for letter, option in zip("ABCD", question.options, strict=True)]
        questions.append(
            {
                "video_id": f"{seed + 1:03}",
                "duration": duration,
                **CATEGORY,
                "url": "",
                "videoID": name,
                "question_id": f"{seed + 1:03}-{number + 1}",
                "task_type": TASK_TYPES[task],
                "question": question.text,
                "options": options,
                "answer": "ABCD"[question.options.index(question.answer)],
            }
        )
    return questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=12, help="videos, of three questions each")
    options = parser.parse_args()
    for folder in (QUESTIONS.parent, VIDEOS):
        (options.output / folder).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        rows = [row for rows in pool.map(partial(write_video, options.output), range(options.count)) for row in rows]
    with atomic_write(options.output / QUESTIONS) as unfinished:
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
