"""The vision tower up to the layer that is read: no later layer is run, and no other hidden state is held."""

import copy

from torch import nn


# Towers of Transformers that are embeddings, `encoder.layers`, and a norm, `post_layernorm`.
_STACKS = ("CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel")


def tower_until(tower: nn.Module, layer: int) -> nn.Module | None:
    """A view of a vision tower whose `last_hidden_state` is one of the tower's hidden states.

    The view shares every module with the tower, but it has neither the layers after the one that is read nor the
    final norm and the pooling. It is cheap to make and meant for one call, so that it never outlives a change of the
    tower.

    Args:
        tower: of Transformers.
        layer: number of the hidden state, 0 for the embeddings.

    Returns:
        The view; None for a tower other than those of CLIP, SigLIP and SigLIP 2, and for one that is wrapped, compiled
        or has hooks, as those of offloading and of sharding are: these belong to the whole tower.
    """
    if type(tower).__name__ not in _STACKS or not type(tower).__module__.startswith("transformers.models."):
        return None
    encoder, norm = tower._modules["encoder"], tower._modules["post_layernorm"]
    assert encoder is not None and norm is not None
    layers = encoder._modules["layers"]
    if not isinstance(layers, nn.ModuleList) or any(does_more(module) for module in (tower, encoder, norm)):
        return None
    view = _with(tower, encoder=_with(encoder, layers=layers[:layer]), post_layernorm=nn.Identity())
    if "head" in view._modules:
        view.use_head = False  # type: ignore[assignment]  # a plain attribute
    return view


def _with(module: nn.Module, **children: nn.Module) -> nn.Module:
    """A shallow copy of a module with other children in the place of some."""
    view = copy.copy(module)
    view._modules = {**module._modules, **children}
    return view


def does_more(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says."""
    is_replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return bool(is_replaced or module._forward_pre_hooks or module._forward_hooks)


__all__ = ["does_more", "tower_until"]
