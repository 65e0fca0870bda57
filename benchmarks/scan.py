"""The scan against Transformers' PyTorch reference: time and memory, forward and backward, and how both grow.

python benchmarks/scan.py
"""

import torch
from measure import extra_bytes, median_seconds, plot, report
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from mambamia_hf.ssd import ssd_chunk_scan


HEADS, HEAD_DIM, STATE_SIZE = 16, 64, 128


def inputs(length: int, grad: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(1, length, HEADS, HEAD_DIM),
        "dt": torch.randn(1, length, HEADS),
        "A": -torch.rand(HEADS) * 15 - 1,
        "B": torch.randn(1, length, 1, STATE_SIZE),
        "C": torch.randn(1, length, 1, STATE_SIZE),
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS) - 4,
    }
    return {name: tensor.requires_grad_(grad) for name, tensor in tensors.items()}


def ours(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return ssd_chunk_scan(**tensors, chunk_size=256, dt_softplus=True)


def reference(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    x = {"hidden_states": tensors["x"], **{name: tensor for name, tensor in tensors.items() if name != "x"}}
    return mamba2_chunk_scan(**x, chunk_size=256, dt_softplus=True)


def main():
    rows = []
    with torch.no_grad():
        tensors = inputs(19_200)
        difference = (ours(tensors) - reference(tensors)).abs().max().item()
        contestants = {"ours": lambda: ours(tensors), "Transformers' reference": lambda: reference(tensors)}
        seconds = median_seconds(contestants)
        memory = {name: extra_bytes(contestant) for name, contestant in contestants.items()}
        for name in contestants:
            rows.append(
                {
                    "scan": "forward",
                    "who": name,
                    "tokens": 19_200,
                    "us a token": seconds[name] / 19_200 * 1e6,
                    "times slower": seconds[name] / seconds["ours"],
                    "extra MB": memory[name] / 1e6,
                    "times the memory": memory[name] / memory["ours"],
                    "largest difference": difference,
                }
            )
        for length in (4_800, 57_600, 230_400):
            tensors = inputs(length)
            seconds = median_seconds({"ours": lambda tensors=tensors: ours(tensors)})["ours"]
            memory = extra_bytes(lambda tensors=tensors: ours(tensors)) - tensors["x"].nbytes
            rows.append(
                {
                    "scan": "forward",
                    "who": "ours",
                    "tokens": length,
                    "us a token": seconds / length * 1e6,
                    "extra MB": memory / 1e6,
                }
            )
    for length in (19_200, 230_400):
        tensors = inputs(length, grad=True)

        def forward_and_backward(tensors=tensors):
            return torch.autograd.grad(ours(tensors).sum(), list(tensors.values()))

        with torch.no_grad():
            forward = median_seconds({"ours": lambda tensors=tensors: ours(tensors)})["ours"]
        both = median_seconds({"ours": forward_and_backward})["ours"]
        rows.append(
            {
                "scan": "backward",
                "who": "ours",
                "tokens": length,
                "us a token": (both - forward) / length * 1e6,
                "times the forward": (both - forward) / forward,
                "extra MB": extra_bytes(forward_and_backward) / 1e6,
            }
        )
    report("scan", rows)
    series = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        x, y = series.setdefault(f"{row['who']}, {row['scan']}", ([], []))
        x.append(row["tokens"])
        y.append(row["us a token"])
    plot("scan", "tokens", "µs a token", series, log=True)


if __name__ == "__main__":
    main()
