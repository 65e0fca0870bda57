"""vLLM's own backend for models of Transformers, which takes no budgets, is refused."""

import pytest
from tiny_model import tiny_config

from mambamia_hf import MambaMiaModel


def test_backend_for_models_of_transformers_is_refused():
    config = tiny_config()
    config.text_config._attn_implementation = "vllm"  # what that backend sets before it makes the model
    with pytest.raises(ValueError, match="install the package mambamia_hf beside vLLM"):
        MambaMiaModel(config)
