"""Requests of mixed length, one after the other: memory, open files and threads have to level off.

    python -m tests.soak --requests 500 --output tests/results/soak.json

A tiny model answers about files, bytes, folders of frames, images and text, alone and in batches, by greedy and beam
search, and meets broken files on the way. What is measured every 20 requests is compared between the middle and the
last third of the run.
"""

import argparse
import gc
import json
import platform
import random
import resource
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from mambamia_hf.inference import encode_video


sys.path += [str(Path(__file__).parent / "helpers")]  # which import each other by their bare names

from tiny_model import ask, tiny_checkpoint
from video_files import draw_number, write_video


SAMPLE_EVERY = 20
# What may be left of one run to the next: an allocator keeps pieces that do not fit what follows.
MEGABYTES = 16


class Requests:
    """Requests of all kinds to one model."""

    def __init__(self, folder: Path, seed: int):
        self.random = random.Random(seed)
        self.folder = folder
        self.model, self.processor = tiny_checkpoint(folder / "model")
        self.model.eval()
        sizes = (10, 40, 90, 200)
        self.videos = [write_video(folder / f"{size}.mp4", num_frames=size, with_sound=size == 40) for size in sizes]
        self.videos += [write_video(folder / "v.avi", codec="mpeg4"), write_video(folder / "v.mkv", key_every=40)]
        self.broken = folder / "broken.mp4"
        self.broken.write_bytes(self.videos[1].read_bytes()[:1500])
        frames = folder / "frames"
        frames.mkdir()
        for number in range(12):
            Image.fromarray(draw_number(number)).save(frames / f"{number}.png")
        self.kinds = [self.file, self.file, self.bytes, self.batch, self.image, self.text, self.broken_file]
        self.kinds += [self.command, self.frames]

    def next(self) -> str:
        """Makes one request and returns its kind."""
        request = self.random.choice(self.kinds)
        request()
        return request.__name__

    def file(self) -> None:
        budget = self.random.choice([{}, {"keep_frames": 3}, {"keep_ratio": 0.5}])
        search = self.random.choice([{}, {"num_beams": 2}])
        length = self.random.randint(1, 12)
        video = self.random.choice(self.videos)
        ask(self.model, self.processor, video, "What is shown? " * length, budget, max_new_tokens=length, **search)

    def bytes(self) -> None:
        content = self.random.choice(self.videos).read_bytes()
        self._generate(text="<|video_pad|>What?", videos=content)

    def batch(self) -> None:
        videos = [str(video) for video in self.random.sample(self.videos, 3)]
        texts = ["<|video_pad|>What?", "<|video_pad|><|video_pad|>Which is longer?"]
        self._generate(text=texts, videos=videos, padding=True)

    def image(self) -> None:
        self._generate(text="<|image_pad|>What?", images=[Image.fromarray(draw_number(7))])

    def text(self) -> None:
        self._generate(text="Hello. " * self.random.randint(1, 40))

    def broken_file(self) -> None:
        try:
            ask(self.model, self.processor, self.broken, "What?")
        except ValueError:
            return
        raise AssertionError("A broken file was read.")

    def command(self) -> None:
        with encode_video(self.folder / "model", self.random.choice(self.videos), num_frames=6) as encoded:
            encoded.ask("What?", 4)

    def frames(self) -> None:
        with encode_video(self.folder / "model", self.folder / "frames", num_frames=6) as encoded:
            encoded.ask("What?", 4)

    def _generate(self, **inputs: Any) -> None:
        batch = self.processor(**inputs, return_tensors="pt")
        self.model.generate(**batch, max_new_tokens=self.random.randint(1, 12), do_sample=False)


def measure() -> dict[str, int]:
    """Memory in megabytes, open files and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "megabytes": pages * resource.getpagesize() >> 20,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "python threads": threading.active_count(),
        "temporary files": sum(1 for _ in Path(tempfile.gettempdir()).glob("tmp*")),
    }


def growth(samples: list[dict[str, int]]) -> dict[str, int]:
    """How much more of everything there is at most in the last third than in the middle one."""
    third = max(len(samples) // 3, 1)
    middle, last = samples[-2 * third : -third], samples[-third:]
    names = last[0].keys() - {"requests"}
    return {name: max(s[name] for s in last) - max(s[name] for s in middle) for name in sorted(names)}


def soak(num_requests: int, seed: int) -> dict[str, Any]:
    """Makes requests and measures."""
    samples, kinds = [], dict[str, int]()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        requests = Requests(Path(folder), seed)
        for number in range(1, num_requests + 1):
            kind = requests.next()
            kinds[kind] = kinds.get(kind, 0) + 1
            if number % SAMPLE_EVERY == 0:
                samples.append({"requests": number, **measure()})
                print(samples[-1], file=sys.stderr, flush=True)
    grown = growth(samples)
    levels_off = grown["megabytes"] <= MEGABYTES and grown["descriptors"] <= 0 and grown["threads"] <= 0
    return {
        "requests": num_requests,
        "seed": seed,
        "kinds": dict(sorted(kinds.items())),
        "growth from the middle third to the last": grown,
        "levels off": levels_off,
        "samples": samples,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Makes many requests of mixed length.")
    parser.add_argument("--requests", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other requests (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file for what was measured")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    result = soak(given.requests, given.seed)
    text = json.dumps(result, indent=1)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n", encoding="utf-8")
    return int(not result["levels off"])


if __name__ == "__main__":
    sys.exit(main())
