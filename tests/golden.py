"""Finds the golden vectors, which lie beside the project and not in it."""

import os
from pathlib import Path

import pytest
from safetensors import safe_open


GOLDEN = Path(os.environ.get("MAMBAMIA_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


def load_golden(name: str) -> tuple[dict, dict]:
    """Tensors and metadata of one file of golden vectors; skips the test where the folder is not there."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the golden vectors are not at {GOLDEN}; set MAMBAMIA_GOLDEN to their folder")
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
