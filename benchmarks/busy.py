"""On a busy machine: the time with one busy process per core over the time on the machine as it is. A fair share is 2.

python benchmarks/busy.py
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from compressor import FULL_SIZE, spatial_block
from measure import report
from scan import inputs, ours

from mambamia_hf import MambaMiaCompressorConfig
from mambamia_hf.cli.demo import VIDEO


@contextmanager
def busy_cores() -> Iterator[None]:
    """One process per core that never rests."""
    count = len(os.sched_getaffinity(0))
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)  # they have started
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds_of(contestant: Callable[[], object], runs: int) -> list[float]:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        contestant()
        seconds.append(time.perf_counter() - start)
    return seconds


def parts() -> dict[str, Callable[[], object]]:
    """Of the model, in this process."""
    cases = {"scan, 16 heads, 9,600 tokens": inputs(9_600), "scan, 96 heads, 2,400 tokens": inputs(2_400, heads=96)}
    scans = {name: lambda tensors=tensors: ours(tensors) for name, tensors in cases.items()}
    config = MambaMiaCompressorConfig(**FULL_SIZE)
    layer, hidden_states = spatial_block(config), torch.randn(1, 1_200, config.hidden_size)
    return {**scans, "block, full width, 1,200 tokens": lambda: layer(hidden_states)}


def programs(folder: str) -> dict[str, Callable[[], object]]:
    """The command line, from its start to its end."""
    command_lines = {
        "mambamia demo": ["demo", "--output", folder],
        "mambamia ask": ["ask", str(VIDEO), "What shape appears in the video?"],
    }

    def run(arguments: list[str]):
        subprocess.run([sys.executable, "-m", "mambamia_hf", *arguments], check=True, capture_output=True)

    return {name: lambda arguments=arguments: run(arguments) for name, arguments in command_lines.items()}


@torch.no_grad()
def main(rounds: int = 3):
    with tempfile.TemporaryDirectory() as folder:
        runs_of = {contestant: 5 for contestant in parts().items()} | {one: 1 for one in programs(folder).items()}
        for _, contestant in runs_of:
            contestant()  # what libraries set up once does not count
        quiet, busy = ({name: [] for name, _ in runs_of} for _ in range(2))
        for _ in range(rounds):
            for (name, contestant), runs in runs_of.items():
                quiet[name] += seconds_of(contestant, runs)
            with busy_cores():
                for (name, contestant), runs in runs_of.items():
                    busy[name] += seconds_of(contestant, runs)
    rows = []
    for name in quiet:
        alone, beside = statistics.median(quiet[name]), statistics.median(busy[name])
        rows.append({"who": name, "ms": alone * 1e3, "ms, busy": beside * 1e3, "times slower": beside / alone})
    report("busy", rows)


if __name__ == "__main__":
    main()
