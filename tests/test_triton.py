"""Runs the tests of the Triton kernels by Triton's interpreter, which has to be chosen before a process imports it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_on_cpu import has_triton

from mambamia_hf import mixer_triton


@has_triton
@pytest.mark.parametrize("name", ["test_ssd_triton.py", "test_mixer_triton.py"])
def test_kernels_by_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", Path(__file__).parent / name]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@has_triton
def test_pytorch_runs_where_triton_cannot_build_kernels(monkeypatch):
    def build_nothing(*args):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: torch.empty(1))
    monkeypatch.setattr(mixer_triton, "causal_conv1d_silu", build_nothing)
    monkeypatch.setattr(mixer_triton, "_LOWEST_TRITON", (0, 0))
    with pytest.warns(
        UserWarning, match="slower ones of PyTorch run .Failed to find C compiler.. Install a C compiler"
    ):
        assert not mixer_triton._works.__wrapped__(torch.device("cuda"))


def test_nothing_needs_triton():
    """As on a machine whose PyTorch comes without it."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig
compressor = MambaMiaCompressor(MambaMiaCompressorConfig(input_size=8, hidden_size=32, patches_per_anchor=3))
with torch.no_grad():
    print(compressor(torch.randn(1, 2, 9, 8)).last_hidden_state.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch.Size([1, 2, 3, 3584])" in done.stdout, done.stderr


@has_triton
def test_pytorch_runs_with_a_triton_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(mixer_triton, "_LOWEST_TRITON", (1000, 0))
    assert not mixer_triton._works.__wrapped__(torch.device("cuda"))
