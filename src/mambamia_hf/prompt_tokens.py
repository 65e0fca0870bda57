"""Dropping frames from a prompt: which of its tokens stay, and what a cache lacks afterwards. Pure functions.

A prompt holds one placeholder per token of its images and videos. The placeholders of a video are sized for all of its
frames, of which the dropped ones leave the prompt, or for the kept ones alone, which all stay.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache


def placeholder_counts(placeholders: Tensor, *expected: Sequence[int]) -> list[int]:
    """The number of placeholders of each video of a prompt.

    Args:
        placeholders: `(batch_size, sequence_length)`, True where the video tokens stand.
        expected: numbers per video that would do where videos follow each other without a token between them.

    Raises:
        ValueError: if the runs of placeholders cannot be divided among the videos.
    """
    edges = nn.functional.pad(placeholders.int(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    runs = (ends[:, 1] - starts[:, 1]).tolist()
    num_videos = len(expected[0])
    if len(runs) == num_videos:
        return runs
    for counts in expected:
        if sum(runs) == sum(counts):
            return list(counts)
    raise ValueError(
        f"The prompt has {len(runs)} runs of video placeholders and there are {num_videos} videos; give each video "
        f"its own run."
    )


def resolve_budgets(
    placeholders: Tensor, num_frames: Sequence[int], placeholders_per_frame: int, num_kept_frames: Sequence[int]
) -> list[int]:
    """The exact number of frames to keep of each video of a prompt, 0 where a threshold or the configuration decides.

    A video with a budget has placeholders for all of its frames or for the budget. Where no budget is given (a server
    or a processor does not send one), fewer placeholders than the video has tokens are one.

    Args:
        placeholders: `(batch_size, sequence_length)`, True where the video tokens stand.
        num_frames: of each video.
        placeholders_per_frame: of all videos, those of the time of a frame included.
        num_kept_frames: the budget of each video, 0 where none is given.

    Raises:
        ValueError: if the placeholders of a video are neither.
    """
    all_tokens = [count * placeholders_per_frame for count in num_frames]
    budget_tokens = [count * placeholders_per_frame for count in num_kept_frames]
    budgets = []
    counts = placeholder_counts(placeholders, all_tokens, budget_tokens)
    for count, frames, budget in zip(counts, num_frames, num_kept_frames, strict=True):
        if not budget and 0 < count < frames * placeholders_per_frame and count % placeholders_per_frame == 0:
            budget = count // placeholders_per_frame
        if count not in (frames * placeholders_per_frame, budget * placeholders_per_frame):
            room = f" or, for the {budget} frames to keep, {budget * placeholders_per_frame}" if budget else ""
            raise ValueError(
                f"A video of {frames} frames has {count} placeholders in the prompt; expected "
                f"{frames * placeholders_per_frame}, {placeholders_per_frame} per frame{room}; make the prompt with "
                f"the processor."
            )
        budgets.append(budget)
    return budgets


def tokens_to_keep(
    placeholders: Tensor, keep_mask: Tensor, frame_mask: Tensor | None, placeholders_per_frame: int
) -> Tensor:
    """`(batch_size, sequence_length)`, False for the placeholders of dropped frames.

    Args:
        placeholders: `(batch_size, sequence_length)`, True where the video tokens stand.
        keep_mask: `(num_videos, num_frames)`, True for the frames that stay.
        frame_mask: `(num_videos, num_frames)`, True for real frames, all of them if None.
        placeholders_per_frame: of all videos, those of the time of a frame included.

    Raises:
        ValueError: if a video has placeholders neither for all of its frames nor for the kept ones.
    """
    frame_mask = torch.ones_like(keep_mask) if frame_mask is None else frame_mask.to(keep_mask.device)
    kept = keep_mask.sum(dim=1).tolist()
    lengths = frame_mask.sum(dim=1).tolist()
    resolve_budgets(placeholders, lengths, placeholders_per_frame, kept)
    all_tokens, kept_tokens = ([count * placeholders_per_frame for count in counts] for counts in (lengths, kept))
    counts = placeholder_counts(placeholders, all_tokens, kept_tokens)
    stay = []
    for video, (count, whole) in enumerate(zip(counts, all_tokens, strict=True)):
        frames = keep_mask[video, frame_mask[video]].repeat_interleave(placeholders_per_frame)
        stay.append(frames if count == whole else frames.new_ones(count))
    keep = torch.ones_like(placeholders)
    keep[placeholders] = torch.cat(stay).to(keep.device)
    return keep


def kept_indices(keep: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The positions of the tokens that stay and are no padding, `(batch_size, longest row)`, -1 on the left of shorter
    rows.

    Args:
        keep: `(batch_size, sequence_length)`, True for tokens that stay.
        attention_mask: `(batch_size, ... + sequence_length)`, 0 for padding.
    """
    if attention_mask is not None:
        keep = keep & attention_mask[:, -keep.shape[1] :].bool()
    order = keep.int().argsort(dim=1, stable=True)[:, -int(keep.sum(dim=1).max()) :]
    return order.masked_fill(~keep.gather(1, order), -1)


def take_tokens(tensor: Tensor, indices: Tensor, padding: float) -> Tensor:
    """The tokens of each row at given positions.

    Args:
        tensor: `(batch_size, sequence_length, ...)`.
        indices: `(batch_size, kept_length)`, -1 for padding.
        padding: the value of the padding.

    Returns:
        `(batch_size, kept_length, ...)`.
    """
    indices = indices.to(tensor.device)
    taken = tensor[torch.arange(len(indices), device=tensor.device)[:, None], indices.clamp(min=0)]
    return taken.masked_fill((indices < 0).view(*indices.shape, *[1] * (tensor.ndim - 2)), padding)


def staying_tokens(token_indices: Tensor, length: int) -> Tensor:
    """`(batch_size, length)`, True for the tokens of a prompt that are left.

    Args:
        token_indices: `(batch_size, kept_length)`, -1 for padding.
        length: of the prompt.
    """
    places = token_indices.masked_fill(token_indices < 0, length)  # padding goes one beyond the end
    stays = torch.zeros(len(places), length + 1, dtype=torch.bool, device=places.device)
    return stays.scatter(1, places, True)[:, :length]


def put_back_states(states: Tensor, token_indices: Tensor, length: int) -> Tensor:
    """States of the tokens that are left, at the places of these tokens in the prompt: undoes [`take_tokens`].

    Dropped places are zero, but for one directly before a token that is left: it has the state from which that token
    follows, so that position `i` scores token `i + 1` as without dropped tokens.

    Args:
        states: `(batch_size, kept_length, ...)`.
        token_indices: `(batch_size, kept_length)`, -1 for the padding on the left.
        length: of the prompt.

    Returns:
        `(batch_size, length, ...)`.
    """
    stays = staying_tokens(token_indices, length)
    padding = (token_indices < 0).sum(dim=1, keepdim=True).to(stays.device)
    latest = stays.cumsum(dim=1)  # how many tokens are left up to each place
    foretells = nn.functional.pad(stays[:, 1:], (0, 1)) & (latest > 0)
    return take_tokens(states, (padding + latest - 1).masked_fill(~(stays | foretells), -1), 0)


def cached_length(cache: Cache | None) -> int:
    """The number of tokens in a cache; 0 for one of state-space layers alone, which tracks no length."""
    return 0 if cache is None or all(cache.is_linear) else int(cache.get_seq_length())


class DroppedTokens(NamedTuple):
    """What a cache lacks of the prompt that it holds; kept with the cache, so that the dialogue can go on from it."""

    token_indices: Tensor  # (batch_size, kept_length): the position in the prompt of each cached token, -1 for padding
    prompt_length: int  # length of the prompt with its dropped tokens

    @classmethod
    def of(cls, cache: Cache | None) -> "DroppedTokens | None":
        """Of a cache; None where nothing was dropped."""
        return getattr(cache, "dropped_tokens", None)

    def note_in(self, cache: Cache) -> None:
        """Keeps this with a cache."""
        cache.dropped_tokens = self  # type: ignore[attr-defined]  # any `Cache` takes a note

    @property
    def num_dropped(self) -> int:
        """How much shorter the cached sequence is than the prompt."""
        return self.prompt_length - self.token_indices.shape[1]

    def indices(self, length: int) -> Tensor:
        """`token_indices` of a sequence of `length` tokens that begins with the prompt and goes on with all tokens."""
        rest = torch.arange(self.prompt_length, length, device=self.token_indices.device)
        return torch.cat([self.token_indices, rest.expand(len(self.token_indices), -1)], dim=1)

    def cut_mask(self, attention_mask: Tensor, length: int) -> Tensor:
        """The attention mask of the cached and the new tokens, from one that may cover the dropped tokens, too.

        Args:
            attention_mask: `(batch_size, length)` or `(batch_size, length + num_dropped)`.
            length: of cached and new tokens together.

        Raises:
            ValueError: for a mask of any other length.
        """
        given = attention_mask.shape[1]
        if given == length:
            return attention_mask
        if given != length + self.num_dropped:
            raise ValueError(
                f"The cache lacks {self.num_dropped} tokens of dropped frames, so the attention mask must cover "
                f"{length} tokens, or {length + self.num_dropped} with them, not {given}."
            )
        return take_tokens(attention_mask, self.indices(given), 0)


def note_dropped_tokens(cache: Cache, past_length: int, token_indices: Tensor, length: int) -> None:
    """Notes in a cache that of `length` new tokens those at `token_indices` follow `past_length` cached ones.

    A cache of state-space layers alone gets no note: it tracks no length, so nothing goes on from it by position.

    Args:
        cache: takes the note, and may have one of earlier tokens.
        past_length: cached tokens before the new ones.
        token_indices: `(batch_size, kept_length)`, as of [`kept_indices`].
        length: of the new tokens, with the dropped ones.
    """
    if len(cache.layers) and all(cache.is_linear):
        return
    earlier = DroppedTokens.of(cache) if past_length else None
    if earlier is None:
        earlier = DroppedTokens(token_indices.new_zeros(len(token_indices), 0), 0)
    start = past_length + earlier.num_dropped
    indices = torch.where(token_indices < 0, -1, token_indices + start)
    DroppedTokens(torch.cat([earlier.indices(start), indices], dim=1), start + length).note_in(cache)


def check_cached_tokens(cache: Cache | None, token_indices: Tensor | None, length: int) -> None:
    """Checks that a cache holds the tokens that a prompt begins with, after frames were dropped from it.

    Args:
        cache: of a former call.
        token_indices: `(batch_size, kept_length)` of the prompt, None where nothing was dropped.
        length: of the prompt, with the dropped tokens.

    Raises:
        ValueError: if it holds others.
    """
    past_length, dropped = cached_length(cache), DroppedTokens.of(cache)
    if not past_length or (dropped is None and token_indices is None):
        return
    everything = DroppedTokens(torch.zeros(1, 0, dtype=torch.long), 0).indices(length)
    now = everything if token_indices is None else token_indices.cpu()
    then = everything if dropped is None else dropped.indices(length).cpu()
    now, then = now[:, :past_length], then[:, :past_length]
    if now.shape[1] != then.shape[1] or not bool((now == then).all()):
        raise ValueError(
            "The cache holds other frames than this call keeps of the prompt's videos; select frames as in the call "
            "that filled the cache, or begin with a new cache."
        )


__all__ = [
    "DroppedTokens",
    "cached_length",
    "check_cached_tokens",
    "kept_indices",
    "note_dropped_tokens",
    "placeholder_counts",
    "put_back_states",
    "resolve_budgets",
    "staying_tokens",
    "take_tokens",
    "tokens_to_keep",
]
