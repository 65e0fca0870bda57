"""The tower up to the layer that is read, against all hidden states of the whole tower."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, ResNetConfig

from mambamia_hf.vision_tower import tower_until


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SETTINGS = {
    "clip_vision_model": {"image_size": 32, "patch_size": 8},
    "siglip_vision_model": {"image_size": 32, "patch_size": 8},
    "siglip2_vision_model": {"num_patches": 16, "patch_size": 8},
}


def tower_of(model_type: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(model_type, **SIZES, **SETTINGS[model_type])).eval()


def pixels(model_type: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model_type == "siglip2_vision_model":
        return {
            "pixel_values": torch.randn(2, 16, 192, generator=generator),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
        }
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


@pytest.mark.parametrize("model_type", SETTINGS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_every_layer(model_type, implementation):
    tower, inputs = tower_of(model_type), pixels(model_type)
    tower.set_attn_implementation(implementation)
    views = [tower_until(tower, layer)(**inputs).last_hidden_state for layer in range(4)]
    outputs = tower(**inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    for view, expected in zip(views, outputs.hidden_states, strict=True):
        assert torch.equal(view, expected)


@torch.no_grad()
def test_later_layers_are_not_run_and_the_tower_stays_as_it_is():
    tower, inputs = tower_of("siglip_vision_model"), pixels("siglip_vision_model")
    before = tower(**inputs)
    expected = tower_until(tower, 2)(**inputs).last_hidden_state
    for broken in (tower.encoder.layers[2], tower.post_layernorm, tower.head):
        broken.forward = None  # would raise when called
    assert torch.equal(
        tower_until(copy.deepcopy(tower_of("siglip_vision_model")), 2)(**inputs).last_hidden_state, expected
    )
    del tower.post_layernorm.forward
    assert torch.equal(tower_until(tower, 2)(**inputs).last_hidden_state, expected)
    del tower.encoder.layers[2].forward, tower.head.forward
    after = tower(**inputs)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    assert torch.equal(after.pooler_output, before.pooler_output)


def test_gradients():
    whole, cut = tower_of("siglip_vision_model"), tower_of("siglip_vision_model")
    inputs = pixels("siglip_vision_model")
    whole(**inputs, output_hidden_states=True).hidden_states[2].square().sum().backward()
    tower_until(cut, 2)(**inputs).last_hidden_state.square().sum().backward()
    for (name, expected), found in zip(whole.named_parameters(), cut.parameters(), strict=True):
        if expected.grad is None:
            assert found.grad is None, name
        else:
            torch.testing.assert_close(found.grad, expected.grad)


def hooked(tower: nn.Module) -> nn.Module:
    tower.encoder.register_forward_hook(lambda *_: None)
    return tower


def compiled(tower: nn.Module) -> nn.Module:
    tower.compile(backend="eager")
    return tower


@pytest.mark.parametrize("change", [hooked, compiled, nn.Sequential])
def test_towers_that_do_more(change):
    assert tower_until(change(tower_of("clip_vision_model")), 2) is None


def test_another_kind_of_tower():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    assert tower_until(AutoModel.from_config(config), 1) is None
