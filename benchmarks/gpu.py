"""The tables of scan.py, compressor.py and whole_path.py, in bfloat16 on an NVIDIA GPU.

python benchmarks/gpu.py

With mamba-ssm and causal-conv1d installed, "ours" and "Transformers'" are both the official kernels.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import scan
import torch
import whole_path
from measure import median_seconds, plot, report
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig
from mambamia_hf.ssd import _torch_chunk_scan, ssd_chunk_scan


DEVICE, DTYPE = "cuda", torch.bfloat16
CHUNK_SIZE = 256
FULL_FRAMES, FULL_PATCHES = 384, 576


def extra_bytes(contestant: Callable[[], Any]) -> int:
    """Peak of the GPU's memory during a call above the memory before it, its result included."""
    contestant()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant()
    return torch.cuda.max_memory_allocated() - before


def scan_inputs(length: int, grad: bool) -> dict[str, Tensor]:
    """Of scan.py, with x, B and C in bfloat16."""
    return {
        name: tensor.to(DEVICE, DTYPE if name in ("x", "B", "C") else torch.float32).requires_grad_(grad)
        for name, tensor in scan.inputs(length).items()
    }


def run_scan(engine: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Forward, and backward where the tensors want a gradient."""
    x, dt, A, B, C, D, dt_bias = tensors.values()
    y = engine(x, dt, A, B, C, CHUNK_SIZE, D=D, dt_bias=dt_bias, dt_softplus=True)
    return torch.autograd.grad(y.float().sum(), list(tensors.values())) if x.requires_grad else y


def scan_rows(length: int) -> list[dict]:
    engines = {
        "ours": ssd_chunk_scan,
        "ours, in PyTorch": _torch_chunk_scan,
        "Transformers'": mamba2_chunk_scan,
        "Transformers', in PyTorch": inspect.unwrap(mamba2_chunk_scan),
    }
    if length > 20_000:  # in PyTorch, Transformers' is quadratic in the number of chunks
        del engines["Transformers', in PyTorch"]
        if find_spec("mamba_ssm") is None:
            del engines["Transformers'"]
    rows = []
    for grad in (False, True):
        tensors = scan_inputs(length, grad)
        contestants = {who: partial(run_scan, engine, tensors) for who, engine in engines.items()}
        seconds = median_seconds(contestants)
        rows += [
            {
                "scan": "forward and backward" if grad else "forward",
                "who": who,
                "tokens": length,
                "us a token": seconds[who] / length * 1e6,
                "times slower": seconds[who] / seconds["ours"],
                "extra MB": extra_bytes(contestant) / 1e6,
            }
            for who, contestant in contestants.items()
        ]
    return rows


@torch.no_grad()
def compressor_rows() -> list[dict]:
    torch.manual_seed(0)
    config = MambaMiaCompressorConfig()
    with torch.device(DEVICE):
        compressor = MambaMiaCompressor(config).to(DTYPE).eval()
        features = torch.randn(1, FULL_FRAMES, FULL_PATCHES, config.input_size, dtype=DTYPE)
    contestant = partial(compressor, features)
    seconds = median_seconds({"ours": contestant})["ours"]
    flops = whole_path.compressor_flops(config, FULL_FRAMES, FULL_PATCHES)
    return [
        {
            "frames": FULL_FRAMES,
            "parameters": compressor.num_parameters(),
            "seconds": seconds,
            "TFLOP/s": flops / seconds / 1e12,
            "extra MB": extra_bytes(contestant) / 1e6,
        }
    ]


def whole_path_rows() -> list[dict]:
    paths = {way: whole_path.build(way, DEVICE, DTYPE) for way in whole_path.WAYS}
    rows = []
    for num_frames in whole_path.FRAMES:
        features = whole_path.features(num_frames, DEVICE, DTYPE)
        contestants = {way: partial(path, features) for way, path in paths.items()}
        seconds = median_seconds(contestants)
        rows += [
            {
                "frames": num_frames,
                "way": way,
                "video tokens": whole_path.video_tokens(way, num_frames),
                "s to first token": seconds[way],
                "times ours": seconds[way] / seconds[whole_path.OURS],
                "extra MB": extra_bytes(contestant) / 1e6,
            }
            for way, contestant in contestants.items()
        ]
    return rows


def main():
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU and PyTorch sees none; on a CPU run the other scripts.")
    report("gpu_scan", [row for length in (19_200, 230_400) for row in scan_rows(length)])
    report("gpu_compressor", compressor_rows())
    rows = whole_path_rows()
    report("gpu_whole_path", rows)
    for name, column in (("gpu_whole_path", "s to first token"), ("gpu_whole_path_memory", "extra MB")):
        plot(name, "frames", column, whole_path.series(rows, column))


if __name__ == "__main__":
    main()
