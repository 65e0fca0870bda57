"""What the released relatives of MambaMia write: UniMambaMia-AV (LLaVA's layout) and HyperCLOVAX-SEED-Omni."""

import re

import pytest
import torch
from original_checkpoint import Original, load, logits, original_compressor, weights
from tiny import tiny_tokenizer
from tiny_model import random_videos
from torch import nn
from transformers import AutoConfig, SiglipImageProcessor

import mambamia_hf
from mambamia_hf import MambaMiaCompressor, MambaMiaForConditionalGeneration
from mambamia_hf.convert import compressor_from_original, convert_from_original, convert_to_original
from mambamia_hf.inputs import check_checkpoint


PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower.vision_tower.vision_model."


def audio_compressor() -> dict[str, torch.Tensor]:
    """UniMambaMia-AV's: causal, between equal widths without outer projections, with an empty embedding."""
    tensors = original_compressor(bidirectional=False)
    tensors = {name: tensor for name, tensor in tensors.items() if not re.match("(input|output)_proj", name)}
    return {**tensors, "model.embeddings.weight": torch.zeros(0, 32)}


def encoder(name: str) -> dict[str, torch.Tensor]:
    """Tensors of an audio or vision encoder as far as the converter is concerned: many, under a prefix."""
    return {f"{name}.layers.{layer}.{part}.weight": torch.ones(2) for layer in range(12) for part in ("fc1", "fc2")}


def advised_patterns(error: ValueError) -> list[str]:
    """The patterns of the --ignore that an error message advises."""
    return re.findall("'([^']+)'", str(error).partition("--ignore ")[2])


def test_embedding_of_no_vocabulary_is_left_out(tmp_path):
    original = Original()
    original.tensors[f"{PROJECTOR}model.embeddings.weight"] = torch.zeros(0, 32)
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    assert torch.equal(logits(load(tmp_path / "dst")), logits(original.model()))
    original.tensors[f"{PROJECTOR}model.embeddings.weight"] = torch.zeros(1, 32)
    with pytest.raises(ValueError, match=f"1 unknown: {PROJECTOR}model.embeddings.weight"):
        convert_from_original(original.write(tmp_path / "other"), tmp_path / "dst2")


def test_buffers_are_checked_and_left_out(tmp_path):
    original = Original()
    frequencies = 10000.0 ** -(torch.arange(6) / 6)
    for layer in range(2):
        original.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.half()
    original.tensors[f"{TOWER}embeddings.position_ids"] = torch.arange(16)[None]
    original.write(tmp_path / "src")
    convert_from_original(tmp_path / "src", tmp_path / "dst")
    assert torch.equal(logits(load(tmp_path / "dst")), logits(original.model()))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model.layers.1.self_attn.rotary_emb.inv_freq", 20000.0 ** -(torch.arange(6) / 6)),
        (f"{TOWER}embeddings.position_ids", torch.arange(16).flip(0)),
    ],
)
def test_buffers_that_contradict_the_configuration(tmp_path, name, values):
    original = Original()
    original.tensors[name] = values
    with pytest.raises(ValueError, match=f"{re.escape(name)} differs from what the configuration gives"):
        convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")


@pytest.mark.parametrize("absent", [["input_proj"], ["output_proj"], ["input_proj", "output_proj"]])
def test_absent_outer_projections(tmp_path, absent):
    widths = {"vision": {"hidden_size": 32} if "input_proj" in absent else {}}
    widths["text"] = {"hidden_size": 32} if "output_proj" in absent else {}
    original = Original(**widths)
    original.config["mm_hidden_size"] = original.vision.config.hidden_size
    for name in absent:
        for part in ("weight", "bias"):
            del original.tensors[f"{PROJECTOR}{name}.{part}"], original.compressor[f"{name}.{part}"]
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    model = load(tmp_path / "dst")
    converted = logits(model)
    for name in absent:
        setattr(model.model.compressor, name, nn.Identity())
    torch.testing.assert_close(converted, logits(model), rtol=0, atol=0)
    convert_to_original(tmp_path / "dst", tmp_path / "back")
    assert weights(tmp_path / "back").keys() == original.tensors.keys()


@pytest.mark.parametrize("name", ["input_proj", "output_proj"])
def test_projections_may_be_absent_only_between_equal_widths(tmp_path, name):
    original = Original()
    for part in ("weight", "bias"):
        del original.tensors[f"{PROJECTOR}{name}.{part}"]
    with pytest.raises(ValueError, match=f"2 missing: .*{name}.weight|mm_hidden_size=24 disagrees"):
        convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")


@pytest.mark.parametrize("num_layers", [3, 4])
def test_tower_without_its_last_layers(tmp_path, num_layers):
    original = Original(vision={"num_hidden_layers": 4})
    original.config["mm_vision_select_layer"] = num_layers - 5
    original.tensors = {
        name: tensor
        for name, tensor in original.tensors.items()
        if not any(name.startswith(f"{TOWER}encoder.layers.{layer}.") for layer in range(num_layers, 4))
    }
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    model = load(tmp_path / "dst")
    assert model.config.vision_feature_norm and model.config.vision_config.num_hidden_layers == num_layers
    # The released code: the layers deleted, then the tower's last_hidden_state.
    del original.vision.encoder.layers[num_layers:]
    frames = random_videos(1, 3)[0]
    with torch.no_grad():
        expected = original.vision(frames).last_hidden_state
        assert torch.equal(model.model.encode_frames(frames).last_hidden_state, expected)
    convert_to_original(tmp_path / "dst", tmp_path / "back")
    convert_from_original(tmp_path / "back", tmp_path / "again")
    again = load(tmp_path / "again")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("name", ["original_inv_freq", "cos_cached", "sin_cached"])
def test_rotary_buffers_of_other_names(tmp_path, name):
    original = Original()
    frequencies = 10000.0 ** -(torch.arange(6) / 6)
    angles = torch.outer(torch.arange(40), frequencies).repeat(1, 2)[None, None]
    values = {"original_inv_freq": frequencies, "cos_cached": angles.cos(), "sin_cached": angles.sin()}[name]
    original.tensors[f"model.layers.1.self_attn.rotary_emb.{name}"] = values.bfloat16()
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    assert torch.equal(logits(load(tmp_path / "dst")), logits(original.model()))
    original.tensors[f"model.layers.1.self_attn.rotary_emb.{name}"] = -values
    with pytest.raises(ValueError, match=f"rotary_emb.{name} differs from what the configuration gives"):
        convert_from_original(original.write(tmp_path / "other"), tmp_path / "dst2")


def test_advice_spares_what_is_needed(tmp_path):
    original = Original()
    for layer in range(2):
        original.tensors[f"model.layers.{layer}.self_attn.masked_bias"] = torch.tensor(-1e4)
        original.tensors[f"model.layers.{layer}.cross_attn.q_proj.weight"] = torch.ones(3, 3)
    src = original.write(tmp_path / "src")
    with pytest.raises(ValueError, match="4 unknown") as error:
        convert_from_original(src, tmp_path / "dst")
    patterns = advised_patterns(error.value)
    assert patterns == ["model.layers.*.cross_attn.*", "model.layers.*.self_attn.masked_bias"]
    convert_from_original(src, tmp_path / "dst", ignore=patterns)
    assert torch.equal(logits(load(tmp_path / "dst")), logits(original.model()))


@pytest.mark.parametrize(
    "wrapper", ["module.", "base_model.model.", "_orig_mod.", "model.", "module.base_model.model."]
)
def test_names_of_a_wrapped_model(tmp_path, wrapper):
    original = Original()
    expected = logits(original.model())
    original.tensors = {wrapper + name: tensor for name, tensor in original.tensors.items()}
    convert_from_original(original.write(tmp_path / "src", "bin-sharded"), tmp_path / "dst")
    assert torch.equal(logits(load(tmp_path / "dst")), expected)


def test_tower_with_a_hole_in_it(tmp_path):
    original = Original(vision={"num_hidden_layers": 4})
    gone = f"{TOWER}encoder.layers.2."
    original.tensors = {name: tensor for name, tensor in original.tensors.items() if not name.startswith(gone)}
    with pytest.raises(ValueError, match=f"16 missing: {gone}"):
        convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")


def test_audio_is_left_out_only_when_asked_for(tmp_path, caplog):
    original = Original()
    original.tensors |= encoder("model.audio_tower.model")
    original.tensors |= {f"model.mm_audio_projector.{name}": tensor for name, tensor in audio_compressor().items()}
    src = original.write(tmp_path / "src", "safetensors-sharded")
    with pytest.raises(ValueError, match=r"model\.audio_tower\.model\.layers\.0\..*--ignore") as error:
        convert_from_original(src, tmp_path / "dst")
    patterns = advised_patterns(error.value)
    assert patterns == ["model.audio_tower.*", "model.mm_audio_projector.*"]
    convert_from_original(src, tmp_path / "dst", ignore=patterns)
    assert re.search(r"Left out \d+ tensors: model\.audio_tower.*model\.mm_audio_projector", caplog.text)
    assert torch.equal(logits(load(tmp_path / "dst")), logits(original.model()))


@pytest.mark.parametrize("patterns", [["model.audio_twoer.*"], ["model.*", "nothing"]])
def test_pattern_that_matches_nothing(tmp_path, patterns):
    with pytest.raises(ValueError, match=f"No tensor matches the pattern '{re.escape(patterns[-1])}'"):
        convert_from_original(Original().write(tmp_path / "src"), tmp_path / "dst", ignore=patterns)


def test_what_is_needed_cannot_be_ignored(tmp_path):
    with pytest.raises(ValueError, match="1 missing: model.norm.weight"):
        convert_from_original(Original().write(tmp_path / "src"), tmp_path / "dst", ignore=["model.norm.*"])


def test_compressor_of_an_audio_model_is_taken_alone(tmp_path):
    original = Original()
    original.tensors = {name: tensor for name, tensor in original.tensors.items() if PROJECTOR not in name}
    original.tensors |= {f"{PROJECTOR}{layer}.weight": torch.ones(48, 48) for layer in (0, 2)}
    original.tensors |= {f"model.mm_audio_projector.{name}": tensor for name, tensor in audio_compressor().items()}
    original.tensors |= encoder("model.audio_tower.model")
    original.config |= {"mm_projector_type": "mlp2x_gelu", "mm_audio_projector_type": "audio_projector_mambamia2uni"}
    src = original.write(tmp_path / "src", "bin-sharded")
    message = "mm_projector_type='mlp2x_gelu'.*compressor under model.mm_audio_projector. alone.*--ignore"
    with pytest.raises(ValueError, match=message) as error:
        convert_from_original(src, tmp_path / "dst")
    convert_from_original(src, tmp_path / "dst", ignore=advised_patterns(error.value))
    compressor = MambaMiaCompressor.from_pretrained(tmp_path / "dst").eval()
    assert not compressor.config.bidirectional and compressor.config.input_size == 32
    features = torch.randn(1, 2, 8, 32, generator=torch.Generator().manual_seed(0))
    expected = compressor_from_original(audio_compressor())(features).last_hidden_state
    assert torch.equal(compressor(features).last_hidden_state, expected)


def test_compressor_inside_hyperclovax_is_taken_alone(tmp_path):
    tensors = original_compressor(bidirectional=False, input_norm=True, num_layers=1)
    original = Original()
    original.tensors = {f"model.video_audio_compressor.{name}": tensor for name, tensor in tensors.items()}
    for part in ("vision_model.blocks", "mm_projector", "audio_model", "discrete_audio_model", "language_model.model"):
        original.tensors |= encoder(f"model.{part}")
    original.tensors["model.language_model.lm_head.weight"] = torch.ones(3, 2)
    original.config = {"model_type": "hyperclovax_omni", "text_config": {"hidden_size": 48}}
    src = original.write(tmp_path / "src")
    message = "lacks .*mm_vision_tower.*compressor under model.video_audio_compressor. alone.*--ignore"
    with pytest.raises(ValueError, match=message) as error:
        convert_from_original(src, tmp_path / "dst")
    convert_from_original(src, tmp_path / "dst", ignore=advised_patterns(error.value))
    compressor = MambaMiaCompressor.from_pretrained(tmp_path / "dst").eval()
    config = compressor.config
    assert config.input_norm and not config.bidirectional and config.num_hidden_layers == 1
    assert (config.input_size, config.hidden_size, config.output_size) == (24, 32, 48)
    features = torch.randn(1, 2, 8, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        compressor(features).last_hidden_state, compressor_from_original(tensors)(features).last_hidden_state
    )


@pytest.mark.parametrize(
    "prefix",
    ["", "model.mm_projector.", "model.mm_audio_projector.", "mm_projector.", "base_model.model.model.mm_projector."],
)
def test_checkpoint_of_a_compressor_without_a_configuration(tmp_path, prefix):
    original = Original()
    original.tensors = {prefix + name: tensor for name, tensor in original.compressor.items()}
    src = original.write(tmp_path / "src")
    (src / "config.json").unlink()
    convert_from_original(src, tmp_path / "dst")
    loaded = MambaMiaCompressor.from_pretrained(tmp_path / "dst").state_dict()
    expected = compressor_from_original(original.compressor).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)


def test_first_stage_of_training(tmp_path):
    original = Original()
    src = original.write(tmp_path / "src")
    (src / "model.safetensors").unlink()
    torch.save({PROJECTOR + name: tensor for name, tensor in original.compressor.items()}, src / "mm_projector.bin")
    convert_from_original(src, tmp_path / "dst")
    loaded = MambaMiaCompressor.from_pretrained(tmp_path / "dst").state_dict()
    expected = compressor_from_original(original.compressor).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)


def test_adapter_is_no_model(tmp_path):
    src = Original().write(tmp_path / "src")
    (src / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter .*merge it"):  # beside the model, which it would change
        convert_from_original(src, tmp_path / "dst")
    (src / "model.safetensors").rename(src / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds an adapter .*merge it"):
        convert_from_original(src, tmp_path / "dst")


def test_checkpoint_without_a_compressor(tmp_path):
    original = Original()
    original.tensors = {name.replace("mm_projector", "resampler"): t for name, t in original.tensors.items()}
    with pytest.raises(ValueError, match=r"no compressor under model\.mm_projector\..*only .*model\.resampler\."):
        convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")


def test_temporal_layers_among_the_others_or_outside(tmp_path):
    block = {name: t for name, t in original_compressor().items() if name.startswith("model.layers.0.mixer.")}
    for number, place in enumerate((f"{PROJECTOR}model.layers.2.", "model.time_axis_aggregator.", "model.taa.")):
        original = Original()
        original.tensors |= {name.replace("model.layers.0.", place): tensor for name, tensor in block.items()}
        original.tensors |= encoder("model.audio_tower.model")
        with pytest.raises(ValueError, match="temporal layers has been released") as error:
            convert_from_original(original.write(tmp_path / str(number)), tmp_path / "dst")
        assert place in str(error.value) and advised_patterns(error.value) == ["model.audio_tower.*"]


def test_temporal_layers_under_unknown_names(tmp_path):
    original = Original()
    block = {name: t for name, t in original_compressor().items() if name.startswith("model.layers.0.")}
    temporal = {name.replace("model.layers.0", "temporal_model.layers.0"): tensor for name, tensor in block.items()}
    original.tensors |= {PROJECTOR + name: tensor for name, tensor in temporal.items()}
    with pytest.raises(ValueError, match="temporal layers has been released") as error:
        convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    assert all(PROJECTOR + name in str(error.value) for name in temporal)
    assert "Expected query_token, input_proj.*" in str(error.value)
    with pytest.raises(ValueError, match="temporal layers has been released") as error:
        compressor_from_original({**original.compressor, **temporal})
    assert all(name in str(error.value) for name in temporal)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("image_aspect_ratio", "anyres"),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_patch_merge_type", "flat_video_frame_with_end_token_and_avepool2_zigzag"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_use_im_start_end", True),
    ],
)
def test_input_that_would_differ_from_training(tmp_path, entry, value):
    original = Original(vision={"model_type": "clip_vision_model"})
    original.config[entry] = value
    with pytest.raises(ValueError, match=f"{entry}='?{value}'? .*(not supported|cannot be converted)"):
        convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")


def test_end_of_frame_vector_and_merge_type_agree(tmp_path):
    original = Original()
    original.config["mm_patch_merge_type"] = "flat_video_frame_with_end_token"
    with pytest.raises(ValueError, match="1 missing: model.image_newframe"):
        convert_from_original(original.write(tmp_path / "without"), tmp_path / "dst")
    original.tensors["model.image_newframe"] = torch.ones(48)
    convert_from_original(original.write(tmp_path / "with"), tmp_path / "dst")
    assert load(tmp_path / "dst").config.end_of_frame
    original.config["mm_patch_merge_type"] = "flat"
    with pytest.raises(ValueError, match="mm_patch_merge_type='flat' puts nothing after a frame"):
        convert_from_original(original.write(tmp_path / "unused"), tmp_path / "dst2")


OUR_CLASSES = [
    mambamia_hf.MambaMiaCompressor,
    mambamia_hf.MambaMiaCompressorConfig,
    mambamia_hf.MambaMiaConfig,
    mambamia_hf.MambaMiaEncoder,
    mambamia_hf.MambaMiaForConditionalGeneration,
    mambamia_hf.MambaMiaModel,
    mambamia_hf.MambaMiaProcessor,
    mambamia_hf.MambaMiaVideoProcessor,
]


@pytest.mark.parametrize("our_class", OUR_CLASSES, ids=lambda our_class: our_class.__name__)
@pytest.mark.parametrize(
    "config",
    [{}, {"model_type": "unimambamia_av"}, {"model_type": "qwen2"}, None],
    ids=["llava", "audio-visual", "unchanged type", "hyperclovax"],
)
def test_layout_given_to_our_classes(tmp_path, our_class, config):
    original = Original()
    original.config |= config or {}
    if config is None:
        original.config = {"model_type": "hyperclovax_omni", "text_config": {"hidden_size": 48}}
    src = original.write(tmp_path / "src")
    tiny_tokenizer().save_pretrained(src)
    SiglipImageProcessor().save_pretrained(src)  # a video processor would take these settings
    with pytest.raises(ValueError, match="python -m mambamia_hf.convert"):
        our_class.from_pretrained(src)


def test_layout_given_elsewhere(tmp_path):
    src = Original().write(tmp_path / "src")
    for given in (
        check_checkpoint,
        lambda name: MambaMiaForConditionalGeneration.from_vision_text_pretrained(name, name),
    ):
        with pytest.raises(ValueError, match="python -m mambamia_hf.convert"):
            given(src)


@pytest.mark.parametrize("our_class", OUR_CLASSES[:6], ids=lambda our_class: our_class.__name__)
def test_other_models_are_none_of_ours(tmp_path, our_class):
    AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'qwen2'"):
        our_class.from_pretrained(tmp_path)
