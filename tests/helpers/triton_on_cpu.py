"""Triton kernels on a CPU, by Triton's interpreter: TRITON_INTERPRET=1 has to be set before Triton is imported."""

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec

import pytest
import torch


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="tests/test_triton.py runs these with TRITON_INTERPRET=1"
)
has_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@cache
def stand_in_for_the_gpu():
    """Puts something in place of the little around the kernels that needs a GPU; the kernels stay what they are."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    torch.cuda.device = lambda device: nullcontext()
    dot = InterpreterBuilder.create_dot

    def dot_of_values(builder, a, b, *args):
        """The interpreter multiplies the bits of bfloat16 numbers as integers; a GPU multiplies their values."""
        a, b = (
            builder.cast_impl(tensor, tl.float32) if tensor.dtype.scalar == tl.bfloat16 else tensor
            for tensor in (a, b)
        )
        return dot(builder, a, b, *args)

    InterpreterBuilder.create_dot = dot_of_values
