"""The scan against Transformers' PyTorch reference: time and memory, forward and backward, and growth with length.

python benchmarks/scan.py
"""

from collections.abc import Callable

import torch
from measure import extra_bytes, median_seconds, plot, report
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from mambamia_hf.ssd import ssd_chunk_scan


HEAD_DIM, STATE_SIZE = 64, 128
REFERENCE = "Transformers' reference"


def inputs(
    length: int, heads: int = 16, dtype: torch.dtype = torch.float32, bias: float = -4, grad: bool = False
) -> dict[str, Tensor]:
    """A of a head from -1 to -16; the larger the bias of the step sizes, the more heads forget within a chunk."""
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(1, length, heads, HEAD_DIM).to(dtype),
        "dt": torch.randn(1, length, heads),
        "A": -torch.rand(heads) * 15 - 1,
        "B": torch.randn(1, length, 1, STATE_SIZE).to(dtype),
        "C": torch.randn(1, length, 1, STATE_SIZE).to(dtype),
        "D": torch.randn(heads),
        "dt_bias": torch.randn(heads) + bias,
    }
    return {name: tensor.requires_grad_(grad) for name, tensor in tensors.items()}


def ours(tensors: dict[str, Tensor]) -> Tensor:
    return ssd_chunk_scan(**tensors, chunk_size=256, dt_softplus=True)


def reference(tensors: dict[str, Tensor]) -> Tensor:
    x = {"hidden_states": tensors["x"], **{name: tensor for name, tensor in tensors.items() if name != "x"}}
    return mamba2_chunk_scan(**x, chunk_size=256, dt_softplus=True)


@torch.no_grad()
def against_the_reference(length: int = 19_200) -> list[dict]:
    tensors = inputs(length)
    difference = (ours(tensors) - reference(tensors)).abs().max().item()
    contestants = {"ours": lambda: ours(tensors), REFERENCE: lambda: reference(tensors)}
    seconds = median_seconds(contestants)
    memory = {name: extra_bytes(contestant) for name, contestant in contestants.items()}
    return [
        {
            "scan": "forward",
            "who": who,
            "tokens": length,
            "us per token": seconds[who] / length * 1e6,
            "times slower": seconds[who] / seconds["ours"],
            "extra MB": memory[who] / 1e6,
            "times the memory": memory[who] / memory["ours"],
            "largest difference": difference,
        }
        for who in contestants
    ]


@torch.no_grad()
def growth() -> list[dict]:
    rows = []
    for length in (4_800, 57_600, 230_400):
        tensors = inputs(length)
        seconds = median_seconds({"ours": lambda tensors=tensors: ours(tensors)})["ours"]
        memory = extra_bytes(lambda tensors=tensors: ours(tensors)) - tensors["x"].nbytes
        rows.append(
            {
                "scan": "forward",
                "who": "ours",
                "tokens": length,
                "us per token": seconds / length * 1e6,
                "extra MB": memory / 1e6,
            }
        )
    return rows


@torch.no_grad()
def full_width(length: int = 4_800, heads: int = 96) -> list[dict]:
    """The scan of one full-width direction, in both types, and with heads that forget within a few tokens."""
    cases = {
        "96 heads": inputs(length, heads),
        "96 heads, bfloat16": inputs(length, heads, torch.bfloat16),
        "96 heads, steep": inputs(length, heads, bias=-1),
    }
    seconds = median_seconds({name: lambda tensors=tensors: ours(tensors) for name, tensors in cases.items()})
    return [
        {"scan": f"forward, {name}", "who": "ours", "tokens": length, "us per token": value / length * 1e6}
        for name, value in seconds.items()
    ]


def backward() -> list[dict]:
    rows = []
    for length in (19_200, 230_400):
        tensors = inputs(length, grad=True)

        def forward(tensors: dict[str, Tensor] = tensors) -> Tensor:
            with torch.no_grad():
                return ours(tensors)

        def both(tensors: dict[str, Tensor] = tensors) -> tuple[Tensor, ...]:
            return torch.autograd.grad(ours(tensors).sum(), list(tensors.values()))

        contestants: dict[str, Callable] = {"forward": forward, "both": both}
        seconds = median_seconds(contestants)
        rows.append(
            {
                "scan": "backward",
                "who": "ours",
                "tokens": length,
                "us per token": (seconds["both"] - seconds["forward"]) / length * 1e6,
                "times the forward": (seconds["both"] - seconds["forward"]) / seconds["forward"],
                "extra MB": extra_bytes(both) / 1e6,
            }
        )
    return rows


def main():
    rows = [*against_the_reference(), *growth(), *full_width(), *backward()]
    report("scan", rows)
    series = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        x, y = series.setdefault(f"{row['who']}, {row['scan']}", ([], []))
        x.append(row["tokens"])
        y.append(row["us per token"])
    plot("scan", "tokens", "µs per token", series, log=True)


if __name__ == "__main__":
    main()
