"""The versions of Transformers that this code was tested with, and the names that differ between them."""

from dataclasses import fields
from functools import cache
from typing import Any

import transformers
from packaging.version import Version
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The first and the last tested minor version. `setup.cfg` names the same for pip.
TESTED_TRANSFORMERS = ("5.20", "5.24")

# The cache in outputs and in `generate`: `past_key_values` before Transformers 5.24, `cache` from then on.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def take_cache(arguments: dict[str, Any]) -> Cache | None:
    """Takes the cache out of the arguments of a call, whichever of its names the caller used.

    Args:
        arguments: keyword arguments; the names of the cache are removed from them.

    Returns:
        The cache, or None.

    Raises:
        ValueError: if there are several.
    """
    given = {name: arguments.pop(name) for name in _CACHE_NAMES if name in arguments}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"The cache is given as {' and as '.join(given)}; give it once, as {CACHE_NAME}.")
    return next(iter(given.values()), None)


@cache
def warn_if_untested() -> None:
    """Warns once per process under a Transformers version outside `TESTED_TRANSFORMERS`.

    pip keeps the package to tested versions; a checkpoint that carries this code (`trust_remote_code=True`) meets any.
    """
    first, last = map(Version, TESTED_TRANSFORMERS)
    minor = Version(".".join(transformers.__version__.split(".")[:2]))
    if not first <= minor <= last:
        logger.warning(
            "This MambaMia code was tested with Transformers %s to %s, and %s is installed; if anything fails, "
            "install a tested version.",
            *TESTED_TRANSFORMERS,
            transformers.__version__,
        )


__all__ = ["CACHE_NAME", "TESTED_TRANSFORMERS", "take_cache", "warn_if_untested"]
