"""mamba-ssm's Triton kernels, interpreted on the CPU, called as the model calls them on a GPU; for test_kernels.py.

TRITON_INTERPRET=1 python tests/helpers/interpreted_kernels.py OUTPUT

Writes to OUTPUT the results of the kernels and of the PyTorch engine for the same inputs.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.autotuner import Autotuner
from triton_on_cpu import stand_in_for_the_gpu


def stand_in_for_mamba_ssm():
    """Puts something in place of the little around its kernels that needs a GPU; the kernels stay what they are."""
    stand_in_for_the_gpu()
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=1)
    package = ModuleType("mamba_ssm")  # its own __init__ imports the compiled extension
    package.__path__ = find_spec("mamba_ssm").submodule_search_locations
    sys.modules["mamba_ssm"] = package
    initialize = Autotuner.__init__

    def with_the_first_config(tuner, fn, arg_names, configs, *args, **kwargs):
        initialize(tuner, fn, arg_names, configs[:1], *args, **kwargs)

    Autotuner.__init__ = with_the_first_config


SEQUENCE_LENGTH = 70


class CopyRecorder(TorchDispatchMode):
    """Notes what is copied of a whole sequence while it is active and not paused."""

    COPIES = {"clone", "copy_", "cat", "constant_pad_nd", "flip", "index", "roll"}

    def __init__(self):
        super().__init__()
        self.copies, self.paused = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        output = func(*args, **(kwargs or {}))
        if name in self.COPIES and SEQUENCE_LENGTH in output.shape and not self.paused:
            self.copies.append(name)
        return output


recorder = CopyRecorder()
calls = []  # of the kernel: its arguments and what it returned


def unrecorded(function: Callable) -> Callable:
    """The function, without the copies that it makes inside."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        recorder.paused = True
        output = function(*args, **kwargs)
        recorder.paused = False
        return output

    return wrapped


def observed(kernel: Callable) -> Callable:
    """The kernel, noting its calls."""
    quiet = unrecorded(kernel)

    @functools.wraps(kernel)
    def wrapped(*args, **kwargs):
        output = quiet(*args, **kwargs)
        calls.append({**inspect.signature(kernel).bind(*args, **kwargs).arguments, "output": output})
        return output

    return wrapped


stand_in_for_mamba_ssm()
from mamba_ssm.ops.triton import ssd_combined  # noqa: E402


ssd_combined.mamba_chunk_scan_combined = observed(ssd_combined.mamba_chunk_scan_combined)

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig, compressor_segments, ssd  # noqa: E402


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def scan_cases() -> dict[str, dict]:
    """Arguments of the scan, tensors and settings."""
    torch.manual_seed(0)
    batch, length, heads, head_dim, groups, state = 2, 70, 4, 16, 2, 16
    step_sizes = torch.rand(batch, length, heads) / 5
    decay = -torch.rand(heads) * 4 - 0.5
    everything = {
        "x": draw(batch, length, heads, head_dim),
        "dt": step_sizes,
        "A": decay,
        "B": draw(batch, length, groups, state),
        "C": draw(batch, length, groups, state),
        "D": draw(heads),
        "initial_states": draw(batch, heads, head_dim, state),
        "chunk_size": 32,
        "return_final_states": True,
    }
    raw_step_sizes = {
        "x": draw(1, 64, heads, head_dim),
        "dt": draw(1, 64, heads),
        "A": decay,
        "B": draw(1, 64, 1, state),
        "C": draw(1, 64, 1, state),
        "D": draw(heads, head_dim),
        "dt_bias": draw(heads) - 1,
        "chunk_size": 32,
        "dt_softplus": True,
        "dt_limit": (0.05, 0.8),
    }
    one_token = {name: value[:, :1] if name in ("x", "dt", "B", "C") else value for name, value in everything.items()}
    half = {name: value.bfloat16() if name in ("x", "B", "C") else value for name, value in everything.items()}
    return {"everything": everything, "raw step sizes": raw_step_sizes, "one token": one_token, "bfloat16": half}


def scan(engine: Callable, arguments: dict) -> dict[str, Tensor]:
    """Outputs, and the gradients of a sum that weighs every entry of them differently."""
    arguments = {
        name: value.clone().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    output = engine(**arguments)
    outputs = output if isinstance(output, tuple) else (output,)
    sum(weighted(tensor) for tensor in outputs).backward()
    gradients = {name: value.grad for name, value in arguments.items() if isinstance(value, Tensor)}
    return {**dict(zip(("y", "final states"), outputs, strict=False)), **gradients}


def weighted(tensor: Tensor) -> Tensor:
    return (tensor.float() * torch.linspace(-1, 1, tensor.numel()).cos().view_as(tensor)).sum()


def compressor(**settings) -> MambaMiaCompressor:
    torch.manual_seed(0)
    config = MambaMiaCompressorConfig(
        **{
            "input_size": 24,
            "output_size": 32,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 2,
            "patches_per_anchor": 4,
            "chunk_size": 32,
            "initializer_range": 0.2,
            **settings,
        }
    )
    return MambaMiaCompressor(config).eval()


def train_compressor() -> dict[str, Tensor]:
    """Anchors, Δ and the gradient of every parameter."""
    model = compressor()
    output = model(draw(1, 3, 12, 24), return_dict=True)
    (weighted(output.last_hidden_state) + weighted(output.frame_deltas)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"anchors": output.last_hidden_state, "deltas": output.frame_deltas, **gradients}


@torch.no_grad()
def compress_in_segments() -> dict[str, Tensor]:
    """Anchors and Δ at inference, of a sequence in segments."""
    output = compressor()(draw(1, 4, 16, 24), return_dict=True)
    return {"anchors": output.last_hidden_state, "deltas": output.frame_deltas}


@torch.no_grad()
def boundary() -> dict:
    """What crosses the line to the kernel in one bidirectional mixer in bfloat16, and what is copied on the way."""
    mixer = compressor().layers[0].mixer.bfloat16()
    hidden_states = draw(1, SEQUENCE_LENGTH, 32).bfloat16()
    calls.clear()
    with recorder:
        mixer(hidden_states)
    return {
        "calls": [{name: described(value) for name, value in call.items()} for call in calls],
        "copies": recorder.copies,
    }


def described(value):
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {
            "dtype": value.dtype,
            "shape": tuple(value.shape),
            "stride": value.stride(),
            "storage": storage.data_ptr(),
            "storage_bytes": storage.nbytes(),
        }
    return tuple(described(entry) for entry in value) if isinstance(value, tuple) else value


def main(output: str):
    results = {}
    for name, arguments in scan_cases().items():
        results[name] = tuple(scan(engine, arguments) for engine in (ssd._kernel_chunk_scan, ssd._torch_chunk_scan))
    compressor_segments.SEGMENT_TOKENS["cpu"] = 30
    pytorch_engine = ssd._torch_chunk_scan
    for name, function in (("trained compressor", train_compressor), ("compressor in segments", compress_in_segments)):
        given = []
        for engine in (ssd._kernel_chunk_scan, pytorch_engine):
            ssd._torch_chunk_scan = engine  # what tensors on the CPU go to
            torch.manual_seed(1)
            calls.clear()
            given.append(function())
            if engine is not pytorch_engine:
                results[f"{name}, calls"] = len(calls)
        results[name] = tuple(given)
    ssd._torch_chunk_scan = ssd._kernel_chunk_scan
    ssd._torch_causal_conv1d = unrecorded(ssd._torch_causal_conv1d)  # on a GPU that is a kernel too
    results["boundary"] = boundary()
    torch.save(results, output)


if __name__ == "__main__":
    main(sys.argv[1])
