"""Configurations: nesting, saving, comparison, and what cannot be built."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_model import COMPRESSOR_CONFIG, TEXT_CONFIG, VISION_CONFIG, tiny_config
from transformers import GPTNeoXConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

from mambamia_hf import (
    MambaMiaCompressor,
    MambaMiaCompressorConfig,
    MambaMiaConfig,
    MambaMiaForConditionalGeneration,
)


def test_defaults_are_the_full_size_model():
    config = MambaMiaConfig()
    vision, text, compressor = config.vision_config, config.text_config, config.compressor_config
    assert (type(vision), type(text)) == (SiglipVisionConfig, Qwen2Config)
    assert type(compressor) is MambaMiaCompressorConfig
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1152, 27, 384, 16)
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (3584, 28, 152064)
    fields = {
        "input_size": 1152,
        "output_size": 3584,
        "hidden_size": 3072,
        "num_hidden_layers": 3,
        "expand": 2,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
        "patches_per_anchor": 24,
        "bidirectional": True,
        "gpa_placement": "post_mixer",
        "num_temporal_layers": 1,
        "temporal_bidirectional": False,
    }
    assert {name: getattr(compressor, name) for name in fields} == fields
    assert compressor.to_dict() == MambaMiaCompressorConfig().to_dict()
    assert (config.image_token_id, config.video_token_id, config.vision_feature_layer) == (151655, 151656, -2)
    assert (config.delta_threshold, config.delta_min_frames, config.tokens_per_frame()) == (0.6, 180, 24)


def test_full_size_parameters():
    with torch.device("meta"):
        model = MambaMiaForConditionalGeneration(MambaMiaConfig())
        alone = MambaMiaCompressor(MambaMiaCompressorConfig())
    parts = model.model
    assert parts.compressor.num_parameters() == alone.num_parameters()
    assert alone.num_parameters() == 245_891_371 == pytest.approx(247e6, rel=0.01)
    assert parts.language_model.num_parameters() + model.lm_head.weight.numel() == 7_615_616_512


def test_sizes_come_from_the_towers():
    config = tiny_config(compressor_config={"input_size": 7, "output_size": 8})
    assert config.compressor_config.input_size == VISION_CONFIG["hidden_size"]
    assert config.compressor_config.output_size == TEXT_CONFIG["hidden_size"]


def test_sub_configs_as_dicts_and_as_objects():
    as_dicts = tiny_config()
    vision = SiglipVisionConfig(**{key: value for key, value in VISION_CONFIG.items() if key != "model_type"})
    text = Qwen2Config(**{key: value for key, value in TEXT_CONFIG.items() if key != "model_type"})
    as_objects = MambaMiaConfig(
        vision_config=vision,
        text_config=text,
        compressor_config=MambaMiaCompressorConfig(**COMPRESSOR_CONFIG),
        **{
            name: getattr(as_dicts, name)
            for name in ("image_token_id", "video_token_id", "delta_threshold", "delta_min_frames")
        },
    )
    assert as_objects.to_dict() == as_dicts.to_dict() and as_objects == as_dicts
    assert as_objects.text_config is text and as_objects.get_text_config() is text


@pytest.mark.parametrize(
    ("text_config", "config_class"),
    [({"model_type": "llama"}, LlamaConfig), ({"model_type": "gpt_neox"}, GPTNeoXConfig), ({}, Qwen2Config)],
)
def test_any_language_model(text_config, config_class):
    config = MambaMiaConfig(text_config={**text_config, "hidden_size": 128})
    assert type(config.text_config) is config_class
    assert config.compressor_config.output_size == 128


def test_save_and_load(tmp_path):
    config = tiny_config(
        delta_threshold=None, keep_ratio=0.5, vision_batch_size=3, compressor_config={"gpa_placement": "pre_mixer"}
    )
    config.save_pretrained(tmp_path)
    loaded = MambaMiaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and loaded == MambaMiaConfig.from_pretrained(tmp_path)
    assert type(loaded.compressor_config) is MambaMiaCompressorConfig
    compressor = MambaMiaCompressorConfig.from_pretrained(tmp_path)
    assert compressor.gpa_placement == "pre_mixer" and compressor.output_size == TEXT_CONFIG["hidden_size"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "mambamia" and saved["compressor_config"]["model_type"] == "mambamia_compressor"
    changed = MambaMiaConfig.from_pretrained(tmp_path, vision_batch_size=4, compressor_config={"chunk_size": 8})
    assert changed.vision_batch_size == 4 and changed.compressor_config.chunk_size == 8
    assert changed.compressor_config.gpa_placement == "pre_mixer"


def test_comparison():
    assert tiny_config() == tiny_config()
    assert tiny_config() != tiny_config(delta_threshold=0.7)
    assert tiny_config() != tiny_config(compressor_config={"state_size": 4})
    assert tiny_config() != tiny_config(text_config={"vocab_size": 120})


def test_time_step_limit_survives_json(tmp_path):
    config = MambaMiaCompressorConfig(time_step_limit=[0.0, float("inf")])
    config.save_pretrained(tmp_path)
    assert MambaMiaCompressorConfig.from_pretrained(tmp_path).time_step_limit == (0.0, float("inf"))


def test_non_square_frames():
    config = tiny_config(vision_config={"image_size": [32, 64]}, compressor_config={"patches_per_anchor": 8})
    assert config.tokens_per_frame() == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1 .*, not 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"patches_per_anchor": 0}, "patches_per_anchor must be at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"num_temporal_layers": -1}, "num_temporal_layers must be at least 0 .*, not -1"),
        ({"head_dim": 100}, "head_dim=100 does not divide .* 6144; set head_dim to a divisor"),
        ({"n_groups": 5}, "n_groups=5 does not divide the 96 heads .*; set n_groups to a divisor"),
        ({"time_step_limit": (0.2, 0.1)}, "time_step_limit must be two rising numbers"),
        ({"time_step_limit": (0.1,)}, "time_step_limit must be two rising numbers"),
        ({"time_step_min": 0.2}, "time_step_min must .* at most at time_step_max, not 0.2 with time_step_max=0.1"),
        ({"A_init_min": 0}, "A_init_min must lie above 0"),
        ({"A_init_max": 0.5}, "A_init_min must .* at most at A_init_max, not 1 with A_init_max=0.5"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must not be negative"),
        ({"initializer_range": -0.1}, "initializer_range must not be negative"),
        ({"gpa_dropout": 1.0}, "gpa_dropout must lie in .0, 1., not 1.0"),
        ({"length_scale": 0.5}, "length_scale must be at least 1, not 0.5"),
    ],
)
def test_impossible_compressors(settings, message):
    with pytest.raises(ValueError, match=message):
        MambaMiaCompressorConfig(**settings)
    with pytest.raises(ValueError, match=message):
        MambaMiaConfig(compressor_config=settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compressor_config": {"patches_per_anchor": 25}}, "patches_per_anchor=25; set .* to a divisor of 576"),
        ({"vision_config": {"image_size": 240}}, "225 patches is not a whole number of rows of patches_per_anchor=24"),
        ({"vision_feature_layer": 28}, "vision_feature_layer=28 .* 27 layers; set it to -28 to 27"),
        ({"vision_feature_layer": -29}, "vision_feature_layer=-29"),
        ({"vision_batch_size": 0}, "vision_batch_size must be at least 1, not 0"),
        ({"video_token_id": 151655}, "image_token_id and video_token_id must differ, both are 151655"),
        ({"delta_min_frames": -1}, "delta_min_frames must not be negative"),
        ({"delta_threshold": -0.5}, "delta_threshold must not be negative"),
        ({"frame_dropout": 1.5}, "frame_dropout must lie between 0 and 1, not 1.5"),
        ({"delta_loss_coef": -0.5}, "delta_loss_coef must not be negative, not -0.5"),
        ({"keep_frames": 64}, "delta_threshold=0.6 and a budget .*keep_frames=64.*; set delta_threshold=None"),
        ({"keep_ratio": 0.5}, "delta_threshold=0.6 and a budget .*keep_ratio=0.5.*; set delta_threshold=None"),
        ({"delta_threshold": None, "keep_frames": 0}, "keep_frames must be a whole number of at least 1, not 0"),
        ({"delta_threshold": None, "keep_ratio": 1.5}, "keep_ratio must lie above 0 and at most at 1, not 1.5"),
        ({"delta_threshold": None, "keep_ratio": 0.5, "keep_frames": 3}, "keep_frames or keep_ratio, not both"),
        ({"compressor_config": {"num_temporal_layers": 0}}, "delta_threshold=0.6 needs .* num_temporal_layers is 0"),
        (
            {"compressor_config": {"num_temporal_layers": 0}, "delta_threshold": None, "keep_frames": 3},
            "keep_frames=3 needs .*; set keep_frames=None",
        ),
    ],
)
def test_impossible_models(settings, message):
    with pytest.raises(ValueError, match=message):
        MambaMiaConfig(**settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        (None, "delta_loss_coef"),
        (None, "keep_ratio"),
        ("compressor_config", "rms_norm_eps"),
        ("compressor_config", "A_init_max"),
        ("text_config", "rms_norm_eps"),
        ("text_config", "attention_dropout"),
        ("vision_config", "layer_norm_eps"),
        ("vision_config", "a_field_that_nobody_knows"),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(tmp_path, part, name, value):
    given = {name: value} if part is None else {part: {name: value}}
    with pytest.raises(ValueError, match=f"{name} must be a finite number, not {value}"):
        tiny_config(**given)
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (saved if part is None else saved[part])[name] = value
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"{name} must be a finite number, not {value}"):
        MambaMiaConfig.from_pretrained(tmp_path)


def test_numbers_that_are_none_within_a_setting():
    with pytest.raises(ValueError, match=r"rope_parameters\.rope_theta must be a finite number, not nan"):
        tiny_config(text_config={"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}})
    with pytest.raises(ValueError, match="time_step_limit must be two rising numbers"):
        MambaMiaCompressorConfig(time_step_limit=(0.0, float("nan")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpa_placement": "nowhere"}, "'gpa_placement'(?s:.*)'post_mixer', 'pre_mixer'"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
    ],
)
def test_wrong_types_are_refused_as_by_any_config(settings, message):
    with pytest.raises(StrictDataclassFieldValidationError, match=message):
        MambaMiaCompressorConfig(**settings)
