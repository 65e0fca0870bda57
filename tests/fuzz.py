"""Damaged video files: no crash, no hang, one sentence where one cannot be read, no wrong picture without a warning.

    python -m tests.fuzz --files 1000 --seed 0 --output tests/results/fuzz.json

Small videos of several codecs and containers, whose pictures show their numbers, are damaged at random and read in
three ways, in a process of their own. What is read without a warning is compared with the intact video and with what
FFmpeg alone makes of the damaged file. A failure is made as small as it gets and written to a folder; the same seed
gives the same files.
"""

import argparse
import json
import multiprocessing
import platform
import random
import resource
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
from tests.helpers.video_files import draw_number, read_number, write_video

from mambamia_hf.video_decoding import VideoReader


NUM_FRAMES, FPS = 40, 10
SECONDS_PER_FILE = 180  # on a busy machine
MESSAGE_CHARACTERS = 600
# Mean difference of grey levels from which on a person sees that a picture is wrong.
VISIBLE = 12

X264 = {"preset": "veryfast", "sc_threshold": "0"}
X265 = {"preset": "ultrafast"}
# Codec, its options, and the containers and their options.
SOURCES: list[tuple[str, dict[str, str], str, dict[str, str]]] = [
    *(("libx264", {**X264, "bf": "2"}, suffix, {}) for suffix in ("mp4", "mov", "mkv", "ts", "flv", "avi", "mpg")),
    *(("libx264", {**X264, "bf": "0"}, suffix, {}) for suffix in ("mp4", "ts", "flv", "h264")),
    ("libx264", {**X264, "bf": "2"}, "mp4", {"movflags": "faststart"}),
    ("libx264", {**X264, "bf": "2"}, "mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ("libx264", {**X264, "bf": "2", "x264-params": "open-gop=1"}, "mkv", {}),
    ("libx264", {**X264, "bf": "0", "x264-params": "intra-refresh=1"}, "ts", {}),
    *(("libx265", {**X265, "x265-params": "log-level=none:pools=1:bframes=3"}, s, {}) for s in ("mp4", "mkv", "ts")),
    ("libvpx", {"deadline": "realtime", "cpu-used": "8"}, "webm", {}),
    ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, "webm", {}),
    ("mpeg2video", {"bf": "2"}, "ts", {}),
    ("mpeg2video", {"bf": "2"}, "mpg", {}),
    ("mpeg2video", {"bf": "0"}, "mxf", {}),
    ("mpeg4", {"bf": "0"}, "avi", {}),
    ("mpeg4", {"bf": "2"}, "mp4", {}),
    ("wmv2", {}, "asf", {}),
    ("flv", {}, "flv", {}),
    ("huffyuv", {}, "nut", {}),
]
FAILURES = ("crash", "hang", "error", "other picture")

PlainFrame = tuple[np.ndarray, float | None, bool]  # picture, time, whether FFmpeg knows that it is damaged


@dataclass
class Source:
    """An intact video: its content, what it shows, and how it was made."""

    name: str
    suffix: str
    content: bytes
    pictures: np.ndarray


@dataclass
class Edit:
    """One change of a file's bytes: those from `start` to `stop` become `new`."""

    what: str
    start: int
    stop: int
    new: bytes

    def apply(self, content: bytes) -> bytes:
        return content[: self.start] + self.new + content[self.stop :]


@dataclass
class Result:
    """What reading one damaged file gave: counts of outcomes, and what was wrong."""

    outcomes: Counter = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind and description

    @property
    def failure(self) -> str | None:
        return next((kind for kind, _ in self.problems if kind in FAILURES), None)


def make_source(index: int, folder: Path) -> Source | None:
    """A video of the kind `index`; None where this FFmpeg cannot make it."""
    codec, options, suffix, container_options = SOURCES[index % len(SOURCES)]
    path = folder / f"source.{suffix}"
    try:
        write_video(
            path,
            NUM_FRAMES,
            FPS,
            codec=codec,
            codec_options=options,
            container_options=container_options,
            with_sound=suffix in ("mp4", "mkv") and index % 2 == 0,
            images=[draw_number(number) for number in range(NUM_FRAMES)],
        )
        pictures = np.stack([picture for picture, _, _ in plain_frames(path)])
    except (av.FFmpegError, ValueError, OverflowError):
        return None
    extra = "".join(f" {value}" for value in (*options.values(), *container_options.values()) if not value.isdigit())
    return Source(f"{codec} in {suffix}{extra}", suffix, path.read_bytes(), pictures)


def plain_frames(path: Path) -> Iterator[PlainFrame]:
    """The pictures that FFmpeg alone gives from the start on, their times, and whether it knows that they are damaged.

    All have the size that the file states.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        size = {"width": stream.codec_context.width or None, "height": stream.codec_context.height or None}
        stream.thread_count = 1  # VP8 notices less of the damage in several threads, or other
        for packet in container.demux(video=0):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            for frame in frames:
                yield frame.reformat(**size, format="rgb24").to_ndarray(), frame.time, bool(frame.is_corrupt)


def random_edit(random: random.Random, content: bytes, other: bytes) -> Edit:
    """One damage, as disks, networks and cameras without power do."""
    size = len(content)
    start = random.randrange(size) if random.random() < 0.8 else random.randrange(min(size, 600))  # headers
    length = min(random.choice((1, 4, 16, 64, 188, 512, 2048)), size - start)
    match random.choice(("bit", "bit", "bit", "bytes", "zeros", "lost", "twice", "cut", "joined")):
        case "bit":
            return Edit("bit", start, start + 1, bytes([content[start] ^ 1 << random.randrange(8)]))
        case "bytes":
            return Edit("bytes", start, start + length, random.randbytes(length))
        case "zeros":
            return Edit("zeros", start, start + length, bytes(length))
        case "lost":
            return Edit("lost", start, start + length, b"")
        case "twice":
            return Edit("twice", start, start, content[start : start + length])
        case "cut":
            return Edit("cut", start, size, b"")
        case _:
            return Edit("joined", size, size, other[random.randrange(len(other)) :])


def random_edits(random: random.Random, source: Source, other: Source) -> list[Edit]:
    edits: list[Edit] = []
    content = source.content
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if content:
            edits.append(random_edit(random, content, other.content))
            content = edits[-1].apply(content)
    return edits


def damaged(source: Source, edits: list[Edit]) -> bytes:
    content = source.content
    for edit in edits:
        content = edit.apply(content)
    return content


def read_all(path: Path) -> tuple[np.ndarray, list[int], list[float]]:
    with VideoReader(path) as reader:
        batch = reader.frames_at(range(len(reader)))
    return batch.data.numpy(), batch.indices, batch.timestamps


def read_some(path: Path) -> tuple[np.ndarray, list[int], list[float]]:
    with VideoReader(path) as reader:
        batch = reader.frames_at(np.linspace(0, len(reader) - 1, 6).astype(int))
    return batch.data.numpy(), batch.indices, batch.timestamps


def read_keys(path: Path) -> tuple[np.ndarray, list[int], list[float]]:
    with VideoReader(path, seek_mode="keyframe") as reader:
        batch = reader.frames_at(np.linspace(0, len(reader) - 1, 3).astype(int))
    return batch.data.numpy(), batch.indices, batch.timestamps


WAYS: dict[str, Callable[[Path], tuple[np.ndarray, list[int], list[float]]]] = {
    "all frames": read_all,
    "six frames": read_some,
    "key frames": read_keys,
}


def check(path: Path, source: Source) -> Result:
    """Reads a damaged file in every way and compares."""
    result = Result()
    plain: list[PlainFrame] | None = None
    for way, read in WAYS.items():
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pictures, indices, times = read(path)
        except ValueError as error:
            result.outcomes["refused"] += 1
            message = str(error)
            if len(message) > MESSAGE_CHARACTERS or not message.isprintable():
                result.problems.append(("error", f"{way}: a message of {len(message)} characters: {message[:200]!r}"))
            continue
        except Exception as error:  # every other kind is a failure, whatever it is
            result.problems.append(("error", f"{way}: {error!r}"[:300]))
            continue
        if caught:
            result.outcomes["read with a warning"] += 1
            continue
        result.outcomes["read without a warning"] += 1
        if plain is None:
            try:
                plain = list(plain_frames(path))
            except (av.FFmpegError, IndexError, ValueError):
                plain = []
        _compare(way, pictures.transpose(0, 2, 3, 1), indices, times, source, plain, result)
    return result


def _compare(
    way: str,
    pictures: np.ndarray,
    indices: list[int],
    times: list[float],
    source: Source,
    plain: list[PlainFrame],
    result: Result,
) -> None:
    """Adds what is wrong with frames that came without a warning."""
    shifts = set()
    for picture, index, time in zip(pictures, indices, times, strict=True):
        result.outcomes["pictures without a warning"] += 1
        number = read_number(picture.transpose(2, 0, 1))
        is_known = number < len(source.pictures) and not _differ(picture, source.pictures[number])
        if is_known:
            shifts.add(round(time * FPS) - number)
        if is_known and number == index:
            continue
        alone, _, alone_knows = plain[index] if index < len(plain) else (None, None, False)
        alone_is_right = alone is not None and index < len(source.pictures)
        alone_is_right = alone_is_right and not _differ(alone, source.pictures[index])
        if alone_is_right and not any(not _differ(picture, other) for other in _shown_at(time, plain)):
            result.problems.append(("other picture", f"{way}: frame {index} is wrong, and right by FFmpeg alone"))
        elif not is_known:
            kind = "other picture" if alone_knows else "unnoticed picture"
            known = " as FFmpeg knows" if alone_knows else ""
            result.problems.append((kind, f"{way}: frame {index} is damaged{known}"))
    if len(shifts) > 1:
        result.problems.append(("unnoticed time", f"{way}: times are off by {sorted(shifts)} frames"))


def _shown_at(time: float, plain: list[PlainFrame]) -> list[np.ndarray]:
    """What FFmpeg alone gives at this time: of a damaged file also where it counts other frames before it."""
    times = [start for _, start, _ in plain if start is not None]
    return [picture for picture, at, _ in plain if at is not None and abs(at - min(times) - time) < 0.5 / FPS]


def _differ(picture: np.ndarray, other: np.ndarray) -> bool:
    if picture.shape != other.shape:  # a flipped bit in the shape of pixels stretches pictures, as players do
        rows, columns = (np.arange(new) * old // new for old, new in zip(picture.shape, other.shape[:2], strict=False))
        picture = picture[rows][:, columns]
    return bool(np.abs(picture.astype(np.int16) - other).mean() > VISIBLE)


def _serve(connection: Connection) -> None:
    """Checks files until there are no more; a process of its own, which may crash."""
    av.logging.set_level(av.logging.PANIC)
    while (task := connection.recv()) is not None:
        result = check(*task)
        connection.send((result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


class Checker:
    """Runs `check` in a process of its own, and says when that crashes or hangs."""

    def __init__(self) -> None:
        self.peak_kilobytes = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def check(self, path: Path, source: Source) -> Result:
        self._connection.send((path, source))
        try:
            if self._connection.poll(SECONDS_PER_FILE):
                result, peak = self._connection.recv()
                self.peak_kilobytes = max(self.peak_kilobytes, peak)
                return result
            kind = "hang"
        except EOFError:
            kind = "crash"
        self._process.kill()
        self._process.join()
        code = self._process.exitcode
        self._start()
        return Result(problems=[(kind, f"exit code {code}")])

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def minimised(checker: Checker, source: Source, edits: list[Edit], kind: str, path: Path) -> list[Edit]:
    """Edits without those that the failure does not need."""
    for edit in list(edits):
        fewer = [other for other in edits if other is not edit]
        path.write_bytes(damaged(source, fewer))
        if fewer and checker.check(path, source).failure == kind:
            edits = fewer
    return edits


def fuzz(num_files: int, seed: int, failures: Path) -> dict[str, Any]:
    """Reads damaged files; writes those that fail to `failures`.

    Returns:
        The counts, as they go into the results.
    """
    outcomes, kinds, unnoticed, examples = Counter[str](), Counter[str](), Counter[str](), []
    checker = Checker()
    with tempfile.TemporaryDirectory() as folder:
        made = (make_source(index, Path(folder)) for index in range(len(SOURCES)))
        sources = [source for source in made if source is not None]
        for number in range(num_files):
            chance = random.Random(f"{seed} {number}")
            source, other = chance.choice(sources), chance.choice(sources)
            edits = random_edits(chance, source, other)
            path = Path(folder, f"damaged.{source.suffix}")
            path.write_bytes(damaged(source, edits))
            result = checker.check(path, source)
            outcomes += result.outcomes
            kinds.update({kind for kind, _ in result.problems})
            if result.problems and result.failure is None:
                unnoticed[source.name] += 1
            if result.failure is not None:
                edits = minimised(checker, source, edits, result.failure, path)
                failures.mkdir(parents=True, exist_ok=True)
                kept = failures / f"{result.failure.replace(' ', '_')}_{seed}_{number}.{source.suffix}"
                kept.write_bytes(damaged(source, edits))
                places = [f"{edit.what} at {edit.start} to {edit.stop}" for edit in edits]
                about = next(text for kind, text in result.problems if kind == result.failure)
                examples.append({"file": kept.name, "source": source.name, "damage": places, "problem": about})
                print(f"{kept}: {source.name}: {about}", file=sys.stderr)
    checker.close()
    return {
        "files": num_files,
        "seed": seed,
        "sources": [source.name for source in sources],
        "readings": dict(sorted(outcomes.items())),
        "failures": {kind: kinds[kind] for kind in FAILURES},
        "files with a damaged picture that FFmpeg does not know of": kinds["unnoticed picture"],
        "files with times that nothing contradicts": kinds["unnoticed time"],
        "these files by source": dict(unnoticed.most_common()),
        "examples": examples,
        "peak_megabytes": checker.peak_kilobytes // 1024,
        "versions": {
            "python": platform.python_version(),
            "av": av.__version__,
            "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Reads damaged video files.")
    parser.add_argument("--files", type=int, default=1000, help="how many damaged files (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other files (default: 0)")
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"), help="folder for files that fail")
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    given = parser.parse_args()
    counts = fuzz(given.files, given.seed, given.failures)
    text = json.dumps(counts, indent=1)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n", encoding="utf-8")
    return int(any(counts["failures"].values()))


if __name__ == "__main__":
    sys.exit(main())
