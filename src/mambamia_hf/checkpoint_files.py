"""What the files of a checkpoint say, checked before anything is built or opened by it."""

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath, PureWindowsPath
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open


# Settings that count layers; 1,000 are several times those of the deepest models.
_LAYERS = "num_hidden_layers num_temporal_layers num_layers n_layers n_layer".split()
_MAX_LAYERS = 1000
# Settings that have to be sizes, at least 1 where there are any; a hundred times those of the largest models.
_SIZES = (
    "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size image_size patch_size "
    "num_channels num_patches embedding_size hidden_sizes depths input_size output_size expand state_size n_groups "
    "conv_kernel chunk_size patches_per_anchor"
).split()
_MAX_SIZE = 10**8
# Settings whose bounds may be infinite.
_UNBOUNDED = ("time_step_limit",)

# Types of weights that are not quantised, as safetensors calls them.
_FLOATS = ("F64", "F32", "F16", "BF16")
# So many weights are named in a message.
_MAX_NAMED = 5


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns errors that a library raises over bad input into a ValueError of one sentence that starts with `what`."""
    try:
        yield
    # What a library raises over values it never expected is no part of its promises: KeyError for an unknown
    # activation, ZeroDivisionError for 0 heads, RecursionError for nested JSON.
    except Exception as error:
        reason = textwrap.shorten(str(error), 400, placeholder=" …").rstrip(".")
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} ({kind}{reason}).") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if the file cannot be read or holds anything else.
    """
    with explained(f"{file} cannot be read as the JSON file of a checkpoint"):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}; expected an object.")
    return content


@contextmanager
def well_typed(what: str = "A setting of the configuration cannot be used") -> Iterator[None]:
    """Turns the error of a library over a setting of a wrong type into a ValueError of one sentence, `what` first."""
    try:
        yield
    except (ImportError, OSError, ValueError):  # a package that is missing is no setting
        raise
    except Exception as error:  # as in `explained`
        reason = textwrap.shorten(str(error.__cause__ or error), 400, placeholder=" …").rstrip(".")
        raise ValueError(f"{what}: {reason}.") from error


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses absurd numbers of layers and sizes, over which libraries would count for hours, NaN and infinity.

    Args:
        settings: of a configuration; other types than numbers are left to the library that it is of.

    Raises:
        ValueError: for the first absurd one.
    """
    for name, value in settings.items():
        _check_finite(name, value)
    if isinstance(settings.get("dtype"), int | float | list | dict):
        raise ValueError(f"dtype must be the name of one of PyTorch's, not {settings['dtype']!r}.")
    for names, least, most in ((_LAYERS, 0, _MAX_LAYERS), (_SIZES, 1, _MAX_SIZE)):
        for name in names:
            value = settings.get(name)
            numbers = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(number, int | float) and not least <= number <= most for number in numbers):
                raise ValueError(f"{name} must be at least {least} and at most {most}, not {value}.")


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_finite(f"{name}.{key}", part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_finite(name, part)
    elif isinstance(value, float) and not (math.isfinite(value) or name in _UNBOUNDED):
        raise ValueError(f"{name} must be a finite number, not {value}.")


def read_index(index: Path) -> dict[str, Path]:
    """Which file holds each tensor of a checkpoint of several files.

    Raises:
        ValueError: if the index cannot be read, or names files outside its folder or that are not there.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from names of tensors to names of files.")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if not _stays_inside(name)]
    if outside:
        raise ValueError(f"{index} names files outside its folder, which are not read: {', '.join(outside)}.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} lists weights files that are not there: {', '.join(missing)}.")
    return {tensor: index.parent / file for tensor, file in weight_map.items()}


def check_indexes(folder: str | os.PathLike[str]) -> None:
    """Checks the indexes of the weights in a local folder; anything else is left to who loads it.

    Raises:
        ValueError: as `read_index` does, and for an index of no tensors or without metadata, which Transformers reads.
    """
    for index in sorted(Path(folder).glob("*.index.json")):
        if not read_index(index) or not isinstance(read_json(index).get("metadata"), dict):
            raise ValueError(f"{index} lacks its weight_map or its metadata; copy or download it again.")


def load_checked(
    load: Callable[..., Any],
    *args: Any,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Loads a model as Transformers does, and says in one sentence what is wrong with its weights.

    Args:
        load: `from_pretrained` of Transformers.
        args, ignore_mismatched_sizes, output_loading_info, kwargs: as in Transformers.

    Raises:
        ValueError: if an index names files outside its folder or that are not there, or if weights are integers or
            complex.
        OSError: if a weights file is damaged.
        RuntimeError: if weights have another shape than the configuration asks for.
    """
    name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    folder = None if name is None else Path(name, kwargs.get("subfolder") or "")
    if folder is not None:
        check_indexes(folder)
    try:
        model, report = load(*args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs)
        others = {} if folder is None else _other_numbers(folder)
    except (SafetensorError, UnpicklingError) as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
        raise OSError(f"A weights file of {name} is damaged ({reason}); copy or download it again.") from error
    if report["mismatched_keys"] and not ignore_mismatched_sizes:
        weights = [
            f"{key} ({tuple(found)}, not {tuple(own)})" for key, found, own in sorted(report["mismatched_keys"])
        ]
        raise RuntimeError(
            f"Weights of {name} have other shapes than its configuration asks for: {_listed(weights)}; use the "
            f"configuration that they were saved with."
        )
    if others and getattr(model.config, "quantization_config", None) is None:
        _check_numbers(model, others)
    return (model, report) if output_loading_info else model


def _other_numbers(folder: Path) -> dict[str, str]:
    """The types of the tensors in a local folder that are no floating-point numbers, by name."""
    types: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            types |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    return {name: kind for name, kind in types.items() if kind not in _FLOATS}


def _check_numbers(model: Any, others: Mapping[str, str]) -> None:
    """Refuses weights that Transformers has converted to floating-point numbers, which they were not."""
    own = model.state_dict()
    wrong = [f"{name} ({kind})" for name, kind in others.items() if name in own and own[name].is_floating_point()]
    if wrong:
        raise ValueError(f"Weights have to be {', '.join(_FLOATS)}, not {_listed(wrong)}; the checkpoint is damaged.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _stays_inside(name: str) -> bool:
    paths = (PurePath(name), PureWindowsPath(name))
    return name.isprintable() and not any(path.anchor or ".." in path.parts for path in paths)


__all__ = ["check_indexes", "check_settings", "explained", "load_checked", "read_index", "read_json", "well_typed"]
