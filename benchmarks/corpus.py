"""Throughput of `examples/corpus` with two workers, beside `mambamia encode`, one process, on the same videos.

PYTHONPATH=examples python -m needle.generate --output videos --num_videos 20 --duration 300 --split test
python benchmarks/corpus.py videos

The process runs twice: with one thread, as each worker has, and with one per core, as it starts by default. They take
turns. Videos per second count from the first memory to the last; the time until the first, mostly imports and Ray's
start, stands beside. A second call of Ray finds everything there.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from measure import report

from mambamia_hf.inputs import MEMORY_SUFFIX


EXAMPLES = Path(__file__).parents[1] / "examples"


class Run(NamedTuple):
    """A command that encodes all videos."""

    start: float  # seconds until the first memory
    rate: float  # videos per second from there on
    total: float  # seconds


def seconds_of(command: list[str], **environment: str) -> float:
    begin = time.time()
    search = f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "PYTHONPATH": search, **environment},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.time() - begin


def timed(command: list[str], folder: Path, **environment: str) -> Run:
    begin = time.time()
    total = seconds_of([*command, "-o", str(folder)], **environment)
    written = sorted(path.stat().st_mtime for path in folder.rglob(f"*{MEMORY_SUFFIX}"))
    return Run(written[0] - begin, (len(written) - 1) / (written[-1] - written[0]), total)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, help="a folder of videos")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    files = sorted(map(str, arguments.videos.glob("*.mp4")))
    alone = ["mambamia_hf", "encode", *files]
    ray = ["corpus.encode", str(arguments.videos), "--workers", str(arguments.workers)]
    contestants = {
        "mambamia encode, 1 thread": (alone, {"OMP_NUM_THREADS": "1"}),
        "mambamia encode, a thread per core": (alone, {}),
        f"corpus.encode, {arguments.workers} workers of 1 thread": (ray, {}),
    }
    runs = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for name, (command, environment) in contestants.items():
                runs[name].append(timed(command, Path(folder, f"{name} {number}"), **environment))
        again = seconds_of([*ray, "-o", str(Path(folder, f"{name} {number}"))])
    medians = {name: Run(*map(statistics.median, zip(*times, strict=True))) for name, times in runs.items()}
    one = medians["mambamia encode, 1 thread"]
    rows = [
        {
            "who": name,
            "videos": len(files),
            "seconds to the first": run.start,
            "videos per second": run.rate,
            "times one process": run.rate / one.rate,
            "seconds in all": run.total,
        }
        for name, run in medians.items()
    ]
    rows.append({"who": "corpus.encode again, all there", "videos": len(files), "seconds in all": again})
    report("corpus", rows)


if __name__ == "__main__":
    main()
