"""LLaVA-layout checkpoints made here, converted, and compared with models put together by hand."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_model import IMAGE_TOKEN, VIDEO_TOKEN, prompt, random_videos, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerFast

from mambamia_hf import MambaMiaCompressor, MambaMiaConfig, MambaMiaForConditionalGeneration
from mambamia_hf.convert import (
    compressor_from_original,
    compressor_to_original,
    convert_from_original,
    convert_to_original,
)
from mambamia_hf.convert.command import main


SIZES = {"head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 256}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 0,
}
PLACEHOLDERS = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}


def original_compressor(bidirectional: bool = True, input_norm: bool = False, num_layers: int = 2) -> dict:
    """Random tensors of the released layout: 32 wide between 24 and 48, 4 heads of 16, state 8, rows of 4 patches."""
    shapes = {
        "input_proj.weight": (32, 24),
        "input_proj.bias": (32,),
        "query_token": (32,),
        "model.norm_f.weight": (32,),
        "output_proj.weight": (48, 32),
        "output_proj.bias": (48,),
    }
    if input_norm:
        shapes |= {"input_norm.weight": (32,), "input_norm.bias": (32,)}
    for layer in range(num_layers):
        block = {"norm.weight": (32,), "weight_fc.weight": (4, 32), "weight_fc.bias": (4,)}
        block |= {"gate_fc.weight": (1, 32), "gate_fc.bias": (1,)}
        block |= {"mixer.in_proj.weight": (2 * 64 + 2 * 8 + 4, 32), "mixer.out_proj.weight": (32, 64)}
        block |= {"mixer.conv1d.weight": (80, 1, 4), "mixer.conv1d.bias": (80,), "mixer.norm.weight": (64,)}
        block |= {"mixer.dt_bias": (4,), "mixer.A_log": (4,), "mixer.D": (4,)}
        if bidirectional:
            block |= {"mixer.conv1d_b.weight": (80, 1, 4), "mixer.conv1d_b.bias": (80,), "mixer.norm_b.weight": (64,)}
            block |= {"mixer.dt_bias_b": (4,), "mixer.A_b_log": (4,), "mixer.D_b": (4,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Original:
    """A LLaVA-layout checkpoint of a SigLIP or CLIP tower, a compressor and a Qwen2 or Llama of two layers each."""

    def __init__(self, text: dict = (), vision: dict = (), projector: str = "mm_projector", flat: bool = False):
        torch.manual_seed(0)
        text_config = AutoConfig.for_model(**{**TEXT, **dict(text)})
        self.text = AutoModelForCausalLM.from_config(text_config)
        self.vision = AutoModel.from_config(AutoConfig.for_model(**{**VISION, **dict(vision)}))
        self.compressor = original_compressor()
        tower = "model.vision_tower.vision_tower." + ("" if flat else "vision_model.")
        self.tensors = {
            **{tower + name: tensor for name, tensor in self.vision.state_dict().items()},
            **{f"model.{projector}.{name}": tensor for name, tensor in self.compressor.items()},
            **self.text.state_dict(),
        }
        if text_config.tie_word_embeddings:
            del self.tensors["lm_head.weight"]
        self.config = {
            **text_config.to_dict(),
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": {"qwen2": "llava_qwen", "llama": "llava_llama"}[text_config.model_type],
            "rope_theta": text_config.rope_parameters["rope_theta"],
            "image_aspect_ratio": "square",
            "mm_vision_tower": "tower",
            "mm_vision_select_layer": -2,
            "mm_projector_type": "some_name_of_a_projector",
            "mm_hidden_size": 24,
            "torch_dtype": "float32",
        }
        del self.config["rope_parameters"], self.config["dtype"]

    def write(self, folder: Path, form: str = "safetensors", num_shards: int = 3) -> Path:
        """Writes it as one safetensors or .bin file, or as several of them with an index."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        self.vision.config.save_pretrained(folder / "tower")
        kind, _, sharded = form.partition("-")
        name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
        save = {"safetensors": save_file, "bin": torch.save}[kind]
        if not sharded:
            save(self.tensors, folder / name)
            return folder
        stem, suffix = name.split(".")
        weight_map = {}
        for shard in range(num_shards):
            file = f"{stem}-{shard + 1:05d}-of-{num_shards:05d}.{suffix}"
            first, end = (len(self.tensors) * edge // num_shards for edge in (shard, shard + 1))
            part = dict(list(self.tensors.items())[first:end])
            save(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    def model(self) -> MambaMiaForConditionalGeneration:
        """The same weights put together by hand."""
        compressor = compressor_from_original(self.compressor, **SIZES)
        config = MambaMiaConfig(
            vision_config=self.vision.config,
            text_config=self.text.config,
            compressor_config=compressor.config,
            delta_threshold=None,
            **PLACEHOLDERS,
        )
        model = MambaMiaForConditionalGeneration(config).eval()
        model.model.vision_tower.load_state_dict(self.vision.state_dict())
        model.model.language_model.load_state_dict(self.text.model.state_dict())
        model.lm_head.load_state_dict(self.text.lm_head.state_dict())
        model.model.compressor.load_state_dict(compressor.state_dict())
        return model


def load(folder: Path) -> MambaMiaForConditionalGeneration:
    model, info = MambaMiaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **PLACEHOLDERS)
    assert not any(info.values()), info
    return model.eval()


def logits(model: MambaMiaForConditionalGeneration) -> torch.Tensor:
    inputs = {"input_ids": prompt([5, 6], 3, [7, 8, 9]), "pixel_values_videos": random_videos(1, 3)}
    with torch.no_grad():
        return model(**inputs).logits


def weights(folder: Path) -> dict:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


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


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_tied_head_that_is_stored_too(tmp_path, form):
    original = Original(text={"tie_word_embeddings": True})
    embeddings = original.tensors["model.embed_tokens.weight"]
    original.tensors["lm_head.weight"] = embeddings.clone() if form == "safetensors" else embeddings
    convert_from_original(original.write(tmp_path / "src", form), tmp_path / "dst")
    assert torch.equal(logits(load(tmp_path / "dst")), logits(original.model()))


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
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
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


def test_end_of_frame_vector(tmp_path):
    original = Original()
    original.tensors["model.image_newframe"] = torch.arange(48.0)
    convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")
    model = load(tmp_path / "dst")
    assert model.config.end_of_frame and torch.equal(model.model.end_of_frame, torch.arange(48.0))
    convert_to_original(tmp_path / "dst", tmp_path / "back")
    assert torch.equal(weights(tmp_path / "back")["model.image_newframe"], torch.arange(48.0))


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


def test_missing_tensors_are_noticed(tmp_path):
    original = Original()
    tensors = dict(original.tensors)
    for number, name in enumerate(list(tensors)[::3]):
        original.tensors = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(ValueError) as error:
            convert_from_original(original.write(tmp_path / str(number)), tmp_path / "dst")
        assert name.removeprefix("model.mm_projector.") in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda original: original.tensors.update(extra=torch.zeros(1)), "1 unknown: extra"),
        (
            lambda original: original.tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}),
            "1 unknown: model.layers.2.mlp.up_proj.weight",
        ),
        (
            lambda original: original.tensors.update({"model.norm.weight": torch.zeros(31)}),
            r"1 of a wrong shape: model.norm.weight \(\(31,\), expected \(48,\)\)",
        ),
        (lambda original: original.config.update(mm_hidden_size=31), "mm_hidden_size=31 disagrees.*features of 24"),
        (lambda original: original.config.update(model_type="llava_unheard_of"), "llava_unheard_of"),
        (lambda original: original.config.update(mm_vision_tower="no/tower/here"), "no/tower/here.*siglip2-so400m"),
        (lambda original: original.config.pop("mm_vision_select_layer"), "lacks mm_vision_select_layer"),
        (lambda original: original.config.pop("num_attention_heads"), "lacks num_attention_heads"),
        (
            lambda original: original.config.update(
                mm_patch_merge_type="flat_video_frame_with_end_token_and_avepool2"
            ),
            "avepool2.*cannot be converted",
        ),
    ],
)
def test_checkpoints_that_cannot_be_converted(tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original = Original()
    change(original)
    src = original.write(tmp_path / "src", "safetensors-sharded")
    with pytest.raises(ValueError, match=message):
        convert_from_original(src, tmp_path / "dst")
    with pytest.raises(SystemExit) as exit:
        main([str(src), str(tmp_path / "dst")])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_projector_of_another_kind(tmp_path):
    original = Original()
    original.tensors = {name: tensor for name, tensor in original.tensors.items() if "mm_projector" not in name}
    original.tensors["model.mm_projector.0.weight"] = torch.zeros(32, 32)
    original.config["mm_projector_type"] = "mlp2x_gelu"
    with pytest.raises(ValueError, match="mm_projector_type='mlp2x_gelu'.*lacks the tensors input_proj.weight"):
        convert_from_original(original.write(tmp_path / "src"), tmp_path / "dst")


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["MAMBAMIA_TEST_PAYLOAD"]),))


def test_pickled_objects_are_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBAMIA_TEST_PAYLOAD", str(tmp_path / "touched"))
    src = Original().write(tmp_path / "src", "bin")
    for save in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))):
        save({"model.norm.weight": Payload()}, src / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged, or holds Python objects"):
            convert_from_original(src, tmp_path / "dst")
    torch.save([torch.zeros(1)], src / "pytorch_model.bin")
    with pytest.raises(ValueError, match="something other than named tensors"):
        convert_from_original(src, tmp_path / "dst")
    assert not (tmp_path / "touched").exists()


def test_damaged_and_missing_files(tmp_path):
    src = Original().write(tmp_path / "src", "safetensors-sharded")
    shard = src / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="00002-of-00003.safetensors is damaged"):
        convert_from_original(src, tmp_path / "dst")
    shard.unlink()
    with pytest.raises(ValueError, match="not there: model-00002-of-00003.safetensors"):
        convert_from_original(src, tmp_path / "dst")
    shard.write_bytes((src / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(ValueError, match="in more than one weights file"):
        convert_from_original(src, tmp_path / "dst")
    (src / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        convert_from_original(src, tmp_path / "dst")
    (src / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        convert_from_original(src, tmp_path / "dst")
    with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
        convert_from_original(tmp_path / "nowhere", tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_destination_is_never_overwritten(tmp_path):
    src = Original().write(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert_from_original(src, tmp_path / "dst")
    (tmp_path / "dst" / "notes.txt").unlink()
    assert convert_from_original(src, tmp_path / "dst") == tmp_path / "dst"
    load(tmp_path / "dst")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Vicuna's in that it knows no marks of a dialogue."""
    words = "<unk> <s> </s> A chat between a curious user USER ASSISTANT : . what".split()
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


CHAT = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
]
QWEN_DIALOGUE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|video_pad|>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA star.<|im_end|>\n"
    "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
)
VICUNA_DIALOGUE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <|video_pad|>\nWhat is it? ASSISTANT: A star.</s>"
    "USER: Sure? ASSISTANT:"
)


@pytest.mark.parametrize(
    ("tokenizer", "text", "dialogue"),
    [
        (tiny_tokenizer, {"vocab_size": 400}, QWEN_DIALOGUE),
        (word_tokenizer, {"model_type": "llama", "vocab_size": 400}, VICUNA_DIALOGUE),
    ],
    ids=["qwen2", "vicuna"],
)
def test_processor_is_built_where_there_is_a_tokenizer(tmp_path, tokenizer, text, dialogue):
    original = Original(text=text)
    src = original.write(tmp_path / "src")
    tokenizer().save_pretrained(src)
    convert_from_original(src, tmp_path / "dst")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst")
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == dialogue
    model = MambaMiaForConditionalGeneration.from_pretrained(tmp_path / "dst").eval()
    assert model.config.video_token_id == processor.video_token_id == processor.tokenizer.vocab["<|video_pad|>"]
    assert model.config.image_token_id == processor.image_token_id
    video = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = processor(text=dialogue, videos=video, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, 32, 32)
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 3 * 4
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


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


def test_command_line(tmp_path):
    src = Original().write(tmp_path / "src")
    command = [sys.executable, "-m", "mambamia_hf.convert", src, tmp_path / "dst"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"Wrote {tmp_path / 'dst'}.\n"
    load(tmp_path / "dst")
