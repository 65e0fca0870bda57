"""Stage 1 of the compressor segment by segment: the same result in bounded memory, where nothing needs a gradient.

At full size the projections of one block are four times as wide as its sequence, and 384 frames are 230,400 tokens.
A segment is a whole number of rows. What one segment has to know of the others is the state in which each scan enters
it, so stage 1 needs the memory of its sequence and of one segment, whatever the length.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from .modeling_compressor import MambaMiaCompressor, MambaMiaSpatialBlock, ScanState


# Tokens in the segments of all sequences of a batch together: enough for matrix products at full speed, and on a CPU
# few enough for what lies between the products to stay in its cache.
SEGMENT_TOKENS = {"cpu": 1200, "cuda": 19200}
# Where the inputs of the scans are projected twice, since to keep them would take most of the memory.
PROJECTS_TWICE = {"cpu"}


def segment_rows(batch_size: int, row_length: int, device: torch.device) -> int:
    """Rows of each sequence in one segment, at least one."""
    tokens = SEGMENT_TOKENS.get(device.type, SEGMENT_TOKENS["cuda"])
    return max(1, tokens // (batch_size * row_length))


def embed_in_segments(compressor: "MambaMiaCompressor", patch_features: Tensor) -> Tensor:
    """`compressor.embed`, with no other tensor as long as the sequence that it returns."""
    batch_size, patches_per_anchor = len(patch_features), compressor.config.patches_per_anchor
    rows = segment_rows(batch_size, patches_per_anchor + 1, patch_features.device)
    patches = patch_features.flatten(1, 2)
    num_rows = patches.shape[1] // patches_per_anchor
    segments = (compressor.embed(part.unsqueeze(1)) for part in patches.split(rows * patches_per_anchor, dim=1))
    first = next(segments)
    hidden_states = first.new_empty(batch_size, num_rows * (patches_per_anchor + 1), first.shape[-1])
    for place, segment in zip(hidden_states.split(first.shape[1], dim=1), chain([first], segments), strict=True):
        place.copy_(segment)
    return hidden_states


@torch.no_grad()
def run_in_segments(block: "MambaMiaSpatialBlock", hidden_states: Tensor, anchors_only: bool) -> Tensor:
    """A block over a whole sequence: first the backward scan's states from right to left, then the output from left
    to right. In training mode, each of the two passes draws the dropout of a GPA before the mixer.

    Args:
        block: a block with Mamba-2 mixers.
        hidden_states: `(batch_size, length, hidden_size)`, overwritten segment by segment unless `anchors_only`.
        anchors_only: whether to return the anchors alone.

    Returns:
        As `block.forward`.

    Raises:
        ValueError: if the mixer's scans cannot start from a state.
    """
    if not block.mixer.forward_ssm.takes_state:
        raise ValueError("A Mamba-1 scan cannot start from a state, so its block cannot run in segments.")
    segments = split_rows(hidden_states, block.row_length)
    anchors: list[Tensor] = []
    for segment, (output, _) in zip(segments, run_each_segment(block, segments, anchors_only), strict=True):
        if anchors_only:
            anchors.append(output)
        else:
            segment.copy_(output)
    return torch.cat(anchors, dim=1) if anchors_only else hidden_states


def split_rows(hidden_states: Tensor, row_length: int) -> tuple[Tensor, ...]:
    """The segments `(batch_size, segment_length, hidden_size)` of a sequence, whole rows each."""
    rows = segment_rows(len(hidden_states), row_length, hidden_states.device)
    return hidden_states.split(rows * row_length, dim=1)


def run_each_segment(
    block: "MambaMiaSpatialBlock",
    segments: Sequence[Tensor],
    anchors_only: bool,
    forward_state: "ScanState | None" = None,
) -> "Iterator[tuple[Tensor, ScanState | None]]":
    """A block over segments that follow each other.

    Args:
        block: a block with Mamba-2 mixers.
        segments: `(batch_size, segment_length, hidden_size)` each, whole rows; behind the last there is nothing.
        anchors_only: whether to give the anchors alone.
        forward_state: the forward scan's state before the first segment; by default there is nothing before it.

    Yields:
        For each segment what `block.run_segment` gives: the output, and the forward scan's state after it.
    """
    for segment, (backward_state, inputs) in zip(segments, _from_the_right(block, segments), strict=True):
        output, forward_state = block.run_segment(segment, forward_state, backward_state, anchors_only, inputs)
        yield output, forward_state


def _from_the_right(
    block: "MambaMiaSpatialBlock", segments: Sequence[Tensor]
) -> "list[tuple[ScanState | None, Tensor | None]]":
    """The state in which the backward scan enters each segment, which is the one that it leaves the next segment in,
    and the inputs of the scans, as far as they are kept."""
    mixer = block.mixer
    if mixer.backward_ssm is None:
        return [(None, None)] * len(segments)
    keeps_inputs = segments[0].device.type not in PROJECTS_TWICE
    found: list[tuple[ScanState | None, Tensor | None]] = []
    entered: ScanState | None = None
    for segment in reversed(segments[1:]):
        inputs = mixer.project_inputs(block.mixer_input(segment))
        found.append((entered, inputs if keeps_inputs else None))
        _, _, entered = mixer.backward_ssm(inputs, entered, stride=None, reverse=True)
    return [(entered, None), *reversed(found)]
