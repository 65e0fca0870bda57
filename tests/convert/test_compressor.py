"""The compressor alone, from its released tensors and back."""

import pytest
import torch
from original_checkpoint import SIZES, original_compressor

from mambamia_hf import MambaMiaCompressor
from mambamia_hf.convert import compressor_from_original, compressor_to_original


@pytest.mark.parametrize("prefix", ["", "model.mm_projector.", "model.video_audio_compressor."])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_compressor_round_trip(prefix, bidirectional):
    tensors = original_compressor(bidirectional)
    compressor = compressor_from_original({prefix + name: tensor for name, tensor in tensors.items()}, **SIZES)
    assert isinstance(compressor, MambaMiaCompressor) and not compressor.training
    expected = {"hidden_size": 32, "num_hidden_layers": 2, "expand": 2, "conv_kernel": 4, "patches_per_anchor": 4}
    expected |= {"bidirectional": bidirectional, "gpa_placement": "pre_mixer", "num_temporal_layers": 0, **SIZES}
    assert {name: getattr(compressor.config, name) for name in expected} == expected
    back = compressor_to_original(compressor)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_compressor_does_not_share_its_tensors():
    tensors = {name: tensor.bfloat16() for name, tensor in original_compressor().items()}
    compressor = compressor_from_original(tensors, **SIZES)
    assert compressor.dtype == torch.bfloat16
    before = tensors["query_token"].clone()
    with torch.no_grad():
        compressor.anchor.zero_()
    assert torch.equal(tensors["query_token"], before) and compressor.anchor.requires_grad


def test_compressor_with_input_norm():
    compressor = compressor_from_original(original_compressor(input_norm=True), **SIZES)
    assert compressor.config.input_norm
    tensors = original_compressor(input_norm=True)
    features = torch.randn(1, 2, 8, 24, generator=torch.Generator().manual_seed(1))
    patches = features @ tensors["input_proj.weight"].T + tensors["input_proj.bias"]
    rows = patches.unflatten(2, (2, 4)).flatten(0, 2)
    rows = torch.cat([rows, tensors["query_token"].expand(len(rows), 1, -1)], dim=1)
    normed = torch.nn.functional.layer_norm(
        rows, (32,), tensors["input_norm.weight"], tensors["input_norm.bias"], 1e-6
    )
    seen = []
    compressor.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    compressor(features)
    torch.testing.assert_close(seen[0], normed.flatten(0, 1)[None])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"head_dim": 32}, "head_dim=32 disagrees.*64 in 4 heads; set head_dim=16"),
        ({"state_size": 16}, "state_size=16 disagree.*product has to be 8"),
        ({"n_groups": 2}, "n_groups=2.*product has to be 8"),
    ],
)
def test_sizes_that_disagree_with_the_shapes(sizes, message):
    with pytest.raises(ValueError, match=message):
        compressor_from_original(original_compressor(), **{**SIZES, **sizes})


def test_compressor_tensors_that_do_not_fit():
    tensors = original_compressor()
    del tensors["model.layers.1.mixer.D_b"], tensors["query_token"]
    tensors["model.layers.0.mixer.dt_proj.weight"] = torch.zeros(3)
    tensors["model.norm_f.weight"] = torch.zeros(33)
    message = (
        r"1 unknown: model\.layers\.0\.mixer\.dt_proj\.weight; "
        r"2 missing: model\.layers\.1\.mixer\.D_b, query_token; "
        r"1 of a wrong shape: model\.norm_f\.weight \(\(33,\), expected \(32,\)\)\."
    )
    with pytest.raises(ValueError, match=message):
        compressor_from_original(tensors, **SIZES)
    del tensors["input_proj.weight"]
    with pytest.raises(ValueError, match="lacks the tensors input_proj.weight"):
        compressor_from_original(tensors, **SIZES)
