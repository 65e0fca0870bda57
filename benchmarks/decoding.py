"""From a file to the sampled frames at the model's size, beside other readers: time, memory, and which are right.

python benchmarks/decoding.py [CLIP] [--files hour short ...] [--folder FOLDER] [--reader_runs N]

Needs the `ffmpeg` program and `pip install torchcodec`; decord takes part where it is installed. The files are made
from CLIP, or else from a test pattern: the hour and the short clip by copying its stream, the others by coding a
minute of it anew and repeating that. `--files` measures some of them and leaves the results of the others as they are;
`--folder` keeps the files for the next time. Only the hour is given to all readers.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from matplotlib.figure import Figure
from measure import RESULTS, machine, peak_rss, report, restart_peak
from torchcodec.decoders import VideoDecoder
from transformers.image_utils import SizeDict
from transformers.video_utils import load_video

from mambamia_hf import MambaMiaVideoProcessor
from mambamia_hf.video_decoding import decode_video


# Name, what it is, length in seconds, frames sampled, how it is coded.
H264 = "-c:v libx264 -preset veryfast"
FILES = {
    "hour": ("hour.mp4", "1 h, 640x480 H.264", 3600, 384, ""),
    "short": ("short.mp4", "20 s, 640x480 H.264", 20, 40, ""),
    "1080p": ("1080p.mp4", "10 min, 1920x1080 H.264", 600, 128, f"-vf scale=1920:1080 {H264} -g 60"),
    "long": ("long.mp4", "10 min, a key frame in 10 s", 600, 128, f"{H264} -g 300 -keyint_min 300 -sc_threshold 0"),
    "hevc": ("hevc.mp4", "10 min, HEVC", 600, 128, "-c:v libx265 -preset veryfast -g 60"),
    "vp9": ("vp9.webm", "10 min, VP9", 600, 128, "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 800k -g 60"),
    "av1": ("av1.mp4", "10 min, AV1", 600, 128, "-c:v libsvtav1 -preset 10 -crf 40 -g 60"),
}
EXACT, KEY_FRAMES, READER = "ours, exact", "ours, key frames", "Transformers, PyAV"
SIZE = 384
RUNS = 5

resize = functools.partial(
    MambaMiaVideoProcessor().resize,
    size=SizeDict(height=SIZE, width=SIZE),
    resample=MambaMiaVideoProcessor.resample,
)


def ffmpeg(*arguments: str | Path):
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True)


def make_file(key: str, clip: Path | None, folder: Path) -> Path:
    name, _, seconds, _, codec = FILES[key]
    path, pattern, minute = folder / name, folder / "pattern.mp4", folder / f"minute_{name}"
    if path.exists():
        return path
    if clip is None:
        clip = pattern
        picture = "testsrc2=size=640x480:rate=30:duration=25,noise=alls=12:allf=t"
        ffmpeg("-f", "lavfi", "-i", picture, *"-c:v libx264 -pix_fmt yuv420p -g 30".split(), clip)
    if codec:
        ffmpeg("-stream_loop", -1, "-i", clip, "-t", 60, "-an", *codec.split(), minute)
        clip = minute
    ffmpeg("-stream_loop", -1, "-i", clip, "-t", seconds, "-an", "-c", "copy", path)
    return path


def ours(path: Path, indices: np.ndarray, **kwargs) -> tuple[torch.Tensor, list[int]]:
    frames, metadata = decode_video(path, lambda metadata: indices, resize, **kwargs)
    return frames, metadata.frames_indices


def one_thread(path: Path, indices: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return ours(path, indices)
    finally:
        torch.set_num_threads(threads)


def transformers_reader(backend: str, path: Path, indices: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    video, _ = load_video(str(path), sample_indices_fn=lambda metadata, **kwargs: indices, backend=backend)
    frames = torch.as_tensor(video)
    frames = frames.permute(0, 3, 1, 2) if frames.shape[-1] == 3 else frames
    return torch.stack([resize(frame) for frame in frames]), indices.tolist()


def torchcodec(path: Path, indices: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    frames = VideoDecoder(path, seek_mode="exact").get_frames_at(indices.tolist()).data
    return torch.stack([resize(frame) for frame in frames]), indices.tolist()


def seek_loop(path: Path, indices: np.ndarray) -> tuple[torch.Tensor, list[int]]:
    """What one writes by hand: seeks before each time, decodes up to it."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        first = stream.start_time or 0
        for index in indices:
            wanted = first + round(index / stream.average_rate / stream.time_base)
            container.seek(wanted, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts >= wanted - 1)
            image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
            frames.append(resize(image))
    return torch.stack(frames), indices.tolist()


def contestants(key: str) -> dict[str, Callable[[Path, np.ndarray], tuple[torch.Tensor, list[int]]]]:
    named = {
        EXACT: ours,
        KEY_FRAMES: functools.partial(ours, seek_mode="keyframe"),
        "torchcodec, exact": torchcodec,
        "PyAV seek loop": seek_loop,
        READER: functools.partial(transformers_reader, "pyav"),
    }
    if key == "hour":
        named["ours, exact, one thread"] = one_thread
        if importlib.util.find_spec("decord"):
            named["Transformers, decord"] = functools.partial(transformers_reader, "decord")
    return named


def right_frames(frames: torch.Tensor, expected: torch.Tensor) -> int:
    """How many frames are those expected, up to the rounding of different colour conversions."""
    pairs = zip(frames, expected, strict=True)
    return sum((frame.float() - other.float()).abs().mean().item() < 1.5 for frame, other in pairs)


def measure_file(key: str, path: Path, source: str, reader_runs: int) -> list[dict]:
    _, label, _, num_frames, _ = FILES[key]
    sample = functools.partial(MambaMiaVideoProcessor().sample_frames, num_frames=num_frames)
    _, metadata = decode_video(path, lambda metadata: sample(metadata)[:1])  # also brings the file into memory
    indices = sample(metadata)
    named = contestants(key)
    seconds, peaks = {name: [] for name in named}, {name: [] for name in named}
    results = {}
    for run in range(RUNS):
        for name, contestant in named.items():
            if name == READER and run >= reader_runs:
                continue
            before = restart_peak()
            start = time.perf_counter()
            frames, numbers = contestant(path, indices)
            seconds[name].append(time.perf_counter() - start)
            peaks[name].append(peak_rss() - before)
            if run == 0:
                results[name] = frames, numbers
            del frames
    rows = []
    expected = results[READER][0]
    for name, (frames, numbers) in results.items():
        # Key frames are held against an exact decoding of the frames that they say they are.
        truth = ours(path, np.array(numbers))[0] if name == KEY_FRAMES else expected
        median = statistics.median(seconds[name])
        rows.append(
            {
                "key": key,
                "file": label,
                "source": source,
                "who": name,
                "runs": len(seconds[name]),
                "seconds": median,
                "times the PyAV reader's speed": statistics.median(seconds[READER]) / median,
                "peak MB above before": statistics.median(peaks[name]) / 1e6,
                "frames": len(frames),
                "right frames": right_frames(frames, truth),
                "different frames": len(set(numbers)),
            }
        )
    return rows


def draw(rows: list[dict]):
    labels = list(dict.fromkeys(row["file"] for row in rows))
    names = list(dict.fromkeys(row["who"] for row in rows))
    figure = Figure(figsize=(9, 1 + 1.3 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        own = [row for row in rows if row["who"] == name]
        heights = [labels.index(row["file"]) + (place - len(names) / 2 + 0.5) * 0.09 for row in own]
        axes.barh(heights, [row["seconds"] for row in own], height=0.08, label=name)
    axes.set(xscale="log", xlabel="seconds to the sampled frames, 384 x 384")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(RESULTS / "decoding.png", dpi=120)


def results_so_far() -> list[dict]:
    """The rows of an earlier run, if it was on the same machine."""
    path = RESULTS / "decoding.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    return results["rows"] if results.get("machine") == machine() else []


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("clip", nargs="?", type=Path, help="a video to make the files from")
    parser.add_argument("--files", nargs="+", choices=FILES, default=list(FILES), help="what to measure")
    parser.add_argument("--folder", type=Path, help="where to keep the files")
    parser.add_argument("--reader_runs", type=int, default=RUNS, help="how often the slow PyAV reader runs")
    arguments = parser.parse_args()
    source = arguments.clip.name if arguments.clip else "test pattern"

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        paths = {key: make_file(key, arguments.clip, folder) for key in arguments.files}
        warm_up = make_file("short", arguments.clip, folder)
        for contestant in contestants("hour").values():
            contestant(warm_up, np.arange(0, 90, 30))
        rows = [row for row in results_so_far() if row["key"] not in paths]
        for key, path in paths.items():
            rows += measure_file(key, path, source, arguments.reader_runs)
    rows.sort(key=lambda row: list(FILES).index(row["key"]))
    report("decoding", rows)
    draw(rows)


if __name__ == "__main__":
    main()
