"""Damaged and absurd checkpoints: one sentence each from the classes and from the command line's functions."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import TEXT_CONFIG, VISION_CONFIG, tiny_checkpoint, tiny_config
from transformers import AutoConfig, PreTrainedModel
from video_files import write_video

from mambamia_hf import (
    BUNDLED_CHECKPOINT,
    MambaMiaCompressor,
    MambaMiaCompressorConfig,
    MambaMiaConfig,
    MambaMiaForConditionalGeneration,
    MambaMiaProcessor,
)
from mambamia_hf.inference import ask


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny_checkpoint(folder)
    write_video(folder.parent / "v.mp4")
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def change_weights(checkpoint: Path, **changed: torch.Tensor | None) -> None:
    weights = load_file(checkpoint / "model.safetensors") | {
        name.replace("__", "."): tensor for name, tensor in changed.items()
    }
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})


def change_config(checkpoint: Path, part: str | None, name: str, value) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (config if part is None else config[part])[name] = value
    (checkpoint / "config.json").write_text(json.dumps(config))


def check_sentence(checkpoint: Path, match: str, error: type[Exception] = ValueError) -> None:
    """The class and `ask` raise one line that matches."""
    with pytest.raises(error, match=match):
        MambaMiaForConditionalGeneration.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=match) as raised:
        ask(checkpoint, checkpoint.parent / "v.mp4", "What?")
    assert "\n" not in str(raised.value)


class TestWeights:
    @pytest.fixture(autouse=True)
    def video(self, whole, tmp_path):
        shutil.copy(whole.parent / "v.mp4", tmp_path)

    def test_wrong_shapes(self, checkpoint):
        change_weights(checkpoint, model__compressor__anchor=torch.zeros(3))
        check_sentence(checkpoint, r"model\.compressor\.anchor \(\(3,\), not \(40,\)\)", RuntimeError)
        model = MambaMiaForConditionalGeneration.from_pretrained(checkpoint, ignore_mismatched_sizes=True)
        assert model.model.compressor.anchor.shape == (40,)

    def test_cut_off(self, checkpoint):
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        check_sentence(checkpoint, "weights file of .* is damaged", OSError)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn])
    def test_types(self, checkpoint, dtype):
        change_weights(checkpoint, model__compressor__anchor=torch.ones(40).to(dtype))
        check_sentence(checkpoint, r"BF16, not model\.compressor\.anchor \(")

    def test_missing(self, checkpoint):
        change_weights(checkpoint, model__compressor__anchor=None)
        with pytest.raises(ValueError, match=r"lacks weights of the model: model\.compressor\.anchor"):
            ask(checkpoint, checkpoint.parent / "v.mp4", "What?")

    def test_unknown(self, checkpoint):
        change_weights(checkpoint, model__audio_tower__weight=torch.zeros(3))
        with pytest.warns(UserWarning, match=r"has not, and they are not used: model\.audio_tower\.weight\."):
            ask(checkpoint, checkpoint.parent / "v.mp4", "What?", max_new_tokens=1)

    def test_names_without_the_prefix_of_the_base_model(self, checkpoint):
        model = MambaMiaForConditionalGeneration.from_pretrained(checkpoint)
        weights = load_file(checkpoint / "model.safetensors")
        short = {name.removeprefix("model."): weight for name, weight in weights.items()}
        save_file(short, checkpoint / "model.safetensors", metadata={"format": "pt"})
        again = MambaMiaForConditionalGeneration.from_pretrained(checkpoint)
        torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)

    def test_base_model_alone(self, checkpoint):
        model = MambaMiaForConditionalGeneration.from_pretrained(checkpoint)
        model.model.save_pretrained(checkpoint)
        again = MambaMiaForConditionalGeneration.from_pretrained(checkpoint)
        torch.testing.assert_close(dict(again.model.state_dict()), dict(model.model.state_dict()), rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"lacks weights of the model: lm_head\.weight"):
            ask(checkpoint, checkpoint.parent / "v.mp4", "What?")

    @pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "a/../../b.safetensors", "not_there"])
    def test_index(self, checkpoint, name):
        weights = load_file(checkpoint / "model.safetensors")
        (checkpoint / "model.safetensors").rename(checkpoint.parent / "out.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        check_sentence(checkpoint, "names files outside its folder|lists weights files that are not there")

    @pytest.mark.parametrize("change", [{"weight_map": {}}, {"metadata": None}])
    def test_index_without_what_belongs_there(self, checkpoint, change):
        weights = load_file(checkpoint / "model.safetensors")
        (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors"), **change}
        kept = {name: part for name, part in index.items() if part is not None}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(kept))
        check_sentence(checkpoint, "index.json lacks its weight_map or its metadata")

    def test_errors_of_the_code_are_no_damage(self, checkpoint, monkeypatch):
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: {}["no_such_key"])
        with pytest.raises(KeyError, match="no_such_key"):
            MambaMiaForConditionalGeneration.from_pretrained(checkpoint)

    def test_pickles_are_not_loaded(self, checkpoint):
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(shutil.rmtree))
        check_sentence(checkpoint, "weights file of .* is damaged .*UnpicklingError", OSError)

    def test_shards(self, checkpoint):
        model = MambaMiaForConditionalGeneration.from_pretrained(checkpoint)
        shutil.rmtree(checkpoint)
        model.save_pretrained(checkpoint, max_shard_size="100kB")
        assert (checkpoint / "model.safetensors.index.json").exists()
        again = MambaMiaForConditionalGeneration.from_pretrained(pretrained_model_name_or_path=checkpoint)
        assert torch.equal(again.model.compressor.anchor, model.model.compressor.anchor)

    def test_compressor_alone(self, tmp_path):
        compressor = MambaMiaCompressor(MambaMiaCompressorConfig(hidden_size=64, num_hidden_layers=1))
        compressor.save_pretrained(tmp_path / "compressor")
        file = tmp_path / "compressor" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(OSError, match="is damaged"):
            MambaMiaCompressor.from_pretrained(tmp_path / "compressor")


ABSURD = [
    ("text_config", "num_hidden_layers", 10**9),
    ("text_config", "num_attention_heads", 0),
    ("text_config", "num_key_value_heads", -4),
    ("text_config", "hidden_size", "big"),
    ("text_config", "vocab_size", 10**12),
    ("text_config", "model_type", "nothing"),
    ("text_config", "rope_parameters", "x"),
    ("vision_config", "num_hidden_layers", 10**9),
    ("vision_config", "num_hidden_layers", 2.5),
    ("vision_config", "patch_size", 0),
    ("vision_config", "image_size", -32),
    ("compressor_config", "num_hidden_layers", 10**9),
    ("compressor_config", "num_temporal_layers", -1),
    ("compressor_config", "hidden_size", 10**9),
    (None, "image_token_id", -5),
    (None, "text_config", []),
    (None, "text_config", None),
    (None, "vision_config", "tower"),
    (None, "text_config", ["a"]),
    (None, "frame_time_format", 5),
    (None, "dtype", 5),
    (None, "dtype", "x"),
    (None, "dtype", []),
    ("text_config", "dtype", [1]),
    ("compressor_config", "initializer_range", "x"),
    ("compressor_config", "gpa_placement", "nowhere"),
]


@pytest.mark.parametrize(("part", "name", "value"), ABSURD)
def test_absurd_configurations(checkpoint, whole, part, name, value):
    change_config(checkpoint, part, name, value)
    for load in (MambaMiaConfig, AutoConfig, MambaMiaForConditionalGeneration):
        with pytest.raises(ValueError) as raised:
            load.from_pretrained(checkpoint)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="cannot load") as raised:
        ask(checkpoint, whole.parent / "v.mp4", "What?")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["[]", "null", "5", "{", ""])
def test_a_configuration_that_is_no_object(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    for load in (MambaMiaConfig, MambaMiaForConditionalGeneration):
        with pytest.raises((ValueError, OSError)) as raised:
            load.from_pretrained(checkpoint)
        assert "\n" not in str(raised.value)


def test_a_type_of_model_that_is_none(checkpoint):
    change_config(checkpoint, None, "model_type", ["a"])
    for load in (MambaMiaConfig, MambaMiaForConditionalGeneration):
        with pytest.raises(ValueError, match=r"has the model_type \['a'\]"):
            load.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "vocab_size"])
def test_absurd_values_of_a_call(name):
    for value in (0, -1, 10**12):
        with pytest.raises(ValueError, match=name):
            tiny_config(text_config={**TEXT_CONFIG, name: value})
    with pytest.raises(ValueError, match="num_hidden_layers"):
        tiny_config(vision_config={**VISION_CONFIG, "num_hidden_layers": 10**9})


class TestTokenizer:
    def test_missing_files(self, tmp_path):
        folder = shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "model")
        MambaMiaProcessor.from_pretrained(folder)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match="tokens and the model|files of the tokenizer"):
            MambaMiaProcessor.from_pretrained(folder)

    def test_of_another_model(self, checkpoint):
        change_config(checkpoint, None, "video_token_id", 7)
        with pytest.raises(ValueError, match=r"<\|video_pad\|> is 6 and the model's 7"):
            MambaMiaProcessor.from_pretrained(checkpoint)

    def test_processor_alone(self, checkpoint):
        (checkpoint / "config.json").unlink()
        assert MambaMiaProcessor.from_pretrained(checkpoint).video_token_id == 6
