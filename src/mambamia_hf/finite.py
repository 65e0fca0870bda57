"""NaN and infinite numbers: refused where they come in or come up, with the place of the first one."""

import torch
from torch import Tensor, nn


# The types that are checked; quantised weights are left to the library that reads them.
_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite numbers. Takes no memory; says yes where there are no numbers,
    as on the meta device and while a model is compiled."""
    if tensor.dtype not in _CHECKED or tensor.numel() == 0 or tensor.is_meta or torch.compiler.is_compiling():
        return True
    return all(bool(bound.isfinite()) for bound in tensor.detach().aminmax())


def check_finite(name: str, tensor: Tensor, remedy: str) -> None:
    """Refuses an input with NaN or infinite numbers.

    Args:
        name: what to call it.
        tensor: of any shape.
        remedy: what to do, for the message.

    Raises:
        ValueError: if it is not finite, with the place of the first number.
    """
    if not is_finite(tensor):
        raise ValueError(f"{_first(name, tensor)}; {remedy}.")


def check_result(what: str, result: Tensor, model: nn.Module) -> None:
    """Refuses what a model made of finite inputs where it is not finite.

    Args:
        what: what to call it, in the plural.
        result: of any shape.
        model: whose weights may be to blame.

    Raises:
        ValueError: if it is not finite, with the first weight that is not, or else the type that is too small.
    """
    if is_finite(result):
        return
    for name, weight in model.state_dict(keep_vars=True).items():
        if isinstance(weight, Tensor) and not is_finite(weight):
            raise ValueError(
                f"{what} are not finite numbers, as the weights are not: {_first(name, weight)}. The checkpoint is "
                f"damaged or its training diverged; use another one."
            )
    raise ValueError(
        f"{what} are not finite numbers, although all weights and inputs are: they are too large for {result.dtype}; "
        f"load the model with dtype bfloat16 or float32."
    )


def _first(name: str, tensor: Tensor) -> str:
    """The first number that is not finite, and its place."""
    place = (~tensor.detach().isfinite()).nonzero()[0].tolist()
    return f"{name}{place} is {tensor[tuple(place)].item()}"


__all__ = ["check_finite", "check_result", "is_finite"]
