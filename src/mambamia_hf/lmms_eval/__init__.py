"""MambaMia in lmms-eval: a model that lmms-eval finds by its entry point, and a task; see docs/lmms_eval.md."""

from pathlib import Path
from typing import Any


TASKS = str(Path(__file__).with_name("tasks"))
"""The folder of the task, for `--include_path`."""


def manifest() -> Any:
    """What lmms-eval wants to know of the model before it is loaded."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mambamia", chat_class_path=f"{__name__}.chat_model.MambaMia")


__all__ = ["TASKS", "manifest"]
