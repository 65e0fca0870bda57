import pytest
import torch
from accelerate import cpu_offload
from tiny_model import tiny_compressor_config
from torch import nn

from mambamia_hf import MambaMiaCompressor, compressor_segments
from mambamia_hf.compressor_segments import embed_in_segments, run_in_segments, segment_rows


PLACEMENTS = ["post_mixer", "pre_mixer", None]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Tests have several segments, the last of them shorter, unless they choose otherwise."""
    monkeypatch.setitem(compressor_segments.SEGMENT_TOKENS, "cpu", 40)


def tiny_compressor(**kwargs) -> MambaMiaCompressor:
    torch.manual_seed(0)
    compressor = MambaMiaCompressor(tiny_compressor_config(initializer_range=0.3, **kwargs)).eval()
    for layer in compressor.layers if compressor.config.gpa_placement is not None else ():
        layer.gpa.weight_proj.weight.data.normal_()  # far from uniform weights
        layer.gpa.gate_proj.weight.data.normal_()
    return compressor


def longest_projection(compressor: MambaMiaCompressor) -> list[int]:
    """Keeps the number of tokens that a mixer of stage 1 took at once, at most, in a list of one entry."""
    longest = [0]
    for layer in compressor.layers:
        layer.mixer.in_proj.register_forward_hook(
            lambda module, args, output: longest.append(max(longest.pop(), args[0].shape[1]))
        )
    return longest


def test_segment_rows(monkeypatch):
    monkeypatch.setitem(compressor_segments.SEGMENT_TOKENS, "cpu", 1200)
    monkeypatch.setitem(compressor_segments.SEGMENT_TOKENS, "cuda", 4800)
    assert segment_rows(1, 25, torch.device("cpu")) == 48
    assert segment_rows(4, 25, torch.device("cpu")) == 12
    assert segment_rows(1, 25, torch.device("cuda")) == 192
    assert segment_rows(9, 730, torch.device("cpu")) == 1  # one row where a row is already too long


@pytest.fixture(params=[True, False], ids=["project twice", "keep inputs"])
def projects_twice(request, monkeypatch):
    """Inputs of the scans are computed once more, as on a CPU, or kept, as on a GPU."""
    monkeypatch.setattr(compressor_segments, "PROJECTS_TWICE", {"cpu"} if request.param else set())
    return request.param


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("variant", [{}, {"bidirectional": False}, {"n_groups": 2}, {"conv_kernel": 2}], ids=str)
@pytest.mark.parametrize("anchors_only", [False, True])
@pytest.mark.parametrize(("rows", "segment_tokens"), [(1, 8), (3, 8), (7, 16), (20, 40), (21, 48), (21, 1000)])
def test_block_in_segments_equals_the_plain_block(
    placement, variant, anchors_only, rows, segment_tokens, projects_twice, monkeypatch
):
    monkeypatch.setitem(compressor_segments.SEGMENT_TOKENS, "cpu", segment_tokens)
    block = tiny_compressor(gpa_placement=placement, **variant).double().layers[0]
    hidden_states = torch.randn(2, 4 * rows, 16, dtype=torch.float64)
    expected = block(hidden_states, anchors_only)
    assert expected.requires_grad and expected.shape[1] == (rows if anchors_only else 4 * rows)
    torch.testing.assert_close(block(hidden_states.clone(), anchors_only, needs_gradient=False), expected.detach())


@pytest.mark.parametrize(
    "variant",
    [
        *({"gpa_placement": placement} for placement in PLACEMENTS),
        {"bidirectional": False},
        {"patches_per_anchor": 1},
        {"patches_per_anchor": 9},
        {"conv_kernel": 1},
        {"n_groups": 2},
        {"input_norm": True},
        {"num_hidden_layers": 1},
        {"num_temporal_layers": 0},
        {"mixer_type": "mamba1"},
    ],
    ids=str,
)
@pytest.mark.parametrize("frames", [1, 7, 20])
def test_compressor_in_segments_equals_the_plain_one(variant, frames):
    compressor = tiny_compressor(**variant).double()
    features = torch.randn(2, frames, 9, 12, dtype=torch.float64)
    plain = compressor(features)
    with torch.no_grad():
        in_segments = compressor(features)
    torch.testing.assert_close(in_segments.last_hidden_state, plain.last_hidden_state)
    torch.testing.assert_close(in_segments.frame_deltas, plain.frame_deltas)


def test_videos_of_different_lengths_in_segments():
    compressor = tiny_compressor().double()
    features = torch.randn(3, 9, 9, 12, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [2], [5]])
    plain = compressor(features, frame_mask=mask)
    with torch.no_grad():
        in_segments = compressor(features, frame_mask=mask)
    torch.testing.assert_close(in_segments.last_hidden_state, plain.last_hidden_state)
    torch.testing.assert_close(in_segments.frame_deltas, plain.frame_deltas)


def test_embedding_in_segments():
    compressor = tiny_compressor(input_norm=True)
    features = torch.randn(2, 7, 9, 12)
    with torch.no_grad():
        torch.testing.assert_close(embed_in_segments(compressor, features), compressor.embed(features))


def test_segments_leave_the_features_as_they_are():
    compressor = tiny_compressor(input_size=16)
    features = torch.randn(1, 4, 9, 16)
    before = features.clone()
    with torch.no_grad():
        compressor(features)
    assert torch.equal(features, before)


def test_without_a_gradient_no_mixer_takes_more_than_a_segment():
    compressor = tiny_compressor()
    longest = longest_projection(compressor)
    with torch.no_grad():
        compressor(torch.randn(1, 20, 9, 12))
    assert longest == [40]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_compressor_runs_in_segments_outside_no_grad(training, checkpointing):
    compressor = tiny_compressor(gpa_dropout=0.0).double().train(training)
    features = torch.randn(1, 20, 9, 12, dtype=torch.float64)
    expected = compressor(features).last_hidden_state.detach()
    compressor.requires_grad_(False)
    if checkpointing:
        compressor.gradient_checkpointing_enable()
    longest = longest_projection(compressor)
    anchors = compressor(features).last_hidden_state
    assert longest == [40] and not anchors.requires_grad
    torch.testing.assert_close(anchors, expected)


def test_a_frozen_compressor_gives_its_input_a_gradient():
    compressor = tiny_compressor().double()
    features = torch.randn(2, 6, 9, 12, dtype=torch.float64, requires_grad=True)
    compressor(features).last_hidden_state.square().sum().backward()
    expected, features.grad = features.grad, None
    compressor.requires_grad_(False)
    compressor(features).last_hidden_state.square().sum().backward()
    torch.testing.assert_close(features.grad, expected)
    assert features.grad.abs().min() > 0


@pytest.mark.parametrize("name", ["anchor", "layers.0.mixer.backward_ssm.A_log", "layers.1.gpa.gate_proj.bias"])
def test_a_single_learning_parameter_gets_its_gradient(name):
    compressor = tiny_compressor().double()
    features = torch.randn(1, 6, 9, 12, dtype=torch.float64)
    parameter = compressor.get_parameter(name)
    compressor(features).last_hidden_state.square().sum().backward()
    expected, parameter.grad = parameter.grad, None
    compressor.requires_grad_(False)
    parameter.requires_grad_()
    compressor(features).last_hidden_state.square().sum().backward()
    torch.testing.assert_close(parameter.grad, expected)
    assert parameter.grad.abs().max() > 0


def test_an_adapter_on_a_frozen_compressor_learns_and_runs_in_segments():
    peft = pytest.importorskip("peft")
    compressor = tiny_compressor().double()
    features = torch.randn(1, 10, 9, 12, dtype=torch.float64)
    settings = peft.LoraConfig(r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(compressor, settings).double().eval()
    plain = adapted(features).last_hidden_state
    plain.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 2 * 2 * 3 and all(gradient.abs().max() > 0 for gradient in gradients.values())
    with torch.no_grad():
        torch.testing.assert_close(adapted(features).last_hidden_state, plain)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_layer_in_place_of_the_input_projection_is_called(placement):
    """A quantized layer, for one, cannot compute a part of its output features."""
    compressor = tiny_compressor(gpa_placement=placement).double()
    features = torch.randn(1, 4, 9, 12, dtype=torch.float64)
    expected = compressor(features).last_hidden_state
    for layer in compressor.layers:
        linear = nn.Linear(*reversed(layer.mixer.in_proj.weight.shape), bias=False)
        linear.weight = layer.mixer.in_proj.weight
        layer.mixer.in_proj = linear
    torch.testing.assert_close(compressor(features).last_hidden_state, expected)
    with torch.no_grad():
        torch.testing.assert_close(compressor(features).last_hidden_state, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_offloaded_weights_in_segments(placement):
    compressor = tiny_compressor(gpa_placement=placement)
    features = torch.randn(1, 10, 9, 12)
    with torch.no_grad():
        expected = compressor(features).last_hidden_state
        cpu_offload(compressor, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in compressor.parameters()} == {"meta"}
        torch.testing.assert_close(compressor(features).last_hidden_state, expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_half_precision_in_segments(placement):
    compressor = tiny_compressor(gpa_placement=placement)
    features = torch.randn(1, 6, 9, 12)
    expected = compressor(features).last_hidden_state
    with torch.no_grad():
        half = compressor.bfloat16()(features.bfloat16()).last_hidden_state
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() / expected.norm() < 0.05


def test_mamba1_blocks_are_refused():
    block = tiny_compressor(mixer_type="mamba1").layers[0]
    with pytest.raises(ValueError, match="Mamba-1 scan cannot start from a state"):
        run_in_segments(block, torch.randn(1, 8, 16), anchors_only=False)
