"""On a busy machine: the time with one busy process per core over the time on the machine as it is. A fair share is 2.

python benchmarks/busy.py
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from measure import report
from scan import inputs, ours


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


def seconds_of(contestant: Callable[[], object], runs: int = 5) -> list[float]:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        contestant()
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def scan() -> dict[str, Callable[[], object]]:
    cases = {"scan, 16 heads, 9,600 tokens": inputs(9_600), "scan, 96 heads, 2,400 tokens": inputs(2_400, heads=96)}
    return {name: lambda tensors=tensors: ours(tensors) for name, tensors in cases.items()}


@torch.no_grad()
def main(rounds: int = 3):
    contestants = scan()
    quiet, busy = ({name: [] for name in contestants} for _ in range(2))
    for contestant in contestants.values():
        contestant()  # what libraries set up once does not count
    for _ in range(rounds):
        for name, contestant in contestants.items():
            quiet[name] += seconds_of(contestant)
        with busy_cores():
            for name, contestant in contestants.items():
                busy[name] += seconds_of(contestant)
    rows = []
    for name in contestants:
        alone, beside = statistics.median(quiet[name]), statistics.median(busy[name])
        rows.append({"who": name, "ms": alone * 1e3, "ms, busy": beside * 1e3, "times slower": beside / alone})
    report("busy", rows)


if __name__ == "__main__":
    main()
