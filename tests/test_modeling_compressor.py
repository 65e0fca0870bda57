import pytest
import torch
from golden import load_golden
from tiny_model import tiny_compressor_config
from torch import nn

from mambamia_hf import MambaMiaCompressor, MambaMiaCompressorConfig
from mambamia_hf.convert import compressor_from_original
from mambamia_hf.modeling_compressor import MambaMiaGatedPatchAggregation


PLACEMENTS = ["post_mixer", "pre_mixer", None]


def tiny_compressor(**kwargs) -> MambaMiaCompressor:
    torch.manual_seed(0)
    return MambaMiaCompressor(tiny_compressor_config(**kwargs)).eval()


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_golden_mixer(direction):
    tensors, settings = load_golden(f"mixer_{direction}")
    hidden_states, expected = tensors.pop("input"), tensors.pop("output")
    around = {"norm.weight": (64,), "weight_fc.weight": (3, 64), "weight_fc.bias": 3, "gate_fc.weight": (1, 64)}
    state_dict = {f"model.layers.0.{name}": torch.ones(shape) for name, shape in {**around, "gate_fc.bias": 1}.items()}
    state_dict |= {f"model.layers.0.mixer.{name}": tensor for name, tensor in tensors.items()}
    state_dict |= {f"{name}.weight": torch.ones(64, 64) for name in ("input_proj", "output_proj")}
    for name in ("input_proj.bias", "output_proj.bias", "query_token", "model.norm_f.weight"):
        state_dict[name] = torch.ones(64)
    mixer = compressor_from_original(state_dict, **golden_sizes(settings)).layers[0].mixer
    torch.testing.assert_close(mixer(hidden_states)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_golden_compressor(direction):
    tensors, settings = load_golden(f"compressor_{direction}")
    features, expected = tensors.pop("input"), tensors.pop("output")
    compressor = compressor_from_original(tensors, **golden_sizes(settings))
    output = compressor(features)
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-4, rtol=0)
    assert output.frame_deltas is None


def golden_sizes(settings: dict[str, str]) -> dict[str, int]:
    return {name: int(settings[name]) for name in ("head_dim", "state_size", "n_groups", "chunk_size")}


def test_output_shapes():
    output = tiny_compressor()(torch.randn(2, 5, 9, 12))
    assert output.last_hidden_state.shape == (2, 5, 3, 20)
    assert output.frame_deltas.shape == (2, 5) and (output.frame_deltas >= 0).all()
    assert isinstance(tiny_compressor()(torch.randn(2, 5, 9, 12), return_dict=False), tuple)


def test_sequence_order():
    compressor = tiny_compressor(hidden_size=1, expand=8)
    nn.init.constant_(compressor.anchor, -1)
    patches = torch.arange(12.0).reshape(1, 2, 6, 1)
    expected = [0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1]
    assert compressor.insert_anchors(patches).flatten().tolist() == expected


@pytest.mark.parametrize("placement", ["post_mixer", "pre_mixer"])
def test_gated_patch_aggregation(placement):
    torch.manual_seed(0)
    gpa = MambaMiaGatedPatchAggregation(tiny_compressor_config(gpa_placement=placement)).eval()
    hidden_states = torch.randn(2, 8, 16)
    output = gpa(hidden_states)
    for row in range(2):
        patches, q = hidden_states[:, 4 * row : 4 * row + 3], hidden_states[:, 4 * row + 3]
        alpha = (q @ gpa.weight_proj.weight.T + gpa.weight_proj.bias).softmax(-1)
        gate = torch.sigmoid(q @ gpa.gate_proj.weight.T + gpa.gate_proj.bias)
        gate = 0.01 + 0.98 * gate if placement == "pre_mixer" else gate
        expected = (1 - gate) * q + gate * (alpha[..., None] * patches).sum(1)
        torch.testing.assert_close(output[:, 4 * row + 3], expected)
        assert torch.equal(output[:, 4 * row : 4 * row + 3], patches)


def test_gpa_starts_uniform_and_half_open():
    gpa = tiny_compressor().layers[0].gpa
    anchors = torch.randn(50, 16)
    torch.testing.assert_close(gpa.weight_proj(anchors).softmax(-1), torch.full((50, 3), 1 / 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(gpa.gate_proj(anchors).sigmoid(), torch.full((50, 1), 0.5), atol=1e-3, rtol=0)


def test_frame_deltas_are_the_scans_own_step_size():
    compressor = tiny_compressor(num_temporal_layers=1)
    steps = []
    mixer = compressor.temporal_layers[0].mixer
    mixer.register_forward_hook(lambda module, args, output: steps.append(module.in_proj(args[0])[..., -4:]))
    deltas = compressor(torch.randn(1, 5, 9, 12)).frame_deltas
    expected = nn.functional.softplus(steps[0] + mixer.forward_ssm.dt_bias).mean(dim=(0, 2))
    torch.testing.assert_close(deltas[0], expected)


def test_time_step_limit_bounds_the_deltas():
    compressor = tiny_compressor(time_step_limit=(0.01, 0.02))
    deltas = compressor(100 * torch.randn(1, 5, 9, 12)).frame_deltas
    assert (deltas >= 0.01).all() and (deltas <= 0.02 + 1e-6).all()


def test_temporal_layer_is_causal_and_stage_one_is_not():
    compressor = tiny_compressor()
    features = torch.randn(1, 6, 9, 12, requires_grad=True)
    compressor(features).last_hidden_state[0, 0].sum().backward()
    assert features.grad[0, 5].abs().max() > 0
    causal = tiny_compressor(bidirectional=False)
    features.grad = None
    causal(features).last_hidden_state[0, 2].sum().backward()
    assert features.grad[0, 3:].abs().max() == 0 and features.grad[0, 0].abs().max() > 0


@pytest.mark.parametrize("temporal_bidirectional", [False, True])
def test_videos_of_different_lengths_give_what_each_gives_alone(temporal_bidirectional):
    compressor = tiny_compressor(temporal_bidirectional=temporal_bidirectional)
    lengths = [5, 2, 7, 5]
    features = torch.full((4, 7, 9, 12), torch.nan)
    mask = torch.zeros(4, 7, dtype=torch.bool)
    for video, length in enumerate(lengths):
        features[video, :length] = torch.randn(length, 9, 12)
        mask[video, :length] = True
    output = compressor(features, frame_mask=mask)
    for video, length in enumerate(lengths):
        alone = compressor(features[video : video + 1, :length])
        torch.testing.assert_close(output.last_hidden_state[video, :length], alone.last_hidden_state[0])
        torch.testing.assert_close(output.frame_deltas[video, :length], alone.frame_deltas[0])
        assert output.last_hidden_state[video, length:].abs().sum() == 0
        assert output.frame_deltas[video, length:].abs().sum() == 0


def test_masked_batch_has_a_gradient():
    compressor = tiny_compressor()
    features = torch.randn(2, 4, 9, 12, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    compressor(features, frame_mask=mask).last_hidden_state.sum().backward()
    assert features.grad[1, :2].abs().min() > 0 and features.grad[1, 2:].abs().max() == 0


def test_gradient_checkpointing_changes_nothing():
    features = torch.randn(1, 4, 9, 12)
    gradients = []
    for checkpointing in (False, True):
        compressor = tiny_compressor(gpa_dropout=0.0).train()
        if checkpointing:
            compressor.gradient_checkpointing_enable()
        compressor(features).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad for parameter in compressor.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("settings", [{}, {"temporal_bidirectional": True}, {"mixer_type": "mamba1"}])
def test_length_scale_is_for_training_alone(settings):
    compressor = tiny_compressor(gpa_dropout=0.0, initializer_range=0.5, **settings)
    features = torch.randn(2, 8, 9, 12)
    expected = compressor(features)
    compressor.config.length_scale = 4.0
    assert torch.equal(compressor(features).last_hidden_state, expected.last_hidden_state)
    stretched = compressor.train()(features)
    torch.testing.assert_close(stretched.frame_deltas, expected.frame_deltas)
    assert not torch.allclose(stretched.last_hidden_state, expected.last_hidden_state, atol=1e-3)
    compressor.config.length_scale = 1.0
    torch.testing.assert_close(compressor(features).last_hidden_state, expected.last_hidden_state)


def test_length_scale_is_a_larger_step_in_the_quieter_half():
    ssm = tiny_compressor().temporal_layers[0].mixer.forward_ssm
    inputs = torch.randn(2, 6, sum(ssm.input_split))
    _, delta, _ = ssm(inputs)
    torch.manual_seed(0)
    y, same_delta, _ = ssm(inputs, length_scale=4.0)
    assert torch.equal(same_delta, delta)
    torch.manual_seed(0)
    factor = 1 + 6 * torch.rand(2, 1, 1)
    quiet = delta.mean(dim=-1).argsort(dim=1)[:, :3]
    steps = delta.clone()
    for row in range(2):
        steps[row, quiet[row]] *= factor[row]
    inputs[..., -ssm.config.num_heads :] = torch.log(torch.expm1(steps)) - ssm.dt_bias  # Δ = softplus(dt + dt_bias)
    torch.testing.assert_close(y, ssm(inputs)[0])


def test_save_and_load(tmp_path):
    compressor = tiny_compressor()
    compressor.save_pretrained(tmp_path)
    loaded = MambaMiaCompressor.from_pretrained(tmp_path)
    features = torch.randn(1, 3, 9, 12)
    torch.testing.assert_close(loaded.state_dict(), compressor.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(loaded(features).last_hidden_state, compressor(features).last_hidden_state)


def test_wrong_shapes_are_named():
    compressor = tiny_compressor()
    with pytest.raises(ValueError, match="10 patches.*patches_per_anchor=3"):
        compressor(torch.randn(1, 2, 10, 12))
    with pytest.raises(ValueError, match="13 wide and input_size is 12"):
        compressor(torch.randn(1, 2, 9, 13))
    with pytest.raises(ValueError, match=r"num_frames, num_patches.*not \(2, 9, 12\)"):
        compressor(torch.randn(2, 9, 12))
    with pytest.raises(ValueError, match="without frames"):
        compressor(torch.randn(1, 0, 9, 12))
    with pytest.raises(ValueError, match="without frames"):
        compressor(torch.randn(2, 2, 9, 12), frame_mask=torch.tensor([[True, True], [False, False]]))
    with pytest.raises(ValueError, match=r"frame_mask must be .*\(1, 2\) here, not \(1, 3\)"):
        compressor(torch.randn(1, 2, 9, 12), frame_mask=torch.ones(1, 3))


@pytest.mark.parametrize("conv_kernel", [1, 2, 4])
@pytest.mark.parametrize("cuts", [[5], [1, 2, 3], [2, 8], [9]], ids=str)
def test_scan_goes_on_from_a_state(conv_kernel, cuts):
    ssm = tiny_compressor(conv_kernel=conv_kernel, initializer_range=0.3).double().layers[0].mixer.forward_ssm
    inputs = torch.randn(2, 10, sum(ssm.input_split), dtype=torch.float64)
    expected = ssm(inputs)
    state, outputs, deltas = None, [], []
    for part in inputs.tensor_split(cuts, dim=1):
        before = state
        y, delta, state = ssm(part, before)
        nothing, same_delta, same_state = ssm(part, before, stride=None)
        assert nothing.shape == (2, 0, y.shape[-1]) and torch.equal(same_delta, delta)
        torch.testing.assert_close(same_state, state)
        outputs.append(y)
        deltas.append(delta)
    torch.testing.assert_close((torch.cat(outputs, dim=1), torch.cat(deltas, dim=1), state), expected)
    assert state.conv.shape == (2, conv_kernel - 1, ssm.input_split[0]) and state.ssm.shape == (2, 4, 8, 4)


def test_a_causal_mixer_goes_on_from_a_state():
    mixer = tiny_compressor(initializer_range=0.3).double().temporal_layers[0].mixer
    hidden_states = torch.randn(3, 9, 16, dtype=torch.float64)
    expected, expected_delta, _ = mixer(hidden_states)
    first, first_delta, state = mixer(hidden_states[:, :4])
    second, second_delta, _ = mixer(hidden_states[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected)
    torch.testing.assert_close(torch.cat([first_delta, second_delta], dim=1), expected_delta)


def test_mamba1_refuses_a_state():
    compressor = tiny_compressor()
    _, _, state = compressor.temporal_layers[0].mixer(torch.randn(1, 4, 16))
    mixer = tiny_compressor(mixer_type="mamba1").temporal_layers[0].mixer
    with pytest.raises(ValueError, match="Mamba-1 scan cannot start from a state"):
        mixer(torch.randn(1, 4, 16), state)


@pytest.mark.parametrize(
    "variant",
    [
        {"mixer_type": "mamba1"},
        {"mixer_type": "mamba1", "bidirectional": False, "gpa_placement": "pre_mixer"},
        {"bidirectional": False},
        {"gpa_placement": "pre_mixer"},
        {"gpa_placement": None},
        {"num_temporal_layers": 0},
        {"temporal_bidirectional": True},
        {"num_temporal_layers": 2},
        {"input_norm": True},
        {"patches_per_anchor": 1},
        {"patches_per_anchor": 9},
        {"n_groups": 2, "expand": 4},
    ],
    ids=str,
)
def test_variant_learns_saves_and_loads(variant, tmp_path):
    compressor = tiny_compressor(**variant).train()
    features = torch.randn(2, 4, 9, 12)
    target = torch.randn(2, 4, 9 // compressor.config.patches_per_anchor, 20)
    optimizer = torch.optim.Adam(compressor.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (compressor(features).last_hidden_state - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in compressor.parameters())
    compressor.eval().save_pretrained(tmp_path)
    loaded = MambaMiaCompressor.from_pretrained(tmp_path)
    output, expected = loaded(features), compressor(features)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert (output.frame_deltas is None) == (compressor.config.num_temporal_layers == 0)


def test_mamba1_deltas_are_positive():
    deltas = tiny_compressor(mixer_type="mamba1")(torch.randn(1, 5, 9, 12)).frame_deltas
    assert deltas.shape == (1, 5) and (deltas > 0).all()


def stage_one(compressor: MambaMiaCompressor, features: torch.Tensor) -> torch.Tensor:
    """The anchors after stage 1 the plain way: every token through every block, then the anchors are read."""
    hidden_states = compressor.embed(features)
    for layer in compressor.layers:
        hidden_states = layer(hidden_states)
    row_length = compressor.config.patches_per_anchor + 1
    return hidden_states[:, row_length - 1 :: row_length]


def stage_one_reading_anchors(compressor: MambaMiaCompressor, features: torch.Tensor) -> torch.Tensor:
    hidden_states = compressor.embed(features)
    for index, layer in enumerate(compressor.layers):
        hidden_states = layer(hidden_states, anchors_only=index == len(compressor.layers) - 1)
    return hidden_states


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("variant", [{}, {"bidirectional": False}, {"mixer_type": "mamba1"}, {"n_groups": 2}], ids=str)
@pytest.mark.parametrize("frames", [1, 5])
def test_reading_only_anchors_changes_nothing(placement, variant, frames):
    compressor = tiny_compressor(gpa_placement=placement, initializer_range=0.3, **variant).double()
    for layer in compressor.layers if placement is not None else ():
        layer.gpa.weight_proj.weight.data.normal_()  # far from uniform weights
        layer.gpa.gate_proj.weight.data.normal_()
    features = torch.randn(2, frames, 9, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for path in (stage_one, stage_one_reading_anchors):
        anchors = path(compressor, features)
        parameters = [parameter for parameter in compressor.layers.parameters()]
        results.append((anchors, torch.autograd.grad(anchors.square().sum(), [features, *parameters])))
    torch.testing.assert_close(results[0], results[1])


def test_initialization_of_the_released_code():
    config = tiny_compressor_config(initialization="released", hidden_size=64, num_temporal_layers=1)
    torch.manual_seed(0)
    compressor = MambaMiaCompressor(config)
    for block in (*compressor.layers, *compressor.temporal_layers):
        for ssm in (block.mixer.forward_ssm, block.mixer.backward_ssm):
            if ssm is not None:
                torch.testing.assert_close(ssm.A_log.detach().exp(), torch.arange(1.0, config.num_heads + 1))
    assert compressor.anchor.std().item() == pytest.approx(64**-0.5, rel=0.3)
    bound = (6 / (config.input_size + config.hidden_size)) ** 0.5
    assert 0.9 * bound < compressor.input_proj.weight.abs().max() <= bound
    assert compressor.output_proj.bias.abs().max() == 0
    again = MambaMiaCompressorConfig(**config.to_dict())
    assert again.initialization == "released"
