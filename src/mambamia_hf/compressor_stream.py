"""The compressor over frames that come one after another, with the state of its scans carried from call to call.

A causal compressor gives what it gives for the whole video, in whatever portions the frames come. A bidirectional one
works in windows: the forward scans go on from the exact state in which they left the frames before, the backward scans
begin at the end of a look-ahead behind the window and know nothing of what follows it.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .compressor_segments import embed_in_segments, run_each_segment, split_rows


if TYPE_CHECKING:
    from .modeling_compressor import MambaMiaCompressor, MambaMiaSpatialBlock, ScanState


class StreamState(NamedTuple):
    """What a compressor carries from the frames that it has seen to the next. Nothing changes it, so a call that fails
    leaves the stream as it was.

    Args:
        spatial, temporal: the forward scan's state of each block of stage 1 and of stage 2, after the settled frames;
            None before the first.
        pending: `(batch_size, num_pending, num_patches, input_size)`, the features of frames that wait for their
            look-ahead.
    """

    spatial: "tuple[ScanState | None, ...]"
    temporal: "tuple[ScanState | None, ...]"
    pending: Tensor | None = None


def stream_state(compressor: "MambaMiaCompressor") -> StreamState:
    """The state before the first frame.

    Raises:
        ValueError: for a compressor that needs whole videos, or whose weights are offloaded.
    """
    config = compressor.config
    if config.mixer_type != "mamba2":
        raise ValueError(
            f"A scan of mixer_type={config.mixer_type!r} cannot start from a state, so it takes whole videos only; "
            "a stream needs a compressor with mixer_type='mamba2'."
        )
    if config.temporal_bidirectional:
        raise ValueError(
            "This compressor has temporal_bidirectional=True: its stage 2 reads every frame backwards from the end of "
            "the video, and a stream has no end; use a compressor whose stage 2 is causal."
        )
    if any(parameter.is_meta for parameter in compressor.parameters()):
        raise ValueError("The compressor's weights are offloaded; a stream needs them on a device.")
    return StreamState((None,) * len(compressor.layers), (None,) * len(compressor.temporal_layers))


@torch.no_grad()
def compress_next(
    compressor: "MambaMiaCompressor", patch_features: Tensor, state: StreamState, window: int, look_ahead: int
) -> tuple[Tensor | None, Tensor | None, StreamState]:
    """Takes the next frames, and gives those that are settled: that later frames change no more.

    Args:
        compressor: that `state` began with.
        patch_features: `(batch_size, num_frames, num_patches, input_size)`, of the compressor's type and device.
        state: what the last call returned; at first that of `stream_state`.
        window: frames that are settled together; of a causal compressor, at most so many are worked on at a time.
        look_ahead: frames behind a window that its backward scans begin with; a causal compressor waits for none.

    Returns:
        The anchors of the settled frames as they leave stage 2, before the final norm
        `(batch_size, num_settled, num_anchors, hidden_size)`, None where no frame is settled yet; their Δ
        `(batch_size, num_settled)`, None without a temporal layer; and the next state.
    """
    waiting = patch_features if state.pending is None else torch.cat([state.pending, patch_features], dim=1)
    anchors, deltas = [], []
    while waiting.shape[1] and (not compressor.config.bidirectional or waiting.shape[1] >= window + look_ahead):
        behind = window + look_ahead if compressor.config.bidirectional else window
        settled, delta, state = _run_window(compressor, waiting[:, :behind], state, min(window, waiting.shape[1]))
        anchors.append(settled)
        deltas += [] if delta is None else [delta]
        waiting = waiting[:, window:]
    state = state._replace(pending=waiting.clone() if waiting.shape[1] else None)  # a view would keep all of it
    return torch.cat(anchors, dim=1) if anchors else None, torch.cat(deltas, dim=1) if deltas else None, state


@torch.no_grad()
def compress_pending(compressor: "MambaMiaCompressor", state: StreamState) -> tuple[Tensor | None, Tensor | None]:
    """The frames that are not settled yet, as they are if the stream ends here: in the shapes of `compress_next`."""
    if state.pending is None:
        return None, None
    anchors, deltas, _ = _run_window(compressor, state.pending, state, state.pending.shape[1])
    return anchors, deltas


def _run_window(
    compressor: "MambaMiaCompressor", patch_features: Tensor, state: StreamState, num_settled: int
) -> tuple[Tensor, Tensor | None, StreamState]:
    """The first `num_settled` of some frames, of which the others are the look-ahead, and the state after them."""
    hidden_states = embed_in_segments(compressor, patch_features)
    length = hidden_states.shape[1] // patch_features.shape[1] * num_settled
    spatial: list[ScanState | None] = []
    temporal: list[ScanState | None] = []
    layer: Any
    for layer, scan_state in zip(compressor.layers, state.spatial, strict=True):
        is_last = layer is compressor.layers[-1]
        hidden_states, scan_state = _run_block(layer, hidden_states, length, is_last, scan_state)
        spatial.append(scan_state)
    anchors, deltas = hidden_states.unflatten(1, (num_settled, -1)), None
    for layer, scan_state in zip(compressor.temporal_layers, state.temporal, strict=True):
        anchors, deltas, scan_state = layer.run_segment(anchors, scan_state)
        temporal.append(scan_state)
    return anchors, deltas, StreamState(tuple(spatial), tuple(temporal))


def _run_block(
    block: "MambaMiaSpatialBlock", hidden_states: Tensor, length: int, is_last: bool, state: "ScanState | None"
) -> "tuple[Tensor, ScanState | None]":
    """A block of stage 1, whose state is wanted after the first `length` tokens. The last block gives their anchors
    alone."""
    settled = split_rows(hidden_states[:, :length], block.row_length)
    ahead = split_rows(hidden_states[:, length:], block.row_length) if length < hidden_states.shape[1] else ()
    results = run_each_segment(block, (*settled, *ahead), is_last, state)
    outputs = [next(results) for _ in settled]
    settled_state = outputs[-1][1]
    if not is_last:
        outputs += results
    return torch.cat([output for output, _ in outputs], dim=1), settled_state


__all__ = ["StreamState", "compress_next", "compress_pending", "stream_state"]
