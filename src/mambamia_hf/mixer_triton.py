"""What surrounds the scan in a Mamba-2 mixer, as Triton kernels for GPUs: the causal convolution and the gated norm.

Each has the arguments and the meaning of the function in `ssd.py`, reads and writes every tensor once, computes in
float32, and has no gradient.
"""

from __future__ import annotations  # the kernels name types that are not there without Triton

import subprocess
import warnings
from functools import cache

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:  # a machine that needs no kernels for a GPU
    triton = None


# Tokens and channels that a program of the convolution takes.
_CONV_TOKENS, _CONV_CHANNELS = 32, 128
# The compiler of 3.2 aborts the process at one of the kernels.
_LOWEST_TRITON = (3, 3)
# From this many channels on, a program of the norm has eight warps.
_WIDE = 2048

jit = triton.jit if triton is not None else lambda kernel: kernel


def runs_on(x: Tensor) -> bool:
    """Whether the kernels are to compute with a tensor: on an NVIDIA GPU since Ampere, in a type that its matrix units
    multiply. Triton's products in float32 are slower than PyTorch's."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _works(x.device)


@cache
def _works(device: torch.device) -> bool:
    """Whether Triton can build kernels for a GPU. It also needs a C compiler and Python's headers."""
    if triton is None or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _LOWEST_TRITON:
        return False
    try:
        x, weight, bias = (torch.ones(shape, device=device) for shape in ((1, 1, 1), (1, 1), (1,)))
        causal_conv1d_silu(x, weight, bias)
    except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:  # all that Triton raises
        warnings.warn(
            f"Triton cannot build its kernels here, so slower ones of PyTorch run ({error}). Install a C compiler and "
            "the headers of Python.",
            stacklevel=2,
        )
        return False
    return True


def causal_conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor, context: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """`ssd.causal_conv1d_silu`, in one pass."""
    batch, length, channels = x.shape
    x, y = unit_stride(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    before = x if context is None else context.contiguous()
    blocks = triton.cdiv(length, _CONV_TOKENS) * triton.cdiv(channels, _CONV_CHANNELS)
    with on_device_of(x):
        _conv_kernel[(blocks, batch)](
            x, weight.contiguous(), bias, before, y, length, channels, x.stride(0), x.stride(1), weight.shape[-1],
            context is not None, reverse, _CONV_TOKENS, _CONV_CHANNELS,
        )  # fmt: skip
    return y


def gated_norm(
    y: Tensor, weight: Tensor, eps: float, groups: int = 1, add: Tensor | None = None, z: Tensor | None = None
) -> Tensor:
    """`ssd.gated_norm`, in one pass."""
    shape, size = y.shape, y.shape[-1] // groups
    y = _rows(y)
    add, z = (None if tensor is None else _rows(tensor) for tensor in (add, z))
    output = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    with on_device_of(y):
        _gated_norm_kernel[(len(y), groups)](
            y, weight, y if add is None else add, y if z is None else z, output,
            y.stride(0), 0 if add is None else add.stride(0), 0 if z is None else z.stride(0), y.shape[1], eps,
            size, triton.next_power_of_2(size), add is not None, z is not None, num_warps=8 if size > _WIDE else 4,
        )  # fmt: skip
    return output.view(shape)


def unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """`(..., width)` to `(rows, width)`, without a copy where the rows lie evenly."""
    return unit_stride(tensor).flatten(0, -2)


def on_device_of(tensor: Tensor) -> torch.cuda.device:
    """Triton launches on the current GPU, which may not be the tensor's."""
    return torch.cuda.device(tensor.device)


@jit
def _conv_kernel(
    x, weight, bias, context, y, length, channels, x_batch, x_token,
    TAPS: tl.constexpr, HAS_CONTEXT: tl.constexpr, REVERSE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Places count along the scan: in reverse, the place of the last token is 0."""
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(channels, CHANNELS)
    place = block // across * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = block % across * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    is_there = channel < channels
    total = tl.zeros((TOKENS, CHANNELS), tl.float32) + tl.load(bias + channel, mask=is_there, other=0).to(tl.float32)
    for tap in tl.static_range(TAPS):
        source = place - (TAPS - 1 - tap)
        token = (length - 1 - source if REVERSE else source).to(tl.int64)
        at = is_there & (source >= 0) & (source < length)
        value = tl.load(x + batch * x_batch + token * x_token + channel, mask=at, other=0).to(tl.float32)
        if HAS_CONTEXT:
            row = batch * (TAPS - 1) + source + TAPS - 1
            value += tl.load(context + row * channels + channel, mask=is_there & (source < 0), other=0).to(tl.float32)
        total += value * tl.load(weight + channel * TAPS + tap, mask=is_there, other=0).to(tl.float32)
    token = (length - 1 - place if REVERSE else place).to(tl.int64)
    silu = total * tl.sigmoid(total)
    tl.store(y + (batch * length + token) * channels + channel, silu, mask=is_there & (place < length))


@jit
def _gated_norm_kernel(
    y, weight, add, z, output, y_row, add_row, z_row, width, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_ADD: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    is_there = column < SIZE
    channel = group * SIZE + column
    y_ = tl.load(y + row * y_row + channel, mask=is_there, other=0).to(tl.float32)
    y_ *= tl.rsqrt(tl.sum(y_ * y_, axis=0) / SIZE + eps)
    y_ *= tl.load(weight + channel, mask=is_there, other=0).to(tl.float32)
    if HAS_ADD:
        y_ += tl.load(add + row * add_row + channel, mask=is_there, other=0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(z + row * z_row + channel, mask=is_there, other=0).to(tl.float32)
        y_ *= gate * tl.sigmoid(gate)
    tl.store(output + row * width + channel, y_, mask=is_there)
