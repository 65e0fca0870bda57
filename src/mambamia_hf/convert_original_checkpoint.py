"""Conversion between LLaVA-layout checkpoints of MambaMia and this package's, in both directions.

    python -m mambamia_hf.convert_original_checkpoint SRC DST [--push-to-hub ID]

SRC is a folder or a Hub id, with safetensors or .bin weights, sharded or not. Weights are read and written shard by
shard through memory maps, so that no more than a shard is in memory, and DST appears only when all of it is written.
"""

import argparse
import json
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import PILImageResampling

from .configuration_mambamia import MambaMiaCompressorConfig, MambaMiaConfig
from .modeling_compressor import MambaMiaCompressor
from .modeling_mambamia import MambaMiaForConditionalGeneration
from .processing_mambamia import CHAT_TEMPLATE, MambaMiaProcessor
from .video_processing_mambamia import MambaMiaVideoProcessor


Shape = tuple[int, ...]

# Our names of the compressor's tensors and the released ones, as rules that apply one after the other.
_COMPRESSOR_NAMES = (
    (r"^anchor$", "query_token"),
    (r"^norm\.weight$", "model.norm_f.weight"),
    (r"^layers\.", "model.layers."),
    (r"\.gpa\.weight_proj\.", ".weight_fc."),
    (r"\.gpa\.gate_proj\.", ".gate_fc."),
    (r"\.forward_ssm\.norm$", ".norm.weight"),
    (r"\.forward_ssm\.", "."),
    (r"\.backward_ssm\.norm$", ".norm_b.weight"),
    (r"\.backward_ssm\.conv1d\.", ".conv1d_b."),
    (r"\.backward_ssm\.A_log$", ".A_b_log"),
    (r"\.backward_ssm\.(D|dt_bias)$", r".\1_b"),
)
# The tensors whose shapes tell the compressor's sizes, and their numbers of dimensions.
_SIZING_TENSORS = {
    "input_proj.weight": 2,
    "output_proj.weight": 2,
    "model.layers.0.weight_fc.weight": 2,
    "model.layers.0.mixer.A_log": 1,
    "model.layers.0.mixer.conv1d.weight": 3,
    "model.layers.0.mixer.out_proj.weight": 2,
}
_PROJECTORS = ("model.mm_projector.", "model.video_audio_compressor.")
_TOWER = "model.vision_tower.vision_tower."
# What the shapes do not tell, or not for certain: an entry of the config that is ours, written by the reverse.
_UNTOLD_SIZES = ("head_dim", "state_size", "n_groups", "chunk_size")
# What is the same in every compressor of the original layout.
_ORIGINAL_SETTINGS = {
    "num_temporal_layers": 0,
    "mixer_type": "mamba2",
    "gpa_placement": "pre_mixer",
    "time_step_limit": (0.0, float("inf")),
    "rms_norm_eps": 1e-5,
}
_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
}
# Vision towers that need no config file, by the last part of their name.
_VISION_TOWERS = {
    "google/siglip2-so400m-patch16-384": {**_SO400M, "patch_size": 16},
    "google/siglip-so400m-patch14-384": {**_SO400M, "patch_size": 14},
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
# Language models whose name in `model_type` is not the one that follows "llava_".
_TEXT_MODEL_TYPES = {"": "llama", "qwen": "qwen2"}
_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
_MAX_SHARD_SIZE = 2 * 10**9

# The dialogues that these models are trained on: a video is followed by a line break and stands between no marks.
_QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<|vision_start|>", "").replace("<|vision_end|>", "\\n")
_VICUNA_TEMPLATE = (
    _QWEN_TEMPLATE.partition("{%- for message in messages -%}")[0]
    + """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- render(message['content']) + ' ' -}}
    {%- elif loop.first -%}
        {{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
        {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- 'USER: ' + render(message['content']) + ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' -}}
        {%- generation -%}
            {{- render(message['content']) + '</s>' -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""
)


def compressor_from_original(
    state_dict: Mapping[str, Tensor], *, head_dim: int, state_size: int, n_groups: int, chunk_size: int
) -> MambaMiaCompressor:
    """A compressor from its tensors in the released layout; sizes are read from their shapes.

    Args:
        state_dict: the compressor's tensors, all of them bare, or all under `model.mm_projector.` or
            `model.video_audio_compressor.`.
        head_dim: size of a head.
        state_size: size of a head's state for each of its channels.
        n_groups: groups of heads that share B and C.
        chunk_size: chunk length of the scan; changes the speed on a GPU, never the result.

    Returns:
        The compressor in evaluation mode, in the type of the tensors, which it does not share.

    Raises:
        ValueError: if tensors are unknown, missing or of a wrong shape, naming them, or if a size that was given
            disagrees with the shapes.
    """
    prefix = next((p for p in _PROJECTORS if all(name.startswith(p) for name in state_dict)), "")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    config = _compressor_config(_shapes(tensors), head_dim, state_size, n_groups, chunk_size)
    with torch.device("meta"):
        compressor = MambaMiaCompressor(config)
    names = {_original_compressor_name(name): name for name in compressor.state_dict()}
    expected = _shapes(compressor.state_dict())
    _check_tensors("the compressor", _shapes(tensors), {name: expected[ours] for name, ours in names.items()})
    compressor.load_state_dict({ours: tensors[name].clone() for name, ours in names.items()}, assign=True)
    return compressor.eval()


def compressor_to_original(compressor: MambaMiaCompressor) -> dict[str, Tensor]:
    """The tensors of a compressor in the released layout, without a prefix: what `compressor_from_original` takes.

    Raises:
        ValueError: if a setting has no place in that layout, as temporal layers have none; names it.
    """
    _check_settings_are_original(compressor.config)
    return {_original_compressor_name(name): tensor for name, tensor in compressor.state_dict().items()}


def convert_from_original(src: str | Path, dst: str | Path, max_shard_size: int = _MAX_SHARD_SIZE) -> Path:
    """Writes a LLaVA-layout checkpoint as one that `MambaMiaForConditionalGeneration.from_pretrained` loads.

    Where a tokenizer lies beside the weights, a processor is written too.

    Args:
        src: folder or Hub id of the checkpoint: config.json and weights (safetensors or .bin, sharded or not).
            `mm_vision_tower` of the config names a folder (in `src` or elsewhere), or a well-known tower or a Hub id.
        dst: folder to write, which must be new or empty; its parents are created.
        max_shard_size: largest size of a weights file to write, in bytes.

    Returns:
        `dst`.

    Raises:
        ValueError: if the checkpoint cannot be read, its config lacks an entry or contradicts its tensors, or tensors
            are unknown, missing or of a wrong shape, naming all of them. Nothing is written then.
    """
    src = _checkpoint_folder(src)
    source_config = _read_json(src / "config.json")
    shards = _read_shards(src)
    shapes = {name: shape for tensors in shards.values() for name, (shape, _) in tensors.items()}
    projector = next((p for p in _PROJECTORS if any(name.startswith(p) for name in shapes)), _PROJECTORS[0])
    tower = _TOWER + ("vision_model." if any(name.startswith(f"{_TOWER}vision_model.") for name in shapes) else "")
    config = _config_from_original(src, source_config, shapes, projector, tower)
    tokenizer = _load_tokenizer(src, config)
    if tokenizer is not None:
        tokenizer.add_tokens(["<|image_pad|>", "<|video_pad|>"], special_tokens=True)
        config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        config.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")

    model = _meta_model(config)
    names = {_original_name(name, projector, tower): name for name in model.state_dict()}
    expected = _shapes(model.state_dict())
    optional = ["lm_head.weight"] if config.tie_word_embeddings else []
    _check_tensors(str(src), shapes, {name: expected[ours] for name, ours in names.items()}, optional)

    with _new_folder(dst) as folder:
        _write_shards(shards, names, folder, max_shard_size)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        custom_object_save(model, folder, config=config)
        if (src / "generation_config.json").is_file():
            shutil.copyfile(src / "generation_config.json", folder / "generation_config.json")
        else:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            _processor(src, source_config, config, tokenizer).save_pretrained(folder)
    return Path(dst)


def convert_to_original(src: str | Path, dst: str | Path, max_shard_size: int = _MAX_SHARD_SIZE) -> Path:
    """The reverse of `convert_from_original`: writes a checkpoint of ours in the LLaVA layout, bit by bit the same.

    Sizes that the layout's shapes do not tell are written to config.json under `mm_projector_config`, and the config
    of a vision tower that is not a well-known one to the folder `vision_tower`.

    Args:
        src: folder or Hub id of a checkpoint of `MambaMiaForConditionalGeneration`.
        dst: folder to write, which must be new or empty; its parents are created.
        max_shard_size: largest size of a weights file to write, in bytes.

    Returns:
        `dst`.

    Raises:
        ValueError: if the checkpoint cannot be read, is not complete, or has a setting that the LLaVA layout has no
            place for. Nothing is written then.
    """
    src = _checkpoint_folder(src)
    model_type = _read_json(src / "config.json").get("model_type")
    if model_type != MambaMiaConfig.model_type:
        raise ValueError(
            f"{src} is a checkpoint of model type {model_type!r}; only {MambaMiaConfig.model_type!r} can be reversed."
        )
    config = MambaMiaConfig.from_pretrained(src)
    _check_settings_are_original(config.compressor_config)
    model = _meta_model(config)
    shards = _read_shards(src)
    shapes = {name: shape for tensors in shards.values() for name, (shape, _) in tensors.items()}
    optional = ["lm_head.weight"] if config.tie_word_embeddings else []
    _check_tensors(str(src), shapes, _shapes(model.state_dict()), optional)
    names = {name: _original_name(name, _PROJECTORS[0], f"{_TOWER}vision_model.") for name in shapes}
    tokenizer = _load_tokenizer(src, config)

    with _new_folder(dst) as folder:
        _write_shards(shards, names, folder, max_shard_size)
        original = _config_to_original(config)
        if original["mm_vision_tower"] not in _VISION_TOWERS:
            config.vision_config.save_pretrained(folder / original["mm_vision_tower"])
        (folder / "config.json").write_text(json.dumps(original, indent=2, sort_keys=True) + "\n")
        if (src / "generation_config.json").is_file():
            shutil.copyfile(src / "generation_config.json", folder / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(dst)


def _original_compressor_name(name: str) -> str:
    for ours, theirs in _COMPRESSOR_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def _original_name(name: str, projector: str, tower: str) -> str:
    """The LLaVA-layout name of one of our tensors, given the prefixes of the compressor and of the vision tower."""
    if name.startswith("model.compressor."):
        return projector + _original_compressor_name(name.removeprefix("model.compressor."))
    if name.startswith("model.vision_tower."):
        return tower + name.removeprefix("model.vision_tower.")
    if name == "model.end_of_frame":
        return "model.image_newframe"
    return re.sub(r"^model\.language_model\.", "model.", name)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_tensors(
    what: str, found: Mapping[str, Shape], expected: Mapping[str, Shape], optional: Collection[str] = ()
):
    problems = {
        "unknown": found.keys() - expected.keys(),
        "missing": expected.keys() - found.keys() - set(optional),
        "of a wrong shape": {
            f"{name} ({found[name]}, expected {expected[name]})"
            for name in found.keys() & expected.keys()
            if found[name] != expected[name]
        },
    }
    if any(problems.values()):
        listed = [f"{len(names)} {kind}: {', '.join(sorted(names))}" for kind, names in problems.items() if names]
        raise ValueError(f"The tensors of {what} do not fit the model. {'; '.join(listed)}.")


def _compressor_config(
    shapes: Mapping[str, Shape],
    head_dim: int | None = None,
    state_size: int | None = None,
    n_groups: int = MambaMiaCompressorConfig.n_groups,
    chunk_size: int = MambaMiaCompressorConfig.chunk_size,
) -> MambaMiaCompressorConfig:
    """The config that tensors of these shapes ask for; a head_dim or state_size of None is read from them too."""
    missing = _SIZING_TENSORS.keys() - shapes.keys()
    if missing:
        raise ValueError(
            f"The compressor lacks the tensors {', '.join(sorted(missing))}, which tell its sizes; check that this is "
            f"a MambaMia compressor with gated patch aggregation."
        )
    for name, ndim in _SIZING_TENSORS.items():
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            raise ValueError(f"The compressor's {name} has the shape {shapes[name]}; expected {ndim} sizes above 0.")
    input_proj, output_proj, weight_fc, A_log, conv1d, out_proj = (shapes[name] for name in _SIZING_TENSORS)
    hidden_size, intermediate_size, num_heads = input_proj[0], out_proj[1], A_log[0]
    expand, rest = divmod(intermediate_size, hidden_size)
    if rest:
        raise ValueError(
            f"The mixer's width of {intermediate_size} is not a multiple of the compressor's, {hidden_size}; check "
            f"model.layers.0.mixer.out_proj.weight and input_proj.weight."
        )
    if head_dim is None:
        head_dim = intermediate_size // num_heads
    if head_dim * num_heads != intermediate_size:
        raise ValueError(
            f"head_dim={head_dim} disagrees with the shapes, a width of {intermediate_size} in {num_heads} heads; set "
            f"head_dim={intermediate_size / num_heads:g}."
        )
    state_width = (conv1d[0] - intermediate_size) / 2
    if state_size is None:
        state_size = int(state_width / n_groups)
    if n_groups * state_size != state_width:
        raise ValueError(
            f"n_groups={n_groups} and state_size={state_size} disagree with the shapes, {conv1d[0]} channels of the "
            f"convolution for a width of {intermediate_size}; their product has to be {state_width:g}."
        )
    layers = [int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))]
    return MambaMiaCompressorConfig(
        input_size=input_proj[1],
        output_size=output_proj[0],
        hidden_size=hidden_size,
        num_hidden_layers=max(layers) + 1,
        expand=expand,
        head_dim=head_dim,
        state_size=state_size,
        n_groups=n_groups,
        conv_kernel=conv1d[2],
        chunk_size=chunk_size,
        patches_per_anchor=weight_fc[0],
        bidirectional=any(re.search(r"\.mixer\.\w+_b(\.|_log$|$)", name) for name in shapes),
        input_norm=any(name.startswith("input_norm.") for name in shapes),
        **_ORIGINAL_SETTINGS,
    )


def _check_settings_are_original(config: MambaMiaCompressorConfig):
    differing = [name for name, value in _ORIGINAL_SETTINGS.items() if getattr(config, name) != value]
    if differing:
        raise ValueError(
            f"The original layout has no place for a compressor with "
            f"{', '.join(f'{name}={getattr(config, name)!r}' for name in differing)}; it only takes "
            f"{', '.join(f'{name}={_ORIGINAL_SETTINGS[name]!r}' for name in differing)}."
        )


def _own_fields(config: PreTrainedConfig | type[PreTrainedConfig]) -> set[str]:
    """The settings that a config has beyond those of every config."""
    return {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)}


def _config_from_original(
    src: Path, source: dict[str, Any], shapes: Mapping[str, Shape], projector: str, tower: str
) -> MambaMiaConfig:
    required = ("model_type", "hidden_size", "num_attention_heads", "mm_vision_tower", "mm_vision_select_layer")
    missing = [key for key in required if source.get(key) is None]
    if missing:
        raise ValueError(f"{src / 'config.json'} lacks {', '.join(missing)}; is this a LLaVA-layout checkpoint?")
    if "avepool" in (source.get("mm_patch_merge_type") or ""):
        raise ValueError(
            f"mm_patch_merge_type={source['mm_patch_merge_type']!r} pools the anchors of a frame, which MambaMia does "
            f"not; a checkpoint trained so cannot be converted."
        )
    vision_config = _vision_config(src, source["mm_vision_tower"])
    if vision_config.model_type.startswith("siglip"):
        vision_config.vision_use_head = any(name.startswith(f"{tower}head.") for name in shapes)
    compressor = {name.removeprefix(projector): shape for name, shape in shapes.items() if name.startswith(projector)}
    try:
        untold = source.get("mm_projector_config", {})
        compressor_config = _compressor_config(compressor, **{k: untold[k] for k in _UNTOLD_SIZES if k in untold})
    except ValueError as error:
        raise ValueError(
            f"No compressor can be built from the tensors under {projector} (mm_projector_type="
            f"{source.get('mm_projector_type')!r}): {error}"
        ) from error
    if source.get("mm_hidden_size") not in (None, compressor_config.input_size):
        raise ValueError(
            f"mm_hidden_size={source['mm_hidden_size']} disagrees with {projector}input_proj.weight, which takes "
            f"features of {compressor_config.input_size}."
        )
    placeholders = {key: source[key] for key in ("image_token_id", "video_token_id") if key in source}
    return MambaMiaConfig(
        vision_config=vision_config,
        text_config=_text_config(source),
        compressor_config=compressor_config,
        vision_feature_layer=source["mm_vision_select_layer"],
        delta_threshold=None,
        end_of_frame="model.image_newframe" in shapes,
        dtype=source.get("dtype", source.get("torch_dtype")),
        **placeholders,
    )


def _text_config(source: dict[str, Any]) -> PreTrainedConfig:
    name = re.sub(r"^.*llava[_-]?", "", source["model_type"])
    model_type = _TEXT_MODEL_TYPES.get(name, name)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {source['model_type']!r} names no language model that Transformers knows.")
    config_class = CONFIG_MAPPING[model_type]
    own = _own_fields(config_class)
    return config_class(**{key: value for key, value in source.items() if key in own or key in _ROPE_KEYS})


def _vision_config(src: Path, name: str) -> PreTrainedConfig:
    """The config of a vision tower by its path, in the checkpoint or not, its well-known name or its Hub id."""
    folder = next((folder for folder in (src / name, Path(name)) if (folder / "config.json").is_file()), None)
    for known, sizes in _VISION_TOWERS.items():
        if folder is None and Path(name).name == Path(known).name:
            return CONFIG_MAPPING[sizes["model_type"]](**sizes)
    try:
        config = AutoConfig.from_pretrained(folder or name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"mm_vision_tower={name!r} is neither a folder with a config.json, nor a Hub id that can be read, nor one "
            f"of {', '.join(_VISION_TOWERS)}; put the tower's config.json into {src / name}."
        ) from error
    return getattr(config, "vision_config", config)


def _config_to_original(config: MambaMiaConfig) -> dict[str, Any]:
    text_config, vision_config = config.text_config, config.vision_config
    own = _own_fields(text_config)
    original = {name: value for name, value in text_config.to_dict().items() if name in own}
    rope = dict(original.pop("rope_parameters", None) or {})
    if rope:
        original["rope_theta"] = rope.pop("rope_theta")
        original["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    names = {model_type: name for name, model_type in _TEXT_MODEL_TYPES.items() if name}
    known = [
        name
        for name, sizes in _VISION_TOWERS.items()
        if all(getattr(vision_config, key, None) == value for key, value in sizes.items())
    ]
    return {
        **original,
        "model_type": f"llava_{names.get(text_config.model_type, text_config.model_type)}",
        "torch_dtype": str(config.dtype).removeprefix("torch.") if config.dtype else None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "mm_vision_tower": known[0] if known else "vision_tower",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat_video_frame_with_end_token" if getattr(config, "end_of_frame", False) else "flat",
        "mm_projector_type": "mambamia",
        "mm_hidden_size": vision_config.hidden_size,
        "mm_projector_config": {name: getattr(config.compressor_config, name) for name in _UNTOLD_SIZES},
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
    }


def _processor(
    src: Path, source: dict[str, Any], config: MambaMiaConfig, tokenizer: PreTrainedTokenizerBase
) -> MambaMiaProcessor:
    name, size = source["mm_vision_tower"], config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    folders = [path for path in (src, src / name, Path(name)) if (path / "preprocessor_config.json").is_file()]
    if folders:
        image_processor = AutoImageProcessor.from_pretrained(folders[0])
    elif config.vision_config.model_type == "clip_vision_model":
        image_processor = CLIPImageProcessor(
            size={"shortest_edge": height}, crop_size={"height": height, "width": width}, do_center_crop=True
        )
    else:
        resample = PILImageResampling.BILINEAR if "siglip2" in Path(name).name else PILImageResampling.BICUBIC
        image_processor = SiglipImageProcessor(size={"height": height, "width": width}, resample=resample)
    shared = "size crop_size do_center_crop default_to_square resample image_mean image_std".split()
    video_processor = MambaMiaVideoProcessor(**{name: getattr(image_processor, name) for name in shared})
    return MambaMiaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=_QWEN_TEMPLATE if "<|im_start|>" in tokenizer.get_vocab() else _VICUNA_TEMPLATE,
        num_frame_tokens=config.num_frame_tokens,
    )


def _load_tokenizer(src: Path, config: MambaMiaConfig) -> PreTrainedTokenizerBase | None:
    if not any((src / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(src, config=config.text_config)


def _meta_model(config: MambaMiaConfig) -> MambaMiaForConditionalGeneration:
    """The model without memory for its weights: what their names and shapes have to be."""
    with torch.device("meta"):
        return MambaMiaForConditionalGeneration(config)


def _checkpoint_folder(src: str | Path) -> Path:
    if Path(src).is_dir():
        return Path(src)
    try:
        return Path(snapshot_download(str(src)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{src} is neither a folder nor a Hub id that can be downloaded; check the name and the network."
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); expected the JSON file of a checkpoint.") from error


def _read_shards(src: Path) -> dict[Path, dict[str, tuple[Shape, int]]]:
    """For each weights file of a checkpoint its tensors' shapes and sizes in bytes; their data is left unread."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = src / f"{name}.index.json"
        if index.is_file():
            files = [src / file for file in sorted(set(_read_json(index)["weight_map"].values()))]
            break
        if (src / name).is_file():
            files = [src / name]
            break
    else:
        raise ValueError(f"{src} has no weights: neither model.safetensors nor pytorch_model.bin, nor their index.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{index} lists weights files that are not there: {', '.join(missing)}.")
    shards: dict[Path, dict[str, tuple[Shape, int]]] = {}
    for file in files:
        shards[file] = {name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in _load_shard(file).items()}
    names = [name for tensors in shards.values() for name in tensors]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"These tensors are in more than one weights file of {src}: {', '.join(twice)}.")
    return shards


def _load_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, memory-mapped: their data is read when it is used."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} is damaged, or holds Python objects other than tensors, which are never loaded."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} holds something other than named tensors; expected a state dict.")
    return tensors


def _write_shards(
    shards: Mapping[Path, Mapping[str, tuple[Shape, int]]],
    names: Mapping[str, str],
    folder: Path,
    max_shard_size: int,
):
    """Writes the tensors under their new `names` as safetensors; each file takes tensors of one source file only."""
    parts: list[tuple[Path, list[str]]] = []
    for file, tensors in shards.items():
        space = -1
        for name, (_, nbytes) in tensors.items():
            if nbytes > space:
                parts.append((file, []))
                space = max(max_shard_size, nbytes)
            parts[-1][1].append(name)
            space -= nbytes
    weight_map = {}
    for number, (file, part) in enumerate(parts, start=1):
        shard = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _write_part(file, {name: names[name] for name in part}, folder / shard)
        weight_map.update({names[name]: shard for name in part})
    if len(parts) > 1:
        sizes = [size for tensors in shards.values() for size in tensors.values()]
        metadata = {
            "total_parameters": sum(torch.Size(shape).numel() for shape, _ in sizes),
            "total_size": sum(nbytes for _, nbytes in sizes),
        }
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(index + "\n")


def _write_part(source: Path, names: Mapping[str, str], target: Path):
    tensors = _load_shard(source)
    renamed: dict[str, Tensor] = {}
    pointers = set()
    for name, new_name in names.items():
        tensor = tensors[name].contiguous()
        # Tied tensors of a .bin file share their memory, which safetensors does not allow.
        renamed[new_name] = tensor.clone() if tensor.data_ptr() in pointers else tensor
        pointers.add(tensor.data_ptr())
    save_file(renamed, target, metadata={"format": "pt"})


@contextmanager
def _new_folder(dst: str | Path) -> Iterator[Path]:
    """Gives a folder beside `dst` to write into, which becomes `dst` at the end and goes away after an error."""
    dst = Path(dst).resolve()
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} exists and is not an empty folder; give the name of a new one.")
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as temporary:
        folder = Path(temporary) / dst.name
        folder.mkdir()
        yield folder
        if dst.exists():
            dst.rmdir()
        folder.rename(dst)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m mambamia_hf.convert_original_checkpoint",
        description="Convert a LLaVA-layout checkpoint of MambaMia to Transformers.",
    )
    parser.add_argument("src", metavar="SRC", help="folder or Hub id of the checkpoint")
    parser.add_argument("dst", metavar="DST", help="folder to write, new or empty")
    parser.add_argument("--push-to-hub", metavar="ID", help="also upload DST to this repository of the Hub")
    parser.add_argument("--reverse", action="store_true", help="convert from Transformers to the LLaVA layout")
    args = parser.parse_args(arguments)
    try:
        convert = convert_to_original if args.reverse else convert_from_original
        print(f"Wrote {convert(args.src, args.dst)}.")
        if args.push_to_hub:
            api = HfApi()
            repo_id = api.create_repo(args.push_to_hub, exist_ok=True).repo_id
            print(f"Uploaded {api.upload_folder(repo_id=repo_id, folder_path=args.dst)}.")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
