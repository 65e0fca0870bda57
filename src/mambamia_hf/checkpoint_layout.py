"""Whose layout a checkpoint has, ours or that of the authors' code, by its config.json."""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any


# Model types of ours.
_OUR_TYPES = ("mambamia", "mambamia_compressor")
# Those of the authors' code and of its relatives: LLaVA's are not the types that Transformers has.
_ORIGINAL_TYPES = re.compile("^llava[_-](?!next|onevision)|mambamia|hyperclovax_?omni", re.IGNORECASE)


def check_layout(config: Mapping[str, Any], name: str | os.PathLike[str], model_types: Collection[str] = ()) -> None:
    """Refuses the configuration of a checkpoint in the layout of the authors' code, naming the converter.

    Args:
        config: content of a config.json.
        name: folder or Hub name of the checkpoint, for the message.
        model_types: those that the checkpoint may be of; by default any other than the authors'.

    Raises:
        ValueError: if it is in that layout, or is a model of another type.
    """
    model_type = config.get("model_type") or ""
    if not isinstance(model_type, str):
        raise ValueError(f"The config.json of {name} has the model_type {model_type!r}.")
    is_ours = model_type in _OUR_TYPES
    if not is_ours and (_ORIGINAL_TYPES.search(model_type) or any(key.startswith("mm_") for key in config)):
        raise ValueError(
            f"{name} is a checkpoint in the layout of the authors' code (model_type={model_type!r}); convert it "
            f"first: python -m mambamia_hf.convert SRC DST."
        )
    if model_types and model_type and model_type not in model_types:
        raise ValueError(
            f"{name} holds a model of type {model_type!r}, not {' or '.join(map(repr, model_types))}; a checkpoint of "
            f"the authors' code is to be converted first: python -m mambamia_hf.convert SRC DST."
        )


__all__ = ["check_layout"]
