"""Whole checkpoints, converted both ways and compared with models put together by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from original_checkpoint import Original, image_model, load, logits, weights
from safetensors.torch import load_file
from tiny_model import VIDEO_TOKEN, random_videos, tiny_model

from mambamia_hf import MambaMiaConfig
from mambamia_hf.convert import compressor_to_original, convert_from_original, convert_to_original
from mambamia_hf.convert.command import main


@pytest.mark.parametrize("form", ["safetensors", "safetensors-sharded", "bin", "bin-sharded"])
def test_converted_checkpoint_computes_what_its_parts_do(tmp_path, form):
    original = Original(text={"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}})
    src = original.write(tmp_path / "src", form)
    main([str(src), str(tmp_path / "dst")])
    converted = load(tmp_path / "dst")
    assert torch.equal(logits(converted), logits(original.model()))
    assert converted.config.architectures == ["MambaMiaForConditionalGeneration"]
    assert converted.config.delta_threshold is None and converted.config.compressor_config.num_temporal_layers == 0
    assert converted.config.text_config.rope_parameters["rope_theta"] == 50.0
    assert converted.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"flat": True},
        {"vision": {"vision_use_head": True}},
        {"projector": "video_audio_compressor"},
        {"text": {"model_type": "llama"}},
        {"text": {"tie_word_embeddings": True}},
    ],
    ids=["flat tower", "tower with head", "other projector", "llama", "tied embeddings"],
)
def test_layouts(tmp_path, settings):
    original = Original(**settings)
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    assert torch.equal(logits(load(tmp_path / "dst")), logits(original.model()))


def test_clip_tower(tmp_path):
    original = Original(vision={"model_type": "clip_vision_model"})
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    tower = load(tmp_path / "dst").model.vision_tower
    pixel_values = random_videos(1, 1)[0]
    assert torch.equal(tower(pixel_values).last_hidden_state, original.vision(pixel_values).last_hidden_state)


def test_files_are_those_of_save_pretrained(tmp_path):
    convert_from_original(Original().write(tmp_path / "src", "bin-sharded"), tmp_path / "dst", max_shard_size=40_000)
    load(tmp_path / "dst").save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    files, saved = ({file.name for file in (tmp_path / name).iterdir()} for name in ("dst", "saved"))
    assert {name for name in files if ".safetensors" not in name} == {name for name in saved if ".saf" not in name}
    assert weights(tmp_path / "dst").keys() == weights(tmp_path / "saved").keys()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("dst", "saved")]
    for entry in ("architectures", "auto_map", "dtype", "model_type"):
        assert configs[0][entry] == configs[1][entry]
    assert str(tmp_path) not in json.dumps(configs[0])
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"] == json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())["metadata"]
    )
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "dst" / file)


def test_types_of_the_tensors_are_kept(tmp_path):
    original = Original()
    original.tensors = {
        name: tensor if name.endswith("A_log") else tensor.bfloat16() for name, tensor in original.tensors.items()
    }
    original.config["torch_dtype"] = "bfloat16"
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    for name, tensor in weights(tmp_path / "dst").items():
        assert tensor.dtype == (torch.float32 if name.endswith("forward_ssm.A_log") else torch.bfloat16)
    assert load(tmp_path / "dst").dtype == torch.bfloat16
    del original.config["torch_dtype"]
    convert_from_original(original.write(tmp_path / "untold"), tmp_path / "dst2")
    assert load(tmp_path / "dst2").dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_tied_head_that_is_stored_too(tmp_path, form):
    original = Original(text={"tie_word_embeddings": True})
    embeddings = original.tensors["model.embed_tokens.weight"]
    original.tensors["lm_head.weight"] = embeddings.clone() if form == "safetensors" else embeddings
    convert_from_original(original.write(tmp_path / "src", form), tmp_path / "dst")
    assert torch.equal(logits(load(tmp_path / "dst")), logits(original.model()))


def test_tied_head_that_differs(tmp_path):
    original = Original(text={"tie_word_embeddings": True})
    original.tensors["lm_head.weight"] = original.tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")


@pytest.mark.parametrize("settings", [{}, {"text": {"model_type": "llama", "tie_word_embeddings": True}}])
def test_round_trip_from_the_original_layout(tmp_path, settings):
    original = Original(**settings)
    convert_from_original(original.write(tmp_path / "src", "bin-sharded"), tmp_path / "dst")
    convert_to_original(tmp_path / "dst", tmp_path / "back")
    back = weights(tmp_path / "back")
    assert back.keys() == original.tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.tensors.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    for (
        key
    ) in "model_type hidden_size rope_theta vocab_size mm_vision_select_layer mm_hidden_size torch_dtype".split():
        assert config[key] == original.config[key]


def test_round_trip_from_our_layout(tmp_path):
    compressor_config = {"num_temporal_layers": 0, "gpa_placement": "pre_mixer", "chunk_size": 32}
    compressor_config |= {"hidden_size": 48, "n_groups": 2}
    model = tiny_model(compressor_config=compressor_config, delta_threshold=None)
    model.save_pretrained(tmp_path / "ours")
    main(["--reverse", str(tmp_path / "ours"), str(tmp_path / "original")])
    main([str(tmp_path / "original"), str(tmp_path / "again")])
    ours, again = weights(tmp_path / "ours"), weights(tmp_path / "again")
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(model))
    config = MambaMiaConfig.from_pretrained(tmp_path / "again")
    assert config.compressor_config.n_groups == 2 and config.compressor_config.chunk_size == 32
    assert config.video_token_id == VIDEO_TOKEN


@pytest.mark.parametrize(
    ("compressor_config", "settings"),
    [
        ({"num_temporal_layers": 1}, "num_temporal_layers=1"),
        ({"gpa_placement": "post_mixer"}, "gpa_placement='post_mixer'.*gpa_placement='pre_mixer'"),
        ({"mixer_type": "mamba1"}, "mixer_type='mamba1'"),
        ({"rms_norm_eps": 1e-6, "time_step_limit": (0.1, 1.0)}, r"time_step_limit=\(0\.1, 1\.0\), rms_norm_eps=1e-06"),
    ],
)
def test_what_the_original_layout_cannot_hold(tmp_path, compressor_config, settings):
    fitting = {"num_temporal_layers": 0, "gpa_placement": "pre_mixer"}
    model = tiny_model(compressor_config={**fitting, **compressor_config}, delta_threshold=None)
    with pytest.raises(ValueError, match=settings):
        compressor_to_original(model.model.compressor)
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=settings):
        convert_to_original(tmp_path / "ours", tmp_path / "original")
    assert not (tmp_path / "original").exists()


def test_end_of_frame_vector(tmp_path):
    original = Original()
    original.tensors["model.image_newframe"] = torch.arange(48.0)
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    model = load(tmp_path / "dst")
    assert model.config.end_of_frame and torch.equal(model.model.end_of_frame, torch.arange(48.0))
    convert_to_original(tmp_path / "dst", tmp_path / "back")
    assert torch.equal(weights(tmp_path / "back")["model.image_newframe"], torch.arange(48.0))


def test_projector_of_another_kind(tmp_path):
    message = "mm_projector_type='mlp2x_gelu'.*lacks the tensors input_proj.weight.*convert with --new-compressor"
    with pytest.raises(ValueError, match=message):
        convert_from_original(image_model().write(tmp_path / "src"), tmp_path / "dst")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_compressor_in_an_image_model(tmp_path, dtype, caplog):
    original = image_model()
    original.tensors = {name: tensor.to(dtype) for name, tensor in original.tensors.items()}
    original.config["torch_dtype"] = str(dtype).removeprefix("torch.")
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst", new_compressor=True)
    assert "Left out 4 tensors: model.mm_projector.0.bias" in caplog.text
    model = load(tmp_path / "dst")
    expected = original.model().to(dtype)
    for part in ("model.vision_tower", "model.language_model", "lm_head"):
        found = model.get_submodule(part).state_dict()
        assert all(
            torch.equal(found[name], tensor) for name, tensor in expected.get_submodule(part).state_dict().items()
        )
    compressor = model.model.compressor
    config = compressor.config
    assert (config.input_size, config.hidden_size, config.output_size, config.patches_per_anchor) == (24, 32, 48, 4)
    assert config.num_temporal_layers and config.initialization == "released"
    heads = torch.arange(1, config.num_heads + 1)
    torch.testing.assert_close(
        compressor.layers[0].mixer.forward_ssm.A_log.float().exp(), heads.float(), rtol=1e-2, atol=0
    )
    assert model.dtype == compressor.dtype == dtype and logits(model.float()).isfinite().all()


def test_new_compressor_where_there_is_one(tmp_path):
    with pytest.raises(ValueError, match="has no MLP under model.mm_projector"):
        convert_from_original(Original().write(tmp_path / "src"), tmp_path / "dst", new_compressor=True)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("name", "patch_embedding", "position_embedding"),
    [
        ("google/siglip2-so400m-patch16-384", (1152, 3, 16, 16), (576, 1152)),
        ("someone/siglip2-so400m-patch16-384", (1152, 3, 16, 16), (576, 1152)),
        ("google/siglip-so400m-patch14-384", (1152, 3, 14, 14), (729, 1152)),
        ("/not/here/openai/clip-vit-large-patch14-336/", (1024, 3, 14, 14), (577, 1024)),
    ],
)
def test_well_known_towers_need_no_config_file(tmp_path, name, patch_embedding, position_embedding):
    original = Original()
    original.config |= {"mm_vision_tower": name, "mm_hidden_size": patch_embedding[0]}
    original.tensors["model.mm_projector.input_proj.weight"] = torch.zeros(32, patch_embedding[0])
    for layer in range(2):
        original.tensors[f"model.mm_projector.model.layers.{layer}.weight_fc.weight"] = torch.zeros(9, 32)
        original.tensors[f"model.mm_projector.model.layers.{layer}.weight_fc.bias"] = torch.zeros(9)
    with pytest.raises(ValueError) as error:
        convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    # Everything but the tower fits, and the tower's tensors are asked for in their true shapes.
    tower = "model.vision_tower.vision_tower.vision_model.embeddings"
    assert f"{tower}.patch_embedding.weight ((24, 3, 8, 8), expected {patch_embedding})" in str(error.value)
    assert f"{tower}.position_embedding.weight ((16, 24), expected {position_embedding})" in str(error.value)
    assert "mm_projector" not in str(error.value)


# Prints by how many bytes a process grows, mapped files included, when it converts more than the first checkpoint.
GROWTH = """
import re, sys
from pathlib import Path
from mambamia_hf.convert import convert_from_original
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
small, *large = sys.argv[1:]
convert_from_original(small, small + "-converted")
before = peak()
for src in large:
    convert_from_original(src, src + "-converted", max_shard_size=8_000_000)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_is_that_of_a_shard(tmp_path):
    small = Original().write(tmp_path / "small")
    original = Original(text={"num_hidden_layers": 15, "intermediate_size": 20_000})
    large = [original.write(tmp_path / form, form, num_shards=12) for form in ("safetensors-sharded", "bin-sharded")]
    shards = [file.stat().st_size for file in large[0].glob("*.safetensors")]
    command = [sys.executable, "-c", GROWTH, small, *large]
    growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert sum(shards) > 170e6 and growth < max(shards) + 8e6 + 20e6
