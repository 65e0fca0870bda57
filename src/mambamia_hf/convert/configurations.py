"""Configurations of checkpoints in the original layout and in ours."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..checkpoint_files import explained, read_json
from ..configuration_mambamia import MambaMiaCompressorConfig, MambaMiaConfig
from .names import PROJECTORS, Shape, is_mlp, listing, numbered
from .weights import DTYPES


Settings = dict[str, Any]

# The tensors whose shapes tell the compressor's sizes, and their numbers of dimensions.
_SIZING_TENSORS = {
    "model.layers.0.weight_fc.weight": 2,
    "model.layers.0.mixer.A_log": 1,
    "model.layers.0.mixer.conv1d.weight": 3,
    "model.layers.0.mixer.out_proj.weight": 2,
}
# What the shapes do not tell, or not for certain: an entry of the original config that only the reverse writes.
_UNTOLD_SIZES = ("head_dim", "state_size", "n_groups", "chunk_size")
# What is the same in every compressor of the original layout.
_ORIGINAL_SETTINGS: Settings = {
    "num_temporal_layers": 0,
    "mixer_type": "mamba2",
    "gpa_placement": "pre_mixer",
    "time_step_limit": (0.0, float("inf")),
    "rms_norm_eps": 1e-5,
}
_SO400M: Settings = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
}
# Vision towers that need no config file, found by the last part of their name.
_VISION_TOWERS: dict[str, Settings] = {
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
# The folder for the config of a vision tower that is not one of these.
TOWER_FOLDER = "vision_tower"
# Language models whose name in `model_type` is not what follows "llava_".
_TEXT_MODEL_TYPES = {"": "llama", "qwen": "qwen2"}
_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
# Entries that the original config has to have, and their types.
_REQUIRED = {
    "model_type": str,
    "hidden_size": int,
    "num_attention_heads": int,
    "mm_vision_tower": str,
    "mm_vision_select_layer": int,
}
_SIZES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size "
    "max_position_embeddings mm_hidden_size"
).split()
_LAYER_COUNTS = ("num_hidden_layers", "num_temporal_layers", "num_layers", "n_layers", "n_layer")
_POSITIVE = ("rms_norm_eps", "rope_theta")
# What stands for a frame: its tokens, or its tokens and a learned vector.
_MERGE_TYPES = ("flat", "flat_video_frame_with_end_token")


def compressor_config(
    shapes: Mapping[str, Shape],
    head_dim: int | None = None,
    state_size: int | None = None,
    n_groups: int = MambaMiaCompressorConfig.n_groups,
    chunk_size: int = MambaMiaCompressorConfig.chunk_size,
) -> MambaMiaCompressorConfig:
    """The configuration that a compressor's tensors of these shapes ask for.

    Args:
        shapes: shapes of the tensors under their released names, without a prefix.
        head_dim: size of a head, by default what the shapes tell.
        state_size: size of a head's state per channel, by default what the shapes tell.
        n_groups: groups of heads that share B and C.
        chunk_size: chunk length of the scan.

    Raises:
        ValueError: if tensors that tell the sizes are missing or disagree with each other or with the arguments.
    """
    _check_sizing_tensors(shapes)
    weight_fc, A_log, conv1d, out_proj = (shapes[name] for name in _SIZING_TENSORS)
    hidden_size, intermediate_size, num_heads = out_proj[0], out_proj[1], A_log[0]
    expand, rest = divmod(intermediate_size, hidden_size)
    if rest:
        raise ValueError(
            f"The mixer's width of {intermediate_size} is not a multiple of the compressor's, {hidden_size}; check "
            f"model.layers.0.mixer.out_proj.weight."
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
        state_size = int(state_width // n_groups)
    if n_groups * state_size != state_width:
        raise ValueError(
            f"n_groups={n_groups} and state_size={state_size} disagree with the shapes, {conv1d[0]} channels of the "
            f"convolution for a width of {intermediate_size}; their product has to be {state_width:g}."
        )
    return MambaMiaCompressorConfig(
        input_size=shapes["input_proj.weight"][1] if "input_proj.weight" in shapes else hidden_size,
        output_size=shapes["output_proj.weight"][0] if "output_proj.weight" in shapes else hidden_size,
        hidden_size=hidden_size,
        num_hidden_layers=_number_of_layers(shapes),
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


def absent_projections(
    config: MambaMiaCompressorConfig, names: Collection[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Identities for the outer projections that a released compressor leaves out where widths are equal.

    Args:
        config: of the compressor.
        names: the compressor's tensors under their released names, without a prefix.
        dtype: of the identities.

    Returns:
        `input_proj` and `output_proj`, each as weight and bias, where `names` has neither and the widths allow it.
    """
    made: dict[str, Tensor] = {}
    for projection, width in (("input_proj", config.input_size), ("output_proj", config.output_size)):
        if width == config.hidden_size and not any(name.startswith(f"{projection}.") for name in names):
            made[f"{projection}.weight"] = torch.eye(width, dtype=dtype)
            made[f"{projection}.bias"] = torch.zeros(width, dtype=dtype)
    return made


def identity_projections(config: MambaMiaCompressorConfig, tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of the outer projections among `tensors` that change nothing, as weights and biases."""
    redundant: set[str] = set()
    identities = absent_projections(config, (), torch.float32)
    for projection in ("input_proj", "output_proj"):
        names = {name for name in identities if name.startswith(projection)}
        if names and all(torch.equal(tensors[name].float(), identities[name]) for name in names):
            redundant |= names
    return redundant


def check_settings_are_original(config: MambaMiaCompressorConfig) -> None:
    """Raises a ValueError that names the compressor's settings which the original layout has no place for."""
    differing = [name for name, value in _ORIGINAL_SETTINGS.items() if getattr(config, name) != value]
    if differing:
        raise ValueError(
            f"The original layout has no place for a compressor with "
            f"{', '.join(f'{name}={getattr(config, name)!r}' for name in differing)}; it only takes "
            f"{', '.join(f'{name}={_ORIGINAL_SETTINGS[name]!r}' for name in differing)}."
        )


def untold_sizes(source: Settings) -> dict[str, int]:
    """The sizes of the compressor that the original config tells, where the reverse wrote it."""
    told = source.get("mm_projector_config")
    if told is None:
        return {}
    if not isinstance(told, dict) or not all(name in _UNTOLD_SIZES and _is_size(told[name]) for name in told):
        raise ValueError(
            f"mm_projector_config={told!r} may hold {', '.join(_UNTOLD_SIZES)}, whole numbers of at least 1, and "
            f"nothing else."
        )
    return told


def parts(config: MambaMiaConfig) -> tuple[PreTrainedConfig, MambaMiaCompressorConfig, PreTrainedConfig]:
    """The configurations of vision tower, compressor and language model, which may be dicts before construction."""
    vision, compressor, text = config.vision_config, config.compressor_config, config.text_config
    assert isinstance(vision, PreTrainedConfig) and isinstance(text, PreTrainedConfig)
    assert isinstance(compressor, MambaMiaCompressorConfig)
    return vision, compressor, text


def check_layer_counts(config: Settings, num_tensors: int) -> None:
    """Refuses a configuration of more layers than the checkpoint has tensors, before anything counts to that number.

    Args:
        config: content of a config.json, with configurations within it.
        num_tensors: tensors of the checkpoint.

    Raises:
        ValueError: if there are fewer tensors than layers.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_layer_counts(value, num_tensors)
        elif name in _LAYER_COUNTS and isinstance(value, int | float) and value > num_tensors:
            raise ValueError(f"A configuration has {name}={value}, and the checkpoint has only {num_tensors} tensors.")


def config_from_original(
    src: Path,
    source: Settings,
    shapes: Mapping[str, Shape],
    projector: str,
    tower: str,
    new_compressor: bool = False,
) -> MambaMiaConfig:
    """Our configuration of a checkpoint in the original layout.

    Args:
        src: folder of the checkpoint.
        source: its config.json.
        shapes: shapes of its tensors.
        projector: prefix of the compressor's tensors.
        tower: prefix of the vision tower's tensors.
        new_compressor: whether the compressor is not among the tensors and begins as the released code's does.

    Raises:
        ValueError: if an entry is missing, absurd, contradicts the tensors or asks for something MambaMia does not do.
    """
    check_layer_counts(source, len(shapes))
    _check_entries(src / "config.json", source)
    _check_preprocessing(source)
    vision_config = _vision_config(src, source["mm_vision_tower"], len(shapes))
    if vision_config.model_type.startswith("siglip"):
        vision_config.vision_use_head = any(name.startswith(f"{tower}head.") for name in shapes)
    with explained(f"{src / 'config.json'} describes no model that can be built"):
        text_config = _text_config(source)
    if new_compressor:
        config = MambaMiaCompressorConfig.for_language_model(text_config, initialization="released")
        config.input_size = vision_config.hidden_size
    else:
        config = _compressor_config(source, shapes, projector)
    if source.get("mm_hidden_size") not in (None, config.input_size):
        raise ValueError(
            f"mm_hidden_size={source['mm_hidden_size']} disagrees with the compressor, which takes features of "
            f"{config.input_size}."
        )
    vision_feature = _vision_feature(source, vision_config, numbered(shapes, f"{tower}encoder.layers."))
    with explained(f"{src / 'config.json'} describes no model that can be built"):
        converted = MambaMiaConfig(
            vision_config=vision_config,
            text_config=text_config,
            compressor_config=config,
            delta_threshold=None,
            end_of_frame=_end_of_frame(source, shapes),
            dtype=source.get("dtype", source.get("torch_dtype")),
            **vision_feature,
            **{key: source[key] for key in ("image_token_id", "video_token_id") if key in source},
        )
        if new_compressor:
            _, config.patches_per_anchor = converted.patch_grid()
        return converted


def config_to_original(config: MambaMiaConfig) -> Settings:
    """The original layout's config.json of a checkpoint of ours.

    Raises:
        ValueError: if features are taken from where the original code takes none.
    """
    vision_config, compressor, text_config = parts(config)
    own = own_settings(text_config)
    original = {name: value for name, value in text_config.to_dict().items() if name in own}
    rope = dict(original.pop("rope_parameters", None) or {})
    if rope:
        original["rope_theta"] = rope.pop("rope_theta")
        original["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    names = {model_type: name for name, model_type in _TEXT_MODEL_TYPES.items() if name}
    tower, select_layer = _tower_to_original(config)
    return {
        **original,
        "model_type": f"llava_{names.get(text_config.model_type, text_config.model_type)}",
        "torch_dtype": str(config.dtype).removeprefix("torch.") if config.dtype else None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "mm_vision_tower": tower,
        "mm_vision_select_layer": select_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": _MERGE_TYPES[config.end_of_frame],
        "mm_projector_type": "mambamia",
        "mm_hidden_size": vision_config.hidden_size,
        "mm_projector_config": {name: getattr(compressor, name) for name in _UNTOLD_SIZES},
        "image_aspect_ratio": "square",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
    }


def _compressor_config(source: Settings, shapes: Mapping[str, Shape], projector: str) -> MambaMiaCompressorConfig:
    tensors = {name.removeprefix(projector): shape for name, shape in shapes.items() if name.startswith(projector)}
    try:
        return compressor_config(tensors, **untold_sizes(source))
    except ValueError as error:
        if not tensors:
            raise ValueError(
                f"The checkpoint has no compressor under {' or '.join(PROJECTORS)} (mm_projector_type="
                f"{source.get('mm_projector_type')!r}), only {listing(shapes)}."
            ) from error
        hint = ""
        if is_mlp(tensors):
            hint = " An MLP compresses nothing; to train a compressor in its place, convert with --new-compressor."
        raise ValueError(
            f"No compressor can be built from the tensors under {projector} (mm_projector_type="
            f"{source.get('mm_projector_type')!r}): {error}{hint}"
        ) from error


def own_settings(config: PreTrainedConfig | type[PreTrainedConfig]) -> set[str]:
    """The settings that a configuration has beyond those of every configuration."""
    return {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)}


def _check_sizing_tensors(shapes: Mapping[str, Shape]) -> None:
    # Only a compressor, which a query_token tells, may leave out its outer projections.
    projections = {
        f"{name}.weight": 2
        for name in ("input_proj", "output_proj")
        if "query_token" not in shapes or any(other.startswith(f"{name}.") for other in shapes)
    }
    needed = {**_SIZING_TENSORS, **projections}
    missing = needed.keys() - shapes.keys()
    if missing:
        raise ValueError(
            f"The compressor lacks the tensors {', '.join(sorted(missing))}, which tell its sizes; check that this is "
            f"a MambaMia compressor with gated patch aggregation."
        )
    for name, ndim in needed.items():
        if len(shapes[name]) != ndim or 0 in shapes[name]:
            raise ValueError(f"The compressor's {name} has the shape {shapes[name]}; expected {ndim} sizes above 0.")


def _number_of_layers(shapes: Mapping[str, Shape]) -> int:
    numbers = numbered(shapes, "model.layers.")
    if numbers != set(range(len(numbers))):
        raise ValueError(
            f"The compressor has {len(numbers)} layers and the last has the number {max(numbers)}; expected numbers "
            f"from 0 on without a gap."
        )
    return len(numbers)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _check_entries(file: Path, source: Settings) -> None:
    missing = [name for name in _REQUIRED if source.get(name) is None]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; is this a LLaVA-layout checkpoint?")
    expected = {name: f"a {kind.__name__}" for name, kind in _REQUIRED.items() if type(source[name]) is not kind}
    given = {name: value for name, value in source.items() if value is not None}
    expected |= {
        name: "a whole number of at least 1" for name in _SIZES if name in given and not _is_size(given[name])
    }
    expected |= {
        name: "a number above 0"
        for name in _POSITIVE
        if name in given and not (type(given[name]) in (int, float) and 0 < given[name] < math.inf)
    }
    expected |= {
        name: "a type of floating-point numbers"
        for name in ("dtype", "torch_dtype")
        if name in given and given[name] not in [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
    }
    if expected:
        listed = ", ".join(f"{name}={source[name]!r} (expected {what})" for name, what in sorted(expected.items()))
        raise ValueError(f"{file} has impossible entries: {listed}.")


def _check_preprocessing(source: Settings) -> None:
    """Refuses what would reach the language model otherwise than in training."""
    merge_type = source.get("mm_patch_merge_type") or _MERGE_TYPES[0]
    if "avepool" in str(merge_type):
        raise ValueError(
            f"mm_patch_merge_type={merge_type!r} pools the anchors of a frame, which MambaMia does not; a checkpoint "
            f"trained so cannot be converted."
        )
    supported: dict[str, tuple[Any, ...]] = {
        "mm_patch_merge_type": _MERGE_TYPES,
        "image_aspect_ratio": ("square", "pad"),
        "mm_use_im_start_end": (False,),
    }
    for name, values in supported.items():
        if source.get(name) not in (None, *values):
            raise ValueError(
                f"{name}={source[name]!r} is not supported, only {' and '.join(map(repr, values))}: the model would "
                f"see other input than in training. Change the entry in config.json only if it is wrong."
            )


def _end_of_frame(source: Settings, shapes: Mapping[str, Shape]) -> bool:
    """Whether a vector follows each frame; without an entry that says so, whether there is one."""
    has_vector = "model.image_newframe" in shapes
    merge_type = source.get("mm_patch_merge_type")
    if merge_type == _MERGE_TYPES[0] and has_vector:
        raise ValueError(
            f"mm_patch_merge_type={merge_type!r} puts nothing after a frame, and the checkpoint has a vector for it, "
            f"model.image_newframe; set it to {_MERGE_TYPES[1]!r}, or ignore the vector."
        )
    return has_vector or merge_type == _MERGE_TYPES[1]


def _vision_feature(source: Settings, vision_config: PreTrainedConfig, layers: set[int]) -> Settings:
    """Which hidden state of the vision tower is read, as settings of ours.

    The released code deletes the layers of a SigLIP tower that come after the one asked for, before training, and
    reads what comes after the tower's final layer norm. A checkpoint that holds all layers was not trained so: there
    the hidden state itself is read, as LLaVA does, and only -1 stands for the end of the tower, norm included.
    """
    layer, num_layers = source["mm_vision_select_layer"], getattr(vision_config, "num_hidden_layers", 0)
    is_siglip = vision_config.model_type.startswith("siglip")
    if source.get("mm_vision_select_feature") not in (None, "patch", *(["cls_patch"] if is_siglip else [])):
        raise ValueError(
            f"mm_vision_select_feature={source['mm_vision_select_feature']!r} is not supported, only 'patch': "
            f"MambaMia reads no class token."
        )
    kept = layer if layer >= 0 else num_layers + 1 + layer
    is_cut = 0 < kept < num_layers and len(layers) == kept and max(layers) == kept - 1
    if is_cut:
        vision_config.num_hidden_layers = kept
        layer = -1
    if not is_siglip or layer != -1:
        return {"vision_feature_layer": layer}
    return {"vision_feature_layer": -1, "vision_feature_norm": True}


def _tower_to_original(config: MambaMiaConfig) -> tuple[str, int]:
    """The original `mm_vision_tower` and `mm_vision_select_layer` of a configuration of ours."""
    vision_config, layer = parts(config)[0], config.vision_feature_layer
    num_layers = vision_config.num_hidden_layers
    is_last, is_normed = layer in (-1, num_layers), config.vision_feature_norm
    if is_normed and not is_last:
        raise ValueError(
            f"The original layout takes features after the vision tower's norm from its last layer only, not from "
            f"vision_feature_layer={layer}."
        )
    for name, sizes in _VISION_TOWERS.items():
        cut = sizes["num_hidden_layers"] - num_layers
        fits = all(
            getattr(vision_config, key, None) == value for key, value in sizes.items() if key != "num_hidden_layers"
        )
        if fits and (cut == 0 or (cut > 0 and is_normed)):
            return name, _select_layer(config, cut)
    return TOWER_FOLDER, _select_layer(config, 0)


def _select_layer(config: MambaMiaConfig, cut: int) -> int:
    """`mm_vision_select_layer`, given the number of layers that were deleted from the end of the tower."""
    vision_config, layer = parts(config)[0], config.vision_feature_layer
    if config.vision_feature_norm:
        return -1 - cut
    if layer == -1 and vision_config.model_type.startswith("siglip"):
        return vision_config.num_hidden_layers  # the same state without the norm, which -1 stands for in that layout
    return layer


def _text_config(source: Settings) -> PreTrainedConfig:
    name = re.sub(r"^.*llava[_-]?", "", source["model_type"])
    model_type = _TEXT_MODEL_TYPES.get(name, name)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {source['model_type']!r} names no language model that Transformers knows.")
    config_class = CONFIG_MAPPING[model_type]
    own = own_settings(config_class)
    return config_class(**{key: value for key, value in source.items() if key in own or key in _ROPE_KEYS})


def _vision_config(src: Path, name: str, num_tensors: int) -> PreTrainedConfig:
    """The configuration of a vision tower, found by its folder, its well-known name or its Hub name."""
    with explained(
        f"mm_vision_tower={name!r} is neither a folder with a config.json, nor a Hub name that can be read, nor one "
        f"of {', '.join(_VISION_TOWERS)}; put the tower's config.json into {src / TOWER_FOLDER} and name that folder"
    ):
        folder = next((folder for folder in (src / name, Path(name)) if (folder / "config.json").is_file()), None)
        for known, sizes in _VISION_TOWERS.items():
            if folder is None and Path(name).name == Path(known).name:
                return CONFIG_MAPPING[sizes["model_type"]](**sizes)
        if folder is not None:
            check_layer_counts(read_json(folder / "config.json"), num_tensors)
        config = AutoConfig.from_pretrained(folder or name, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        config.name_or_path = name  # else the path on this machine, which is not for publication
        return config
