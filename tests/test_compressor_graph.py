"""The compressor as one graph of any number of frames: `torch.compile`, `torch.export`, ONNX."""

import inspect
from pathlib import Path

import pytest
import torch
from pages import code_with
from tiny_model import tiny_compressor_config
from torch import nn
from torch._dynamo.testing import CompileCounter

from mambamia_hf import MambaMiaCompressor
from mambamia_hf.modeling_compressor import MambaMiaMamba2SSM


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "prefer_deferred_runtime_asserts_over_guards" not in inspect.signature(torch.export.export).parameters,
        reason="this torch.export cannot leave conditions on sizes to run time, and this torch.compile fails",
    ),
]
COOKBOOK = Path(__file__).parents[1] / "docs" / "cookbook.md"
# Of each kind of layer one; lengths on both sides of a chunk of 16 tokens and of a group of 16 chunks.
VARIANTS = [
    {},
    {"gpa_placement": "pre_mixer", "n_groups": 2},
    {"bidirectional": False, "gpa_placement": None, "temporal_bidirectional": True},
]
LENGTHS = [8, 3, 17, 70]


def compressor_and_features(num_frames: list[int], **config) -> tuple[MambaMiaCompressor, list[torch.Tensor]]:
    torch.manual_seed(0)
    config = tiny_compressor_config(initializer_range=0.3, num_temporal_layers=1, **config)
    compressor = MambaMiaCompressor(config).eval()
    shape = (4 * compressor.config.patches_per_anchor, compressor.config.input_size)
    return compressor, [torch.randn(1, frames, *shape) for frames in num_frames]


def check_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("config", "learns"), [*((config, False) for config in VARIANTS), (VARIANTS[0], True)])
def test_one_graph_is_compiled_for_all_lengths(config, learns):
    compressor, features = compressor_and_features(LENGTHS, **config)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(compressor, backend=counter, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(learns):
        for part in features:
            check_equal(compiled(part), compressor(part))
    assert counter.frame_count == 1


@pytest.mark.parametrize("learns", [False, True])
def test_scans_are_operators_unless_something_learns(learns):
    """A compiled graph runs the engines; their gradient is that of the steps of a scan, spelt out."""
    compressor, (features, *_) = compressor_and_features(LENGTHS)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(compressor, backend=keep, fullgraph=True, dynamic=True)
    gradients = []
    with torch.set_grad_enabled(learns):
        for run in (compiled, compressor):
            result = run(features).last_hidden_state
            if learns:
                gradients.append(torch.autograd.grad(result.sum(), list(compressor.parameters())))
    (graph,) = graphs
    scans = [node for node in graph.graph.nodes if node.op == "call_function" and "chunk_scan" in str(node.target)]
    assert len(scans) == (0 if learns else sum(isinstance(part, MambaMiaMamba2SSM) for part in compressor.modules()))
    for found, expected in zip(*gradients, strict=True) if learns else ():
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("config", VARIANTS)
def test_exported_with_any_number_of_frames(config):
    compressor, (example, *others) = compressor_and_features(LENGTHS, **config)
    frames = torch.export.Dim("frames", min=3, max=4096)
    with torch.no_grad():
        exported = torch.export.export(
            compressor,
            (example,),
            dynamic_shapes={"patch_features": {1: frames}},
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        for part in others:
            check_equal(exported.module()(part), compressor(part))


def test_onnx(tmp_path, monkeypatch):
    """The cookbook's block runs as it stands; onnxruntime gives what the compressor gives."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra 'onnx'")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(code_with(COOKBOOK, "python", "onnxruntime"), str(COOKBOOK), "exec"), namespace)
    compressor, session, names = (namespace[name] for name in ("compressor", "session", "names"))
    assert isinstance(compressor, nn.Module) and not compressor.training
    for frames in (3, 20, 150):
        features = torch.randn(1, frames, 36, compressor.config.input_size)
        with torch.no_grad():
            expected = compressor(features)
        found = session.run(names, {"patch_features": features.numpy()})
        check_equal(dict(zip(names, map(torch.from_numpy, found), strict=True)), dict(expected))
