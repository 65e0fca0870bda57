"""Quantisation is for the language model: vision tower, compressor and the language model's head stay as they are.

So Δ, the frames that are kept and the memories of videos are those of the model that is not quantised, bit for bit.
"""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint_files import load_checked


_ENCODER = ("vision_tower", "compressor")
# What configurations of quantisation call their list of modules that stay as they are.
_SKIP_LISTS = ("modules_to_not_convert", "llm_int8_skip_modules")
_EXACT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)  # the last are positions


def load_pretrained(
    load: Callable[..., Any],
    *args: Any,
    quantization_config: QuantizationConfigMixin | Mapping[str, Any] | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Loads a model as `load_checked` does; a configuration of quantisation is made one `of_language_model`.

    Args:
        load, args, quantization_config, output_loading_info, kwargs: as in Transformers and `load_checked`.

    Raises:
        ValueError: also if vision tower or compressor are quantised, see `check_exact`.
    """
    if quantization_config is not None:
        kwargs["quantization_config"] = of_language_model(quantization_config)
    model, report = load_checked(load, *args, output_loading_info=True, **kwargs)
    if getattr(model.config, "quantization_config", None) is not None:
        check_exact(model)
        guard_packed_weights(model)
    return (model, report) if output_loading_info else model


def of_language_model(quantization: QuantizationConfigMixin | Mapping[str, Any]) -> QuantizationConfigMixin:
    """A configuration of quantisation under which vision tower, compressor and head stay as they are.

    Args:
        quantization: as `from_pretrained` takes it. The modules that it names stay, too; a name counts from the whole
            model or from its `model`: "language_model.layers.0" is "model.language_model.layers.0".

    Returns:
        A copy with a longer list; the same configuration if it has none, whose effect `check_exact` sees.
    """
    given: Any = quantization
    if isinstance(quantization, Mapping):
        given = AutoQuantizationConfig.from_dict(dict(quantization))
    name = next((name for name in _SKIP_LISTS if hasattr(given, name)), None)
    if name is None:
        return given
    names = [*(getattr(given, name) or ()), *_ENCODER]
    names += [f"model.{module}" for module in names if not module.startswith(("model.", "lm_head"))]
    given = copy.deepcopy(given)
    setattr(given, name, list(dict.fromkeys([*names, "lm_head"])))
    return given


def check_exact(model: nn.Module) -> None:
    """Refuses a quantised vision tower or compressor.

    Args:
        model: a whole model, its encoder or a compressor.

    Raises:
        ValueError: if there is one, with the name of a weight.
    """
    encoder = getattr(model, "model", model)
    parts = [getattr(encoder, name) for name in _ENCODER] if hasattr(encoder, "compressor") else [model]
    for part in parts:
        for name, weight in [*part.named_parameters(), *part.named_buffers()]:
            if weight.ndim > 1 and not (type(weight) in (nn.Parameter, Tensor) and weight.dtype in _EXACT_TYPES):
                raise ValueError(
                    f"{name} of {type(part).__name__} is quantised ({type(weight).__name__} of {weight.dtype}), and "
                    f"vision tower and compressor have to stay as they are; quantise the language model alone, as "
                    f"from_pretrained of a whole model does with a quantization_config that lists what not to convert."
                )


def check_not_quantized(name: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Refuses a quantised checkpoint as a part of a new model.

    Args:
        name: folder or Hub name.
        config: content of its config.json.

    Raises:
        ValueError: if it is quantised.
    """
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{name} is quantised, and a new model is made of parts that are not; name the checkpoint that it was "
            f"made of, save the model, and load it with a quantization_config."
        )


def guard_packed_weights(model: nn.Module) -> None:
    """Lets a model raise before it saves or trains 4-bit weights that bitsandbytes has packed.

    It packs them when a CPU with AVX512-BF16 first uses them without a gradient. Up to 0.50, packed weights let no
    gradient through, and `state_dict` mixes their scales up, in the model, too.
    """
    model.register_state_dict_pre_hook(_refuse_to_save)
    model.register_forward_pre_hook(_refuse_to_train)


def _refuse_to_save(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    _check_unpacked(model, "saved; save the model before it is asked, or load it again")


def _refuse_to_train(model: nn.Module, arguments: Any) -> None:
    if model.training and torch.is_grad_enabled():
        _check_unpacked(model, "trained; load the model again, and evaluate it only after training")


def _check_unpacked(model: nn.Module, remedy: str) -> None:
    for name, weight in model.named_parameters():
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError(f"bitsandbytes has packed {name} for answers on this CPU and cannot have it {remedy}.")


__all__ = ["check_exact", "check_not_quantized", "guard_packed_weights", "load_pretrained", "of_language_model"]
