"""How the benchmarks measure: contestants run after run in one process, medians, ratios, peak memory, and a report."""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure


RESULTS = Path(__file__).parent / "results"


def median_seconds(contestants: dict[str, Callable[[], Any]], runs: int = 5) -> dict[str, float]:
    """Median wall time of each contestant; they take turns, after one run each that does not count."""
    seconds = {name: [] for name in contestants}
    for run in range(runs + 1):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def product_rate(size: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations per second of a product of two square matrices."""
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_seconds({"": lambda: left @ right})[""]


def extra_bytes(contestant: Callable[[], Any]) -> int:
    """Peak resident memory during a call above the memory before it, its result included (Linux, CPU)."""
    contestant()  # what libraries set up once does not count
    before = restart_peak()
    result = contestant()
    peak = _status("VmHWM")
    del result
    return peak - before


def restart_peak() -> int:
    """Lets `peak_rss` count from here on; the memory in bytes that the process holds (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator has kept does not count
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def resident() -> int:
    """The memory in bytes that this process holds (Linux)."""
    return _status("VmRSS")


def peak_rss() -> int:
    """The most memory in bytes that this process has held so far, or since `restart_peak` (Linux)."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}; this needs Linux.")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(name: str, rows: list[dict[str, Any]], write: bool = True):
    """Prints `rows` as a table and, unless told not to, writes them as JSON, together with the machine."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns] + [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if not write:
        return
    RESULTS.mkdir(exist_ok=True)
    results = {"machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")


def plot(
    name: str,
    x_label: str,
    y_label: str,
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    log: bool = False,
):
    """Draws each series, a pair of x and y values, as a line with its points, to `results/<name>.png`."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, (x, y) in series.items():
        axes.plot(x, y, marker="o", label=label)
    axes.set(xlabel=x_label, ylabel=y_label)
    if log:
        axes.set(xscale="log", yscale="log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def bars(name: str, label: str, values: dict[str, float]):
    """Draws each value as a bar beside its name, to `results/<name>.png`."""
    figure = Figure(figsize=(8, 1 + 0.4 * len(values)), layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.barh(list(values), list(values.values())), fmt="{:.3g}", padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()  # the first on top
    axes.set(xlabel=label)
    axes.grid(alpha=0.3, axis="x")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str("" if value is None else value)
