"""The golden vectors in `tests/golden`: what the official kernels compute; the README beside them says more."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


GOLDEN = Path(__file__).parents[1] / "golden"


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of one file of golden vectors."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
