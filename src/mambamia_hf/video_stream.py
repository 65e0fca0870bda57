"""A video that has not ended: frames are pushed as they come, and questions are asked at any moment.

What a stream holds does not grow: the state of the compressor's scans, the features of a few frames that wait for
their look-ahead, and the anchors of `keep_frames` frames.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .compressor_stream import StreamState, compress_next, compress_pending, stream_state
from .frame_selection import frame_budget, frame_to_drop
from .frame_times import times_end
from .video_memory import VideoMemory, describe_images, encoder_fingerprint


if TYPE_CHECKING:
    from .modeling_mambamia import MambaMiaForConditionalGeneration


MAX_NEW_TOKENS = 256


class _HeldFrame(NamedTuple):
    anchors: Tensor  # (num_anchors, hidden_size)
    delta: float  # Δ of this frame and of those that were dropped since the held one before it
    time: float
    number: int  # among all frames of the stream


class _State(NamedTuple):
    """All that a stream knows. A push makes a new one at its very end, so one that fails changes nothing."""

    scans: StreamState
    held: tuple[_HeldFrame, ...] = ()
    waiting: tuple[tuple[float, int], ...] = ()  # time and number of the frames that wait for their look-ahead
    num_frames: int = 0
    latest: float = -math.inf  # the time of the newest frame
    shape: torch.Size | None = None  # of a frame, as the vision tower takes it


class VideoStream:
    """A video as it comes, in bounded memory. Made by `model.stream`.

    ```python
    >>> stream = model.stream(processor, keep_frames=256)
    >>> for frames, times in camera:
    ...     stream.push(frames, times)
    >>> stream.ask("What has happened so far?")
    >>> stream.memory.save("so_far.memory")
    ```

    Every frame goes through the scans; frames are then dropped one by one, so that the held ones stay evenly spread in
    accumulated Δ (see `frame_to_drop`). A causal compressor gives what it gives for the whole video. A bidirectional
    one reads each window of frames backwards from the end of a look-ahead behind it. Frames that still wait for theirs
    are in the memory nonetheless, as they are if the stream ends there.

    Args:
        model: answers the questions.
        processor: of the model.
        keep_frames (`int`, *optional*, defaults to 256): The most frames that are held and asked about.
        delta_threshold (`float`, *optional*):
            δ of the paper's Algorithm 1: only frames with which the accumulated Δ reaches it are held, and the newest.
        window (`int`, *optional*, defaults to 32):
            Frames that go through the compressor together; a bidirectional one settles so many at a time.
        look_ahead (`int`, *optional*, defaults to 32):
            Frames behind a window from which the backward scans of a bidirectional compressor begin.
        name (`str`, *optional*, defaults to `"stream"`): What the memory is called.

    Raises:
        ValueError: for a setting out of range, or a model that cannot read a video piece by piece.
    """

    def __init__(
        self,
        model: "MambaMiaForConditionalGeneration",
        processor: Any,
        keep_frames: int = 256,
        delta_threshold: float | None = None,
        window: int = 32,
        look_ahead: int = 32,
        name: str = "stream",
    ):
        compressor = model.model.compressor
        self._keep_frames = frame_budget(1 << 62, keep_frames)  # raises for a number out of range
        if delta_threshold is not None and not 0 <= delta_threshold < math.inf:
            raise ValueError(f"delta_threshold must be a number from 0 on, not {delta_threshold}.")
        for setting, value, least in (("window", window, 1), ("look_ahead", look_ahead, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{setting} must be a whole number of frames of at least {least}, not {value!r}.")
        if not compressor.config.num_temporal_layers:
            raise ValueError(
                "A stream drops frames by their Δ, which needs a temporal layer, and num_temporal_layers is 0; encode "
                "whole videos with this model."
            )
        self._state = _State(stream_state(compressor))
        self._is_closed = False
        self._model, self._processor = model, processor
        self._delta_threshold = delta_threshold or 0.0
        self._window, self._look_ahead = window, look_ahead
        self._name = name
        sampling: dict[str, Any] = {"stream": "frames as pushed"}
        if compressor.config.bidirectional:
            sampling |= {"window": window, "look_ahead": look_ahead}
        self._fingerprint = {
            **encoder_fingerprint(model),
            "images": describe_images(processor.video_processor),
            "sampling": json.dumps(sampling),
        }

    def __len__(self) -> int:
        """How many frames were pushed so far."""
        return self._state.num_frames

    @torch.no_grad()
    def push(self, frames: Any, times: Sequence[float]) -> None:
        """Takes the next frames. A push that raises leaves the stream as it was.

        Args:
            frames: a list of images, or an array or tensor `(num_frames, height, width, 3)` or
                `(num_frames, 3, height, width)`; what the video processor takes as one video.
            times (`Sequence[float]` of length `num_frames`): when each frame appears, in seconds from the start of the
                stream; each later than the one before.

        Raises:
            ValueError: for times that do not ascend, frames of another size than those before where the processor does
                not resize them, frames that the model makes NaN of, or after `close`.
        """
        if self._is_closed:
            raise ValueError("The stream is closed and takes no more frames; begin another with `model.stream`.")
        if self._model.training:
            raise ValueError("A model in training mode sees with dropout; call `model.eval()` before.")
        state = self._state
        pixels = self._pixels(frames)
        times = _ascending(times, state.latest, len(pixels))
        if state.shape is not None and pixels.shape[1:] != state.shape:
            raise ValueError(
                f"The frames of the stream are {tuple(state.shape)} so far and now {tuple(pixels.shape[1:])}; resize "
                f"them to one size."
            )
        compressor = self._model.model.compressor
        features = self._model.model.encode_frames(pixels).last_hidden_state
        features = features.to(device=compressor.device, dtype=compressor.dtype)[None]
        anchors, deltas, scans = compress_next(compressor, features, state.scans, self._window, self._look_ahead)
        waiting = state.waiting + tuple(
            zip(times, range(state.num_frames, state.num_frames + len(times)), strict=True)
        )
        num_settled = 0 if anchors is None else anchors.shape[1]
        self._state = _State(
            scans,
            self._held_with(state.held, anchors, deltas, waiting[:num_settled]),
            waiting[num_settled:],
            state.num_frames + len(times),
            times[-1],
            pixels.shape[1:],
        )

    def close(self) -> None:
        """The stream has ended: the frames that wait are settled. Questions can still be asked."""
        state = self._state
        self._state = state._replace(held=self._all_held(state), waiting=(), scans=state.scans._replace(pending=None))
        self._is_closed = True

    @property
    def memory(self) -> VideoMemory:
        """The held frames, as a video that can be asked, saved and cut. All of them are kept in a prompt.

        Its `frame_deltas` are accumulated: the Δ of a frame and of those dropped since the one before.

        Raises:
            ValueError: before the first frame.
        """
        return self._memory_since(0.0)

    def _memory_since(self, start: float) -> VideoMemory:
        """The memory of the frames from a second on, with times from there."""
        state = self._state
        held = [frame for frame in self._all_held(state) if frame.time >= start]
        if not held:
            raise ValueError("The stream has no frame yet; push one first.")
        return VideoMemory(
            anchors=torch.stack([frame.anchors for frame in held]),
            frame_deltas=torch.tensor([frame.delta for frame in held]),
            timestamps=[frame.time - start for frame in held],
            fingerprint=dict(self._fingerprint),
            name=self._name,
            duration=state.latest - start,
            is_selected=True,
        )

    @property
    def kept_frames(self) -> list[int]:
        """The numbers of the frames in the memory, counted among all frames of the stream."""
        return [frame.number for frame in self._all_held(self._state)]

    @property
    def clock_start(self) -> float:
        """The second of the stream from which the times in prompts and answers count.

        It is 0 until the stream is longer than the model's `frame_time_format` can tell, and then goes on by half of
        that at a time. Questions are about the frames from there on.
        """
        end = times_end(self._model.config.frame_time_format)
        periods = math.floor(max(self._state.latest + 1e-3, 0.0) / (end / 2))  # a format takes the last ms for a step
        return end / 2 * (periods - 1) if periods > 1 else 0.0

    def ask(self, question: str, max_new_tokens: int | None = None) -> str:
        """Answers a question about the stream so far, by greedy decoding; each question by itself.

        A stream that is longer than the model's format of times can tell is asked about from `clock_start` on.

        Args:
            question: what to ask.
            max_new_tokens: where to stop; by default the checkpoint's own limit, or 256.

        Raises:
            ValueError: before the first frame, or for a question that holds the placeholder of a video.
        """
        model, processor, memory = self._model, self._processor, self._memory_since(self.clock_start)
        content = [{"type": "video", "video": memory}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        limit = max_new_tokens or model.generation_config.max_new_tokens or MAX_NEW_TOKENS
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers[0].strip()

    def _pixels(self, frames: Any) -> Tensor:
        """`(num_frames, channels, height, width)`, as the vision tower takes them."""
        video_processor = self._processor.video_processor
        videos = video_processor.make_video_list(frames)
        if len(videos) != 1 or not isinstance(videos[0], np.ndarray | Tensor):
            raise ValueError(
                f"A stream takes frames, as a list of images or an array of 4 dimensions, not {type(frames).__name__} "
                f"of {len(videos)} videos; decode files first."
            )
        return video_processor(videos, do_sample_frames=False, return_tensors="pt")["pixel_values_videos"][0]

    def _all_held(self, state: _State) -> tuple[_HeldFrame, ...]:
        """The held frames, and those that wait, as they are if the stream ends here."""
        anchors, deltas = compress_pending(self._model.model.compressor, state.scans)
        return self._held_with(state.held, anchors, deltas, state.waiting)

    def _held_with(
        self,
        held: tuple[_HeldFrame, ...],
        anchors: Tensor | None,
        deltas: Tensor | None,
        places: Iterable[tuple[float, int]],
    ) -> tuple[_HeldFrame, ...]:
        """The held frames after more have come.

        Args:
            held: so far.
            anchors: `(1, num_frames, num_anchors, hidden_size)`, None for no frame.
            deltas: `(1, num_frames)`, None for no frame.
            places: time and number of each of these frames.
        """
        if anchors is None or deltas is None:
            return held
        if not bool(anchors.isfinite().all() and deltas.isfinite().all()):
            raise ValueError(
                "The model makes NaN or infinity of these frames; check their pixels, and compute in float32 or "
                "bfloat16."
            )
        frames = list(held)
        for tokens, delta, (time, number) in zip(anchors[0], deltas[0].tolist(), places, strict=True):
            if frames and frames[-1].delta < self._delta_threshold:
                delta += frames.pop().delta
            frames.append(_HeldFrame(tokens.clone(), delta, time, number))  # a view would keep the whole window
            if len(frames) > self._keep_frames:
                gone = frame_to_drop([frame.delta for frame in frames], [frame.time for frame in frames])
                successor = frames[gone + 1]
                frames[gone : gone + 2] = [successor._replace(delta=successor.delta + frames[gone].delta)]
        return tuple(frames)


def _ascending(times: Sequence[float], latest: float, num_frames: int) -> list[float]:
    """The times of frames that follow one at `latest`, as plain numbers."""
    times = [float(time) for time in times]
    if len(times) != num_frames:
        raise ValueError(f"There are {num_frames} frames and {len(times)} times; push one time per frame, in seconds.")
    if not num_frames:
        raise ValueError("There are no frames to push.")
    for before, time in zip([latest, *times], times, strict=False):
        if not math.isfinite(time) or time < 0:
            raise ValueError(
                f"A frame has the time {time}; times are seconds from the start of the stream, 0 or more."
            )
        if time <= before:
            raise ValueError(
                f"A frame at {time:g} s comes after one at {before:g} s; push frames in the order of time, each later "
                f"than the one before."
            )
    return times


__all__ = ["VideoStream"]
