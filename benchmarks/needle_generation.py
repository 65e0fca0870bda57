"""How long it takes to make needle videos, and how large they get: an hour of several sizes and rates, and a minute.

PYTHONPATH=examples python benchmarks/needle_generation.py
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import bars, report
from needle.plan import TASKS
from needle.video import write_needle_video


RUNS = 5
SETTINGS = {
    "64 s, 128x128, 2 fps": {"duration": 64.0, "size": (128, 128), "fps": 2.0},
    "1 h, 128x128, 2 fps": {"duration": 3600.0, "size": (128, 128), "fps": 2.0},
    "1 h, 128x128, 30 fps": {"duration": 3600.0, "size": (128, 128), "fps": 30.0},
    "1 h, 320x240, 10 fps": {"duration": 3600.0, "size": (240, 320), "fps": 10.0},
    "1 h, 640x480, 2 fps": {"duration": 3600.0, "size": (480, 640), "fps": 2.0},
    "1 h, 640x480, 30 fps": {"duration": 3600.0, "size": (480, 640), "fps": 30.0},
}


def measure(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Over as many videos as there are runs, no two of the same seed."""
    seconds, sizes = [], []
    for seed in range(RUNS):
        start = time.perf_counter()
        video = write_needle_video(folder / "video.mp4", seed, task=TASKS[seed % len(TASKS)], **settings)
        seconds.append(time.perf_counter() - start)
        sizes.append(video.path.stat().st_size / 1e6)
    return {
        "frames": video.total_num_frames,
        "seconds": statistics.median(seconds),
        "longest": max(seconds),
        "MB": statistics.median(sizes),
        "largest": max(sizes),
    }


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = folder / "clip.mp4"
        write_needle_video(clip, 1_000, duration=30.0, fps=30.0, size=(480, 640))
        behind = {"1 h, 640x480, 30 fps, over a clip": {**SETTINGS["1 h, 640x480, 30 fps"], "background": clip}}
        rows = [{"video": video, **measure(folder, settings)} for video, settings in (SETTINGS | behind).items()]
    report("needle_generation", rows)
    bars("needle_generation", "seconds", {row["video"]: row["seconds"] for row in rows})


if __name__ == "__main__":
    main()
