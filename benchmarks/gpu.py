"""What the model costs on an NVIDIA GPU in bfloat16, in parts that each write their results at once.

python benchmarks/gpu.py [--parts products scan compressor training first_token]
python benchmarks/gpu.py --device cpu --small    # every part at a size that shows only that it runs; writes nothing

"Triton" are this project's kernels, "mamba-ssm" the official ones where they are installed, and "PyTorch" is the
engine that needs neither. Without causal-conv1d the convolution of the last two is PyTorch's, and so is that of the
first in training.
"""

import argparse
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from measure import median_seconds, product_rate, report
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from whole_path import compressor_flops, prefill_flops

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig, MambaMiaConfig, select_frames, ssd


DTYPE = torch.bfloat16
TRITON, OFFICIAL, PYTORCH, COMPILED = "Triton", "mamba-ssm", "PyTorch", "compiled"


@dataclass
class Size:
    """What is measured, at full size or so small that a CPU takes seconds."""

    device: str = "cuda"
    product: int = 8192
    scan_tokens: int = 19_200
    scan_heads: tuple[int, ...] = (16, 96)
    frames: int = 384
    training_frames: int = 128
    patches: int = 576
    compressor: MambaMiaCompressorConfig = field(default_factory=MambaMiaCompressorConfig)
    text: Qwen2Config = field(default_factory=lambda: MambaMiaConfig().text_config)


def small_size(device: str) -> Size:
    return Size(
        device,
        product=256,
        scan_tokens=300,
        scan_heads=(2,),
        frames=8,
        training_frames=4,
        patches=16,
        compressor=MambaMiaCompressorConfig(
            input_size=32, hidden_size=32, output_size=64, head_dim=16, state_size=16, patches_per_anchor=4
        ),
        text=Qwen2Config(
            vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        ),
    )  # fmt: skip


def extra_megabytes(contestant: Callable[[], Any], device: str) -> float:
    """Peak of the GPU's memory during a call above the memory before it, its result included."""
    if device == "cpu":
        return 0.0
    contestant()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contestant()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@contextmanager
def engine_of(name: str) -> Iterator[None]:
    """Within it scan, convolution and norm are those of one engine."""
    kernels = ("chunk_scan", "causal_conv1d")
    before = {kernel: getattr(ssd, f"_kernel_{kernel}") for kernel in kernels}
    has_triton = ssd._has_triton
    if name != TRITON:
        ssd._has_triton = lambda x: False
    for kernel in kernels if name == PYTORCH else ():
        setattr(ssd, f"_kernel_{kernel}", getattr(ssd, f"_torch_{kernel}"))
    try:
        yield
    finally:
        ssd._has_triton = has_triton
        for kernel, official in before.items():
            setattr(ssd, f"_kernel_{kernel}", official)


def seconds_and_megabytes(contestant: Callable[[], Any], device: str, runs: int) -> tuple[float, float]:
    """Median wall time, and the memory of a call; one that takes long may run once for both."""
    if runs > 1:
        return median_seconds({"": contestant}, runs)[""], extra_megabytes(contestant, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    contestant()
    if device == "cpu":
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 1e6


def with_engines(function: Callable[[], Any], size: Size) -> dict[str, Callable[[], Any]]:
    """The function once with every engine that is there."""

    def run(engine: str) -> Any:
        with engine_of(engine):
            return function()

    engines = [TRITON] if size.device == "cuda" else []
    engines += [OFFICIAL] if find_spec("mamba_ssm") else []
    return {engine: partial(run, engine) for engine in (*engines, PYTORCH)}


def products(size: Size) -> list[dict]:
    return [{"product": f"{size.product}³", "TFLOP/s": product_rate(size.product, DTYPE, size.device) / 1e12}]


def scan_inputs(size: Size, heads: int, grad: bool) -> dict[str, Tensor]:
    """As random weights give them: Δ around the middle of its range, A between -1 and -16."""
    torch.manual_seed(0)
    config, length = MambaMiaCompressorConfig(), size.scan_tokens
    tensors = {
        "x": torch.randn(1, length, heads, config.head_dim).to(DTYPE),
        "dt": nn.functional.softplus(torch.randn(1, length, heads) / 2 - 4.6),
        "A": -torch.empty(heads).uniform_(1, 16),
        "B": torch.randn(1, length, 1, config.state_size).to(DTYPE),
        "C": torch.randn(1, length, 1, config.state_size).to(DTYPE),
        "D": torch.ones(heads),
    }
    return {name: tensor.to(size.device).requires_grad_(grad) for name, tensor in tensors.items()}


def scan(size: Size) -> list[dict]:
    """The scan alone: the kernels, PyTorch, and Transformers' reference, which is quadratic in the chunks."""
    rows = []
    for heads in size.scan_heads:
        for grad in (False, True):
            tensors = scan_inputs(size, heads, grad)

            def run(engine: Callable[..., Tensor], tensors: dict[str, Tensor] = tensors, grad: bool = grad) -> Any:
                x, dt, A, B, C, D = tensors.values()
                y = engine(x, dt, A, B, C, 256, D=D)
                return torch.autograd.grad(y.sum(), list(tensors.values())) if grad else y

            contestants = with_engines(partial(run, ssd.ssd_chunk_scan), size)
            if heads == min(size.scan_heads):
                contestants["Transformers' reference"] = partial(run, inspect.unwrap(mamba2_chunk_scan))
            seconds = median_seconds(contestants)
            rows += [
                {
                    "scan": "forward and backward" if grad else "forward",
                    "heads": heads,
                    "tokens": size.scan_tokens,
                    "engine": engine,
                    "ms": 1e3 * seconds[engine],
                    "times mamba-ssm": seconds[engine] / seconds[OFFICIAL] if OFFICIAL in seconds else None,
                    "extra MB": extra_megabytes(contestant, size.device),
                }
                for engine, contestant in contestants.items()
            ]
    return rows


def build_compressor(size: Size) -> MambaMiaCompressor:
    torch.manual_seed(0)
    with torch.device(size.device):
        return MambaMiaCompressor(size.compressor).to(DTYPE).eval()


def patch_features(size: Size, num_frames: int) -> Tensor:
    shape = (1, num_frames, size.patches, size.compressor.input_size)
    return torch.randn(shape, device=size.device, dtype=DTYPE)


def compressor(size: Size, compiled: bool = False) -> list[dict]:
    """All frames without a gradient, against the rate of a large product."""
    model, features = build_compressor(size), patch_features(size, size.frames)
    rate = product_rate(size.product, DTYPE, size.device)

    @torch.no_grad()
    def run(forward: Callable[..., Any] = model.forward) -> Any:
        return forward(features)

    contestants = with_engines(run, size)
    if compiled:
        contestants = {COMPILED: partial(run, torch.compile(model.forward, fullgraph=True))}
    seconds = median_seconds(contestants, runs=3)
    flops = compressor_flops(size.compressor, size.frames, size.patches)
    return [
        {
            "frames": size.frames,
            "parameters": model.num_parameters(),
            "engine": engine,
            "seconds": seconds[engine],
            "TFLOP": flops / 1e12,
            "TFLOP/s": flops / seconds[engine] / 1e12,
            "% of the product rate": 100 * flops / seconds[engine] / rate,
            "extra MB": extra_megabytes(contestant, size.device),
        }
        for engine, contestant in contestants.items()
    ]


def training(size: Size) -> list[dict]:
    """Forward and backward of the compressor with activation checkpointing; no optimizer."""
    model, features = build_compressor(size), patch_features(size, size.training_frames)
    model.train()
    model.gradient_checkpointing_enable()

    def run() -> None:
        model.zero_grad()
        model(features).last_hidden_state.float().square().mean().backward()

    contestants = with_engines(run, size)
    seconds = median_seconds(contestants, runs=3)
    flops = 4 * compressor_flops(size.compressor, size.training_frames, size.patches)
    return [
        {
            "frames": size.training_frames,
            "engine": engine,
            "seconds": seconds[engine],
            "TFLOP/s": flops / seconds[engine] / 1e12,
            "extra MB": extra_megabytes(contestant, size.device),
        }
        for engine, contestant in contestants.items()
    ]


def first_token(size: Size) -> list[dict]:
    """From the patch features to the first token of a language model of random weights, by four ways."""
    model, text = build_compressor(size), size.text
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(text, dtype=DTYPE)
    language_model = language_model.to_empty(device=size.device).eval()
    for name, tensor in (*language_model.named_parameters(), *language_model.named_buffers()):
        if name.endswith("inv_freq"):
            head_dim = text.hidden_size // text.num_attention_heads
            tensor.copy_(10_000 ** -(torch.arange(0, head_dim, 2) / head_dim))
        else:
            tensor.data.normal_(std=0.02)
    width = text.hidden_size
    with torch.device(size.device):
        projector = nn.Sequential(nn.Linear(size.compressor.input_size, width), nn.GELU(), nn.Linear(width, width))
    projector = projector.to(DTYPE)
    rows = int(size.patches**0.5)

    def by_the_compressor(features: Tensor, keep_ratio: float) -> Tensor:
        output = model(features)
        return output.last_hidden_state[select_frames(output.frame_deltas, keep_ratio=keep_ratio)]

    ways = {
        "all frames": partial(by_the_compressor, keep_ratio=1.0),
        "half of the frames": partial(by_the_compressor, keep_ratio=0.5),
        "average pooling": lambda features: projector(features.unflatten(2, (rows, -1)).mean(dim=3)),
        "no compression": projector,
    }

    @torch.no_grad()
    def run(way: str, features: Tensor) -> Tensor:
        tokens = ways[way](features).reshape(1, -1, text.hidden_size)
        return language_model(inputs_embeds=tokens, use_cache=True, logits_to_keep=1).logits.argmax()

    results = []
    for num_frames in sorted({size.training_frames, size.frames}):
        features = patch_features(size, num_frames)
        for way in ways:
            contestant = partial(run, way, features)
            runs = 1 if way == "no compression" else 3
            seconds, megabytes = seconds_and_megabytes(contestant, size.device, runs)
            tokens = num_frames * (size.patches if way == "no compression" else rows)
            tokens = tokens // 2 if way == "half of the frames" else tokens
            results.append(
                {
                    "frames": num_frames,
                    "way": way,
                    "video tokens": tokens,
                    "seconds": seconds,
                    "prefill TFLOP": sum(prefill_flops(text, tokens)) / 1e12,
                    "extra MB": megabytes,
                }
            )
    return results


PARTS: dict[str, Callable[[Size], list[dict]]] = {
    "products": products,
    "scan": scan,
    "compressor": compressor,
    "training": training,
    "first_token": first_token,
    "compiled": partial(compressor, compiled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that only show that all of it runs")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU; on a CPU add --device cpu --small, or run the other scripts.")
    size = small_size(arguments.device) if arguments.small else Size(arguments.device)
    for part in arguments.parts:
        report(f"gpu_{part}", PARTS[part](size), write=not arguments.small)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
