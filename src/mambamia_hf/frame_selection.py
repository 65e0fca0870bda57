"""Frame selection by Δ, the importance of each frame: delta sampling and exact budgets, as pure functions."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn


def frame_budget(num_frames: int, keep_frames: int | None = None, keep_ratio: float | None = None) -> int:
    """The number of frames that an exact budget keeps; all of them without a budget.

    The number depends on no Δ, so a prompt can be sized before the model runs.

    Args:
        num_frames: number of frames of the video.
        keep_frames: number of frames to keep, at least 1; a shorter video keeps all of its frames.
        keep_ratio: share of the frames to keep, in (0, 1]; at least one frame is kept.

    Returns:
        The number of kept frames, at most `num_frames`.

    Raises:
        ValueError: if both budgets are given, or one is out of range.
    """
    if keep_frames is not None and keep_ratio is not None:
        raise ValueError(f"Set keep_frames or keep_ratio, not both (got {keep_frames} and {keep_ratio}).")
    if keep_frames is not None:
        if not _is_number(keep_frames) or not float(keep_frames).is_integer() or keep_frames < 1:
            raise ValueError(f"keep_frames must be a whole number of at least 1, not {keep_frames}.")
        return min(int(keep_frames), num_frames)
    if keep_ratio is not None:
        if not _is_number(keep_ratio) or not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio must lie above 0 and at most at 1, not {keep_ratio}.")
        return min(max(1, round(keep_ratio * num_frames)), num_frames)
    return num_frames


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def select_frames(
    frame_deltas: Tensor,
    threshold: float | None = None,
    keep_frames: int | None = None,
    keep_ratio: float | None = None,
    frame_mask: Tensor | None = None,
) -> Tensor:
    r"""Selects the frames that the language model sees.

    A threshold δ is delta sampling, the paper's Algorithm 1: $A \leftarrow A + \Delta_t$; when $A \ge \delta$, keep
    frame t and reset $A \leftarrow 0$. When no frame is kept, the frame with the largest Δ is (the paper's algorithm
    returns nothing there).

    An exact budget of K frames accumulates Δ in the same way, with two changes that make exactly K frames come out:
    the threshold is the step c that solves $\sum_t \min(\Delta_t, c) = K c$, and each frame adds $\min(\Delta_t, c)$,
    so it completes at most one step. A frame is kept when the running sum passes a multiple of c.

    Args:
        frame_deltas (`torch.FloatTensor` of shape `(batch_size, num_frames)`): Δ of each frame, not negative.
        threshold (`float`, *optional*): δ, not negative; 0 keeps every frame.
        keep_frames (`int`, *optional*): exact budget as a number of frames, see [`frame_budget`].
        keep_ratio (`float`, *optional*): exact budget as a share of the frames, see [`frame_budget`].
        frame_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`, *optional*):
            True for frames, False for padding, which is never kept. By default there is no padding.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, num_frames)`: the keep mask, True for kept frames. Without threshold
        and budget every frame is kept.

    Raises:
        ValueError: for a threshold together with a budget, two budgets, one of them out of range, or a Δ that is
            negative or not finite.
    """
    if threshold is not None and (keep_frames is not None or keep_ratio is not None):
        raise ValueError(
            f"threshold={threshold} and a budget (keep_frames={keep_frames}, keep_ratio={keep_ratio}) exclude each "
            f"other; give one of them."
        )
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold must not be negative, not {threshold}.")
    frame_budget(1, keep_frames, keep_ratio)  # raises for a budget out of range
    if frame_mask is None:
        frame_mask = torch.ones_like(frame_deltas, dtype=torch.bool)
    keep_mask = torch.zeros_like(frame_mask, dtype=torch.bool)
    for video, mask in enumerate(frame_mask.bool()):
        deltas = frame_deltas[video, mask].detach().double().cpu()
        invalid = deltas[~(deltas.isfinite() & (deltas >= 0))]
        if len(invalid):
            raise ValueError(f"Video {video} has a frame with Δ = {invalid[0]}; Δ must be finite and not negative.")
        if threshold is not None:
            kept = _keep_by_threshold(deltas, threshold)
        else:
            kept = _keep_by_budget(deltas, frame_budget(len(deltas), keep_frames, keep_ratio))
        keep_mask[video, mask] = kept.to(keep_mask.device)
    return keep_mask


def _keep_by_threshold(deltas: Tensor, threshold: float) -> Tensor:
    """Algorithm 1 for one video: `(num_frames,)` to the keep mask of the same shape."""
    kept, accumulated = [], 0.0
    for delta in deltas.tolist():
        accumulated += delta
        kept.append(accumulated >= threshold)
        if kept[-1]:
            accumulated = 0.0
    if kept and not any(kept):
        kept[int(deltas.argmax())] = True
    return torch.tensor(kept, dtype=torch.bool)


def _keep_by_budget(deltas: Tensor, budget: int) -> Tensor:
    """Exactly `budget` frames of one video: `(num_frames,)` to the keep mask of the same shape."""
    if budget >= len(deltas):
        return torch.ones(len(deltas), dtype=torch.bool)
    # Frames with Δ = 0 have to fill what the others leave of the budget.
    deltas = deltas.clamp(min=max(1e-6 * deltas.max().item(), 1e-30))
    # If m frames have Δ ≥ c, each completes one step, and the others share the remaining budget of K - m steps. So
    # c = (sum of all but the m largest) / (K - m), with the smallest m whose next frame stays within c.
    descending = deltas.sort(descending=True).values
    rest = deltas.sum() - nn.functional.pad(descending.cumsum(0), (1, 0))[:budget]
    steps = rest / (budget - torch.arange(budget))
    step = steps[(descending[:budget] <= steps * (1 + 1e-12)).int().argmax()]
    # The margin absorbs rounding where the running sum should reach a multiple of c exactly.
    completed = torch.floor((deltas.clamp(max=step) / step).cumsum(0) + 1e-6)
    return completed.diff(prepend=completed.new_zeros(1)) > 0


def frame_to_drop(accumulated_deltas: Sequence[float], times: Sequence[float]) -> int:
    r"""Which of the frames that a stream holds is missed least: the budget of a video that has not ended.

    Each held frame carries the Δ of all frames since the held one before it. Dropping a frame hands its Δ on to the
    next, and the frame to drop is the one whose successor then carries least, so that what is held stays evenly spread
    in accumulated Δ: among K held frames none carries more than $2/K$ of all Δ, or than its own Δ where that is more.
    The newest frame is never dropped.

    Args:
        accumulated_deltas: `(num_frames,)`, of two frames at least, in the order of time.
        times: `(num_frames,)`, in seconds; between equals, the frame that leaves the shortest stretch of time goes.

    Returns:
        The number of the frame.
    """

    def loss(frame: int) -> tuple[float, float]:
        carried = accumulated_deltas[frame] + accumulated_deltas[frame + 1]
        return carried, times[frame + 1] - times[max(frame - 1, 0)]

    return min(range(len(times) - 1), key=loss)


__all__ = ["frame_budget", "frame_to_drop", "select_frames"]
