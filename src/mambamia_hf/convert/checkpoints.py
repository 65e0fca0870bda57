"""Whole checkpoints, converted from one layout to the other."""

import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from ..checkpoint_files import explained, read_json
from ..configuration_mambamia import MambaMiaConfig
from ..files import atomic_folder
from ..modeling_compressor import MambaMiaCompressor
from ..modeling_mambamia import MambaMiaForConditionalGeneration
from .compressor import EXPECTED_TENSORS, compressor_from_original
from .configurations import (
    TOWER_FOLDER,
    Settings,
    absent_projections,
    check_layer_counts,
    check_settings_are_original,
    config_from_original,
    config_to_original,
    identity_projections,
    parts,
    untold_sizes,
)
from .names import (
    COMPRESSOR_PREFIXES,
    PROJECTORS,
    Shape,
    check_tensors,
    ignoring,
    is_buffer,
    is_empty_embedding,
    is_lone_compressor,
    is_mlp,
    listing,
    matching,
    original_name,
    projector_prefix,
    tower_prefix,
)
from .processors import add_placeholders, load_tokenizer, make_processor
from .weights import DTYPES, StoredTensor, check_types, read_tensors, read_weights, write_weights


MAX_SHARD_SIZE = 2 * 10**9
_GENERATION_CONFIG = "generation_config.json"

_logger = logging.getLogger(__name__)


def convert_from_original(
    src: str | Path,
    dst: str | Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    ignore: Sequence[str] = (),
    new_compressor: bool = False,
) -> Path:
    """Writes a LLaVA-layout checkpoint as one that `MambaMiaForConditionalGeneration.from_pretrained` loads.

    Where a tokenizer lies beside the weights, a processor is written too. Where the checkpoint, without what is to be
    ignored, is a compressor and nothing else, a checkpoint of `MambaMiaCompressor` is written.

    Args:
        src: folder or Hub name of the checkpoint: config.json and weights (safetensors or .bin, sharded or not).
            `mm_vision_tower` of the config names a folder (in `src` or elsewhere), a well-known tower or a Hub name.
        dst: folder to write, which must be new or empty; its parents are created.
        max_shard_size: largest size of a weights file to write, in bytes.
        ignore: shell-style patterns of names; tensors that match one are left out, and listed in a warning.
        new_compressor: whether to put a new compressor, to be trained, in the place of an MLP (`mlp2x_gelu`), with
            which the paper's recipe starts. It is initialised as the released code does; torch's seed decides.

    Returns:
        `dst`.

    Raises:
        ValueError: if the checkpoint cannot be read, its config lacks an entry or contradicts its tensors, or tensors
            are unknown, missing, of a wrong shape or type or not finite, naming them. Nothing is written then.
    """
    folder = _checkpoint_folder(src)
    config_file = folder / "config.json"
    source = read_json(config_file) if config_file.exists() else {}
    weights = read_weights(folder)
    for name in _left_out(weights, ignore):
        del weights[name]
    if new_compressor:
        for name in _left_out(weights, _mlp(folder, weights)):
            del weights[name]
    elif is_lone_compressor(weights):
        return _convert_compressor(source, weights, dst, max_shard_size)
    if not source:
        raise ValueError(f"{config_file} is missing or empty; a whole checkpoint needs its configuration.")
    return _convert_model(folder, source, weights, dst, max_shard_size, new_compressor)


def convert_to_original(src: str | Path, dst: str | Path, max_shard_size: int = MAX_SHARD_SIZE) -> Path:
    """The reverse of `convert_from_original`: writes a checkpoint of ours in the LLaVA layout, bit by bit the same.

    Sizes that the layout's shapes do not tell are written to config.json under `mm_projector_config`, and the config
    of a vision tower that is not a well-known one to the folder `vision_tower`.

    Args:
        src: folder or Hub name of a checkpoint of `MambaMiaForConditionalGeneration`.
        dst: folder to write, which must be new or empty; its parents are created.
        max_shard_size: largest size of a weights file to write, in bytes.

    Returns:
        `dst`.

    Raises:
        ValueError: if the checkpoint cannot be read, is not complete, or has a setting that the LLaVA layout has no
            place for. Nothing is written then.
    """
    folder = _checkpoint_folder(src)
    settings = read_json(folder / "config.json")
    model_type = settings.get("model_type")
    if model_type != MambaMiaConfig.model_type:
        raise ValueError(
            f"{src} is a checkpoint of model type {model_type!r}; only {MambaMiaConfig.model_type!r} can be reversed."
        )
    weights = read_weights(folder)
    check_layer_counts(settings, len(weights))
    with explained(f"The configuration of {src} cannot be used"):
        config = MambaMiaConfig.from_pretrained(folder)
    check_settings_are_original(parts(config)[1])
    check_types({name: tensor.dtype for name, tensor in weights.items()})
    expected = _shapes(_meta_model(config).state_dict())
    check_tensors(str(src), _shapes(weights), expected, _optional(config))
    original_config = config_to_original(config)
    processor_file = folder / "processor_config.json"
    if processor_file.is_file() and read_json(processor_file).get("video_processor", {}).get("do_pad"):
        original_config["image_aspect_ratio"] = "pad"
    kept = _without_identities(weights, config)
    tokenizer = load_tokenizer(folder, config)

    with atomic_folder(dst) as written:
        write_weights({original_name(name): tensor for name, tensor in kept.items()}, written, max_shard_size)
        if original_config["mm_vision_tower"] == TOWER_FOLDER:
            parts(config)[0].save_pretrained(written / TOWER_FOLDER)
        (written / "config.json").write_text(json.dumps(original_config, indent=2, sort_keys=True) + "\n")
        _copy_generation_config(folder, written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
    return Path(dst)


def _convert_model(
    folder: Path,
    source: Settings,
    weights: Mapping[str, StoredTensor],
    dst: str | Path,
    max_shard_size: int,
    new_compressor: bool,
) -> Path:
    shapes = _shapes(weights)
    projector, tower = projector_prefix(weights), tower_prefix(weights)
    try:
        config = config_from_original(folder, source, shapes, projector, tower, new_compressor)
    except ValueError as error:
        raise ValueError(f"{error}{_hint_at_lone_compressor(source, weights)}") from error
    tokenizer = load_tokenizer(folder, config)
    if tokenizer is not None:
        add_placeholders(tokenizer, config)

    model = _meta_model(config)
    ours = {original_name(name, projector, tower): name for name in model.state_dict()}
    expected = {name: tuple(model.state_dict()[new].shape) for name, new in ours.items()}
    kept = {name: tensor for name, tensor in weights.items() if not _is_computed(name, tensor.shape)}
    _check_buffers({name: tensor for name, tensor in weights.items() if is_buffer(name)}, config)
    made = _new_compressor(config, projector) if new_compressor else _identities(config, kept, projector)
    found = {**_shapes(kept), **_shapes(made)}
    check_tensors(str(folder), found, expected, _optional(config), _hint(found, expected, projector))
    check_types({name: tensor.dtype for name, tensor in kept.items()})
    if config.tie_word_embeddings:
        embeddings = model.get_input_embeddings()
        (name,) = (name for name, module in model.named_modules() if module is embeddings)
        _check_tied_head(kept, original_name(f"{name}.weight"))

    # Without an entry in config.json, what most tensors are; the model's type goes into the new config.json.
    (most_common, _), *_ = Counter(tensor.dtype for tensor in kept.values()).most_common(1)
    dtype: Any = config.dtype or DTYPES[most_common]
    model.to(dtype)
    if new_compressor:
        made = {name: tensor.to(dtype) for name, tensor in made.items()}
    with atomic_folder(dst) as written:
        model.save_pretrained(written, state_dict={})  # everything but the weights
        renamed: dict[str, StoredTensor | Tensor] = {ours[name]: tensor for name, tensor in kept.items()}
        renamed |= {ours[name]: tensor for name, tensor in made.items()}
        write_weights(renamed, written, max_shard_size)
        _copy_generation_config(folder, written)
        if tokenizer is not None:
            make_processor(folder, source, config, tokenizer).save_pretrained(written)
    return Path(dst)


def _convert_compressor(
    source: Settings, weights: Mapping[str, StoredTensor], dst: str | Path, max_shard_size: int
) -> Path:
    compressor = compressor_from_original(read_tensors(weights), **untold_sizes(source))
    with atomic_folder(dst) as written:
        compressor.save_pretrained(written, max_shard_size=max_shard_size)
    return Path(dst)


def _checkpoint_folder(src: str | Path) -> Path:
    if Path(src).is_dir():
        return Path(src)
    with explained(f"{src} is neither a folder nor a Hub id that can be downloaded; check the name and the network"):
        return Path(snapshot_download(str(src)))


def _left_out(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    left_out = matching(names, patterns)
    if left_out:
        _logger.warning("Left out %d tensors: %s.", len(left_out), listing(left_out))
    return left_out


def _is_computed(name: str, shape: Shape) -> bool:
    return is_buffer(name) or is_empty_embedding(name, shape)


def _shapes(tensors: Mapping[str, StoredTensor] | Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _optional(config: MambaMiaConfig) -> list[str]:
    """Tensors that a checkpoint of this configuration need not hold: a head that is the embeddings once more."""
    return ["lm_head.weight"] if config.tie_word_embeddings else []


def _meta_model(config: MambaMiaConfig) -> MambaMiaForConditionalGeneration:
    """The model without memory for its weights, for their names and shapes."""
    with explained("The configuration describes no model that can be built"), torch.device("meta"):
        return MambaMiaForConditionalGeneration(config)


def _mlp(folder: Path, weights: Mapping[str, StoredTensor]) -> list[str]:
    """The tensors of the MLP in the place of a compressor."""
    projector = PROJECTORS[0]
    names = [name for name in weights if name.startswith(projector)]
    if not is_mlp([name.removeprefix(projector) for name in names]):
        raise ValueError(f"{folder} has no MLP under {projector} that a new compressor could replace.")
    return names


def _new_compressor(config: MambaMiaConfig, projector: str) -> dict[str, Tensor]:
    """A compressor as the released code initialises it, under its original names."""
    tensors = MambaMiaCompressor(parts(config)[1]).state_dict()
    return {original_name(f"model.compressor.{name}", projector): tensor for name, tensor in tensors.items()}


def _identities(config: MambaMiaConfig, weights: Mapping[str, StoredTensor], projector: str) -> dict[str, Tensor]:
    """The compressor's outer projections where the checkpoint leaves them out, under their original names."""
    names = [name.removeprefix(projector) for name in weights if name.startswith(projector)]
    dtype = weights[f"{projector}model.layers.0.mixer.out_proj.weight"].dtype
    absent = absent_projections(parts(config)[1], names, DTYPES.get(dtype, torch.float32))
    return {projector + name: tensor for name, tensor in absent.items()}


def _without_identities(weights: dict[str, StoredTensor], config: MambaMiaConfig) -> dict[str, StoredTensor]:
    """Our tensors without outer projections that change nothing, which the released code does without."""
    prefix = "model.compressor."
    absent = absent_projections(parts(config)[1], (), torch.float32)
    stored = read_tensors({name: weights[prefix + name] for name in absent})
    redundant = identity_projections(parts(config)[1], stored)
    return {name: tensor for name, tensor in weights.items() if name.removeprefix(prefix) not in redundant}


def _hint(found: Mapping[str, Shape], expected: Mapping[str, Shape], projector: str) -> str:
    """What to say of tensors that are unknown or missing: what a compressor has, and how to leave the others out."""
    unknown, missing = found.keys() - expected.keys(), expected.keys() - found.keys()
    of_compressor = {name for name in unknown | missing if name.startswith(projector) or _may_be_temporal(name)}
    others = unknown - of_compressor
    hints = [f"Names are those of released checkpoints. {EXPECTED_TENSORS}"] if of_compressor else []
    hints += [f"To leave out what is no part of it: {ignoring(others, expected)}"] if others else []
    return " ".join(hints)


def _may_be_temporal(name: str) -> bool:
    """Whether a tensor may be of a temporal layer, by its name or as one of a mixer, and so not to be left out."""
    is_like_one = re.search(r"\.mixer\.|A_log|dt_bias|temporal|\btaa\b|time_", name) is not None
    return is_like_one and not name.startswith(COMPRESSOR_PREFIXES)


def _check_buffers(buffers: Mapping[str, StoredTensor], config: MambaMiaConfig) -> None:
    """Checks the buffers that are left out against what the model computes in their place."""
    for name, buffer in read_tensors(buffers).items():
        expected, tolerance = _computed(name, buffer.shape, config), 1e-6
        if name.endswith("_cached"):  # between -1 and 1
            tolerance = 0.01
        # Saved in half precision at times.
        if not torch.allclose(buffer.float().flatten(), expected.flatten(), rtol=0.01, atol=tolerance):
            raise ValueError(
                f"The buffer {name} differs from what the configuration gives; check config.json (rope_theta for "
                f"rotary embeddings), or leave the buffer out with --ignore '{name}' if config.json is right."
            )


def _computed(name: str, shape: Shape, config: MambaMiaConfig) -> Tensor:
    """What the model computes in the place of a buffer of this name and shape."""
    if name.endswith("position_ids"):
        return torch.arange(math.prod(shape)).float()
    if not name.endswith("_cached"):
        return _rotary_frequencies(config, math.prod(shape))
    length, width = (1, *shape)[-2:]
    angles = torch.outer(torch.arange(length), _rotary_frequencies(config, width // 2)).repeat(1, 2)
    return angles.cos() if name.endswith("cos_cached") else angles.sin()


def _check_tied_head(weights: Mapping[str, StoredTensor], embeddings: str) -> None:
    """Checks a head that is stored although the configuration says that it is the embeddings once more."""
    if "lm_head.weight" in weights:
        stored = read_tensors({name: weights[name] for name in ("lm_head.weight", embeddings)})
        if not torch.equal(stored["lm_head.weight"], stored[embeddings]):
            raise ValueError(
                f"tie_word_embeddings=True contradicts the tensors: lm_head.weight differs from {embeddings}; set it "
                f"to false in config.json, or --ignore 'lm_head.weight'."
            )


def _rotary_frequencies(config: MambaMiaConfig, length: int) -> Tensor:
    theta = (parts(config)[2].rope_parameters or {}).get("rope_theta", math.nan)
    return theta ** -(torch.arange(length) / length)


def _copy_generation_config(source: Path, target: Path) -> None:
    if (source / _GENERATION_CONFIG).is_file():
        read_json(source / _GENERATION_CONFIG)  # raises for a damaged one
        shutil.copyfile(source / _GENERATION_CONFIG, target / _GENERATION_CONFIG)


def _hint_at_lone_compressor(source: Settings, weights: Mapping[str, StoredTensor]) -> str:
    """How to convert the compressor of a checkpoint which is no MambaMia of video, if it has one."""
    prefix = next((prefix for prefix in COMPRESSOR_PREFIXES if f"{prefix}query_token" in weights), None)
    if prefix is None or (prefix in PROJECTORS and "mm_vision_tower" in source):
        return ""
    rest = [name for name in weights if not name.startswith(prefix)]
    return f" To convert the compressor under {prefix} alone, leave out the rest: {ignoring(rest)}"
