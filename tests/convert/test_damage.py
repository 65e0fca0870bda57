"""Damaged, incomplete and absurd checkpoints: one sentence each, and nothing is written."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from original_checkpoint import Original, load, logits, original_compressor
from safetensors.torch import load_file, save_file

from mambamia_hf.convert import compressor_from_original, convert_from_original, convert_to_original
from mambamia_hf.convert.command import main


PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower.vision_tower.vision_model."


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


def refuses(src: Path, convert=convert_from_original) -> str:
    """The sentence with which a checkpoint is refused; nothing is left of the attempt."""
    dst = src.parent / "dst"
    before = sorted(path.name for path in src.parent.iterdir())
    with pytest.raises(ValueError) as error:
        convert(src, dst)
    assert sorted(path.name for path in src.parent.iterdir()) == before
    return str(error.value)


# A language model's, a vision tower's and a compressor's weights, for damage to each.
DAMAGED = ["model.layers.1.mlp.up_proj.weight", f"{TOWER}embeddings.patch_embedding.bias", f"{PROJECTOR}query_token"]
DAMAGES = {
    "is nan": lambda tensor: tensor.flatten().index_fill(0, torch.tensor([3]), float("nan")).view_as(tensor),
    "is -inf": lambda tensor: tensor.flatten().index_fill(0, torch.tensor([3]), float("-inf")).view_as(tensor),
    "I64": lambda tensor: tensor.long(),
    "I8": lambda tensor: tensor.to(torch.int8),
    "BOOL": lambda tensor: tensor.bool(),
    "C64": lambda tensor: tensor.to(torch.complex64),
    "F8_E4M3": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "wrong shape": lambda tensor: tensor.unsqueeze(0),
    "of a wrong": lambda tensor: tensor[:0],
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_named(tmp_path, name, damage):
    original = Original()
    original.tensors[name] = DAMAGES[damage](original.tensors[name])
    message = refuses(original.write(tmp_path / "src", "safetensors-sharded"))
    assert name in message and damage in message


@pytest.mark.parametrize("damage", ["is nan", "I64", "C64"])
def test_damaged_tensors_of_ours_and_of_the_compressor_alone(tmp_path, damage):
    convert_from_original(Original().write(tmp_path / "src"), tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    name = "model.compressor.anchor"
    tensors[name] = DAMAGES[damage](tensors[name])
    save_file(tensors, tmp_path / "ours" / "model.safetensors")
    message = refuses(tmp_path / "ours", convert_to_original)
    assert name in message and damage in message
    tensors = original_compressor()
    tensors["query_token"] = DAMAGES[damage](tensors["query_token"])
    with pytest.raises(ValueError, match="query_token"):
        compressor_from_original(tensors)


@pytest.mark.filterwarnings("ignore:.*quantiz")  # deprecated, and in checkpoints all the same
@pytest.mark.parametrize(
    "change", [torch.Tensor.to_sparse, lambda tensor: torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8)]
)
def test_tensors_that_are_no_plain_arrays(tmp_path, change):
    original = Original()
    original.tensors["model.norm.weight"] = change(torch.ones(48))
    refuses(original.write(tmp_path / "src", "bin"))


def test_state_dict_with_names_that_are_no_strings(tmp_path):
    original = Original()
    original.tensors[5] = torch.zeros(1)
    assert "something other than named tensors" in refuses(original.write(tmp_path / "src", "bin"))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.01, 0.5, 0.999])
def test_truncated_weights(tmp_path, form, kept):
    src = Original().write(tmp_path / "src", form)
    file = next(src.glob(f"*.{form}"))
    data = file.read_bytes()
    file.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    assert f"{file} is damaged" in refuses(src)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: "", "cannot be read as the JSON file"),
        (lambda index: "[" * 100_000, "cannot be read as the JSON file"),
        (lambda index: "[]", "holds a JSON list; expected an object"),
        (lambda index: json.dumps({}), "has no weight_map"),
        (lambda index: json.dumps({"weight_map": 5}), "has no weight_map"),
        (lambda index: json.dumps({"weight_map": {"model.norm.weight": ["a"]}}), "has no weight_map"),
        (lambda index: json.dumps({"weight_map": {}}), "hold no tensors"),
        (lambda index: index.replace("model-00001", "../src/model-00001"), "outside its folder.*../src/model-00001"),
        (lambda index: index.replace("model-00001", "/src/model-00001"), "outside its folder"),
        (lambda index: index.replace("model-00001", "..\\\\model-00001"), "outside its folder"),
        (lambda index: index.replace("model-00001", "C:model-00001"), "outside its folder"),
        (lambda index: index.replace("model-00001", "model-00009"), "not there: model-00009-of-00003"),
        (lambda index: index.replace("model.norm.weight", "model.norm.bias"), "not in the files.*: model.norm.bias"),
        (lambda index: json.dumps({"weight_map": {"a": "config.json"}}), "config.json is damaged"),
    ],
)
def test_index_that_is_wrong(tmp_path, change, message):
    src = Original().write(tmp_path / "src", "safetensors-sharded")
    index = src / "model.safetensors.index.json"
    index.write_text(change(index.read_text()))
    assert re.search(message, refuses(src))


def test_index_that_swaps_two_tensors(tmp_path):
    src = Original().write(tmp_path / "src", "safetensors-sharded")
    index = src / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, *_, last = content["weight_map"]
    files = content["weight_map"]
    files[first], files[last] = files[last], files[first]
    index.write_text(json.dumps(content))
    message = refuses(src)
    assert first in message and last in message


def test_weights_beside_their_index(tmp_path):
    src = Original().write(tmp_path / "src", "safetensors-sharded")
    save_file(Original().tensors, src / "model.safetensors")
    assert "both model.safetensors and model.safetensors.index.json" in refuses(src)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "5", '"text"', "[" * 100_000, b"\xff\xfe{}"])
@pytest.mark.parametrize("file", ["config.json", "tower/config.json", "generation_config.json"])
def test_json_files_that_are_damaged(tmp_path, monkeypatch, file, content):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if content is None and file == "generation_config.json":
        pytest.skip("this one need not be there")
    src = Original().write(tmp_path / "src")
    (src / file).unlink(missing_ok=True)
    if content is not None:
        (src / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refuses(src)
    assert str(src / file) in message or "mm_vision_tower='tower'" in message


ABSURD = [-1, 0, 10**9, 10**18, 1.5, "text", [], {"a": 1}, True]


@pytest.mark.parametrize(
    "entry",
    ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "mm_hidden_size", "mm_projector_config"],
)
def test_absurd_sizes(tmp_path, entry):
    original = Original()
    src = original.write(tmp_path / "src")
    for value in ABSURD:
        (src / "config.json").write_text(json.dumps({**original.config, entry: value}))
        message = refuses(src)
        assert entry in message or "fit the model" in message or "no model that can be built" in message


@pytest.mark.parametrize("value", [*ABSURD, None])
@pytest.mark.parametrize("entry", ["model_type", "mm_vision_tower", "hidden_act", "rms_norm_eps", "torch_dtype"])
def test_absurd_entries_end_in_a_sentence_if_they_matter(tmp_path, monkeypatch, entry, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    original = Original()
    original.config[entry] = value
    src = original.write(tmp_path / "src")
    try:
        convert_from_original(src, tmp_path / "dst")
    except ValueError:
        refuses(src)
    else:
        logits(load(tmp_path / "dst"))


@pytest.mark.parametrize("part", ["vision_config", "text_config", "compressor_config"])
@pytest.mark.parametrize("value", ABSURD)
def test_absurd_layers_of_ours(tmp_path, part, value):
    convert_from_original(Original().write(tmp_path / "src"), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config[part]["num_hidden_layers"] = value
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    refuses(tmp_path / "ours", convert_to_original)


def test_layer_with_an_absurd_number(tmp_path):
    original = Original()
    name = f"{PROJECTOR}model.layers.999999999.norm.weight"
    original.tensors[name] = torch.zeros(32)
    assert "the last has the number 999999999" in refuses(original.write(tmp_path / "src"))


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    original = Original()
    original.tensors["evil\x1b[2J\r\n"] = torch.zeros(1)
    src = original.write(tmp_path / "src")
    with pytest.raises(SystemExit):
        main([str(src), str(tmp_path / "dst")])
    message = capsys.readouterr().err
    assert message.endswith("\n") and message[:-1].isprintable() and r"evil\x1b[2J" in message
