"""Questions about a video file: encode it once, ask as often as wanted, and know how long each stage took."""

import os
import time
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from .auto import MambaMiaConfig, MambaMiaEncoder, MambaMiaForConditionalGeneration, MambaMiaProcessor
from .chat import VideoChat
from .inputs import STANDARD_INPUT, check_checkpoint, check_part, check_video, is_memory
from .messages import without_secrets
from .video_decoding import VideoReader
from .video_memory import VideoMemory, describe_images
from .video_sampling import FrameFolder, SampledVideo, open_video


Model = TypeVar("Model", MambaMiaForConditionalGeneration, MambaMiaEncoder)


@dataclass(frozen=True)
class Answer:
    """What one question about one video gave.

    Args:
        question: the question.
        answer: the text that the model wrote.
        video: path or URL of the video.
        model: folder or Hub id of the checkpoint.
        timestamps: seconds from the start of the video, of each sampled frame.
        kept_frames: numbers, among the sampled frames, of those whose tokens the language model read.
        kept_times: the timestamps of these.
        frame_deltas: Δ of each sampled frame; None for a model without a temporal layer.
        video_tokens: how many tokens of the video the language model read.
        seconds: how long decode, vision and compress took, once per video, and generate. Frames are decoded while
            others go through the vision tower; decode is what that waited for, and the opening of the file.
        evidence: where asked for, the frames that question and answer attended to most; see `VideoChat.evidence`.
    """

    question: str
    answer: str
    video: str
    model: str
    timestamps: list[float]
    kept_frames: list[int]
    kept_times: list[float]
    frame_deltas: list[float] | None
    video_tokens: int
    seconds: dict[str, float]
    evidence: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class EncodedVideo:
    """A video that a model has seen: each question costs the language model's time only. Made by [`encode_video`].

    Use it as a context manager, or call `close()`: a downloaded file is gone then.

    Args:
        video, checkpoint: path or URL of the video, or path of its memory; folder or Hub id of the checkpoint.
        reader: of the video, for more of its frames; None for a memory.
        chat: a conversation about it that has not begun.
        frame_indices: numbers, among the frames of the file, of the sampled ones; none for a memory.
        seconds: how long decode, vision and compress took; or load, for a memory.
    """

    video: str
    checkpoint: str
    reader: "VideoReader | FrameFolder | None"
    chat: VideoChat
    frame_indices: list[int]
    seconds: dict[str, float]

    def __enter__(self) -> "EncodedVideo":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()

    @property
    def model(self) -> MambaMiaForConditionalGeneration:
        return self.chat.model

    @property
    def processor(self) -> MambaMiaProcessor:
        return self.chat.processor

    @property
    def memory(self) -> VideoMemory:
        """What the model remembers of every sampled frame."""
        return self.chat.memory

    @property
    def timestamps(self) -> list[float]:
        """See [`Answer`]."""
        return self.memory.timestamps

    @property
    def kept_frames(self) -> list[int]:
        """See [`Answer`]."""
        return self.chat.kept_frames

    @property
    def frame_deltas(self) -> list[float] | None:
        """See [`Answer`]."""
        deltas = self.memory.frame_deltas
        return None if deltas is None else _shortest(deltas)

    def ask(self, question: str, max_new_tokens: int | None = None, evidence: bool = False) -> Answer:
        """Answer a question, by greedy decoding.

        Args:
            question: what to ask; each question by itself, not as a conversation (for that, see `chat`).
            max_new_tokens: where to stop; by default as the video was encoded with.
            evidence: whether to find out which frames the question and its answer attended to.

        Raises:
            ValueError: if the question is empty, too long, or holds the placeholder of a video.
        """
        watch = _Stopwatch(self.model.device)
        chat = self.chat.fork(max_new_tokens)
        text = chat.ask(question)
        watch.lap("generate")
        kept_frames, timestamps = self.kept_frames, self.timestamps
        return Answer(
            question=question,
            answer=text,
            video=self.video,
            model=self.checkpoint,
            timestamps=timestamps,
            kept_frames=kept_frames,
            kept_times=[timestamps[frame] for frame in kept_frames],
            frame_deltas=self.frame_deltas,
            video_tokens=chat.video_tokens,
            seconds={**self.seconds, **watch.seconds},
            evidence=chat.evidence() if evidence else None,
        )


def encode_video(
    checkpoint: str | os.PathLike[str],
    video: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    seek_mode: str | None = None,
    keep_frames: int | None = None,
    keep_ratio: float | None = None,
    delta_threshold: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_new_tokens: int | None = None,
    progress: bool = False,
) -> EncodedVideo:
    """Load a checkpoint and have it see a video, or take a memory of one that it has seen.

    Args:
        checkpoint: folder or Hub id of a MambaMia checkpoint.
        video: path or URL of a video file, a folder of its frames as images, in the order of their names, or the path
            of a saved memory, whose frames are sampled already; "-" for a video from standard input.
        num_frames: how many frames to sample, at most all; by default as the video processor samples.
        fps: how many frames to sample per second, at most as many in all as the video processor allows. The frames of
            a folder count as so many per second, by default as many as the video processor samples.
        start, end: sample between these seconds only.
        seek_mode: "exact", or "keyframe" for the nearest key frames, which is many times faster; by default as the
            video processor says.
        keep_frames, keep_ratio: an exact number or share of the frames to keep.
        delta_threshold: δ of the selection, however short the video; 0 keeps every frame. Without it and a budget, the
            checkpoint's own setting holds.
        device: as PyTorch names it; by default the GPU where there is one.
        dtype: of the weights, "float32", "bfloat16" or "float16"; by default the checkpoint's, but float32 on a CPU
            that multiplies bfloat16 no faster.
        max_new_tokens: where answers stop; by default the checkpoint's own limit, or 256.
        progress: whether to show progress bars.

    Raises:
        ValueError, OSError: for a checkpoint, a video or a setting that cannot be used.
    """
    if sum(option is not None for option in (keep_frames, keep_ratio, delta_threshold)) > 1:
        raise ValueError(
            f"Give one of keep_frames, keep_ratio and delta_threshold (got {keep_frames}, {keep_ratio} and "
            f"{delta_threshold})."
        )
    checkpoint, video = os.fspath(checkpoint), os.fspath(video)
    check_part(start, end)
    selection: dict[str, Any] = {
        "keep_frames": keep_frames,
        "keep_ratio": keep_ratio,
        "delta_threshold": delta_threshold,
    }
    if is_memory(video):
        _check_sampled(video, num_frames=num_frames, fps=fps, seek_mode=seek_mode)
        memory = _part(VideoMemory.load(video), start, end)
        model, processor = load_checkpoint(checkpoint, device, dtype)
        watch = _Stopwatch(model.device)
        memory.check({"images": describe_images(processor.video_processor)})
        chat = VideoChat(model, processor, memory, **selection, max_new_tokens=max_new_tokens)
        watch.lap("load")
        return EncodedVideo(video, checkpoint, None, chat, [], watch.seconds)

    if video != STANDARD_INPUT:
        check_video(video)
    place = find_device(device)
    processor = load_processor(checkpoint)
    watch = _Stopwatch(place)
    with ExitStack() as opened:
        reader = opened.enter_context(closing(open_video(video, processor.video_processor, fps, seek_mode)))
        sampling: Any = {"num_frames": num_frames, "fps": fps, "start": start, "end": end, "seek_mode": seek_mode}
        sampled = SampledVideo(reader, processor.video_processor, name=without_secrets(video), **sampling)
        watch.lap("decode")

        model = load_model(checkpoint, place, dtype)
        watch.restart()
        with tqdm(total=len(sampled), desc="Looking at the frames", unit="frame", disable=not progress) as bar:
            waited = 0.0  # for the frames that have been looked at

            def advance(done: int, total: int) -> None:
                nonlocal waited
                bar.update(done - bar.n)
                watch.lap("vision")
                waited = sampled.seconds_waited

            memory = model.encode_video(sampled, progress=advance)
        watch.move(waited, "vision", "decode")
        chat = VideoChat(model, processor, memory, **selection, max_new_tokens=max_new_tokens)
        watch.lap("compress")
        indices = sampled.numbers[sampled.numbers >= 0].tolist()
        opened.pop_all()  # from here on whoever has the result closes the reader
    return EncodedVideo(sampled.name, checkpoint, reader, chat, indices, watch.seconds)


def ask(
    checkpoint: str | os.PathLike[str],
    video: str | os.PathLike[str],
    *questions: str,
    max_new_tokens: int | None = None,
    **options: Any,
) -> list[Answer]:
    """Ask a checkpoint about a video, which is encoded once for all questions.

    ```python
    >>> from mambamia_hf import BUNDLED_CHECKPOINT
    >>> from mambamia_hf.inference import ask

    >>> shape, colour = ask(BUNDLED_CHECKPOINT, "video.mp4", "What shape appears?", "What colour is the shape?")
    >>> shape.answer, shape.kept_times
    ```

    Args:
        checkpoint: folder or Hub id of a MambaMia checkpoint.
        video: path or URL of a video file, or a folder of its frames.
        questions: what to ask; each question by itself, not as a conversation.
        max_new_tokens: where answers stop; by default the checkpoint's own limit, or 256.
        options: those of [`encode_video`].

    Returns:
        An answer for each question.
    """
    with encode_video(checkpoint, video, max_new_tokens=max_new_tokens, **options) as encoded:
        return [encoded.ask(question) for question in questions]


def load_checkpoint(
    checkpoint: str | os.PathLike[str],
    device: str | None = None,
    dtype: str | None = None,
    kind: type[Model] = MambaMiaForConditionalGeneration,  # type: ignore[assignment]  # mypy takes no such default
) -> tuple[Model, MambaMiaProcessor]:
    """Model and processor of a checkpoint, ready to be asked.

    Args:
        checkpoint: folder or Hub id of a MambaMia checkpoint.
        device, dtype: see [`encode_video`].
        kind: [`MambaMiaEncoder`] for the part that makes memories, without its language model.

    Raises:
        ValueError: for a checkpoint, a device or a type that cannot be used.
    """
    place, name = find_device(device), os.fspath(checkpoint)
    processor = load_processor(name)
    return load_model(name, place, dtype, kind), processor


def _check_sampled(memory: str, **options: Any) -> None:
    """Raises for an option about which frames are sampled, where there is a memory of those."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"'{memory}' is a memory, and its frames are sampled already; leave out {' and '.join(given)}, or encode "
            "the video again."
        )


def _part(memory: VideoMemory, start: float, end: float | None) -> VideoMemory:
    """The frames of a memory between two times, the one on display at `start` included."""
    times = memory.timestamps
    duration = times[-1] if memory.duration is None else memory.duration
    if start and start >= duration:
        raise ValueError(f"the video ends after {duration:g} seconds; start before that, not at {start:g}.")
    first = max(bisect_right(times, start + 1e-3) - 1, 0)
    stop = len(times) if end is None else bisect_left(times, end)
    if stop <= first:
        raise ValueError(f"the memory has no frame before {end:g} seconds; its first is at {times[first]:g}.")
    return memory if (first, stop) == (0, len(times)) else memory[first:stop]


def load_processor(checkpoint: str) -> MambaMiaProcessor:
    """The processor of a checkpoint, once that is known to be one."""
    check_checkpoint(checkpoint)
    with _loading(checkpoint):
        model_type = MambaMiaConfig.get_config_dict(checkpoint)[0].get("model_type", "unknown")
        if model_type != MambaMiaConfig.model_type:
            raise ValueError(f"its model type is {model_type}, not {MambaMiaConfig.model_type}")
        return MambaMiaProcessor.from_pretrained(checkpoint)


def load_model(
    checkpoint: str,
    device: torch.device,
    dtype: str | None,
    kind: type[Model] = MambaMiaForConditionalGeneration,  # type: ignore[assignment]  # mypy takes no such default
) -> Model:
    with _loading(checkpoint):
        config = MambaMiaConfig.from_pretrained(checkpoint)
        if dtype is None:
            slow = device.type == "cpu" and config.dtype != torch.float32 and not _multiplies_bfloat16_fast()
            dtype = "float32" if slow else "auto"
            if slow:
                warnings.warn(f"on this CPU {config.dtype} is slower than float32: weights are float32.", stacklevel=3)
        loaded: Any = kind.from_pretrained(checkpoint, config=config, dtype=dtype, output_loading_info=True)
        model, report = loaded
        if report["missing_keys"]:
            raise ValueError(f"it lacks weights of the model: {_named(report['missing_keys'])}")
        if report["unexpected_keys"]:
            warnings.warn(
                f"{checkpoint} has weights that the model has not, and they are not used: "
                f"{_named(report['unexpected_keys'])}.",
                stacklevel=3,
            )
    return model.to(device).eval()


def _named(weights: Iterable[str]) -> str:
    """The first names of weights, and how many more there are."""
    names = sorted(weights)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _loading(checkpoint: str) -> Iterator[None]:
    """Turn what can go wrong while a checkpoint is loaded into one sentence that names it."""
    name = (
        f"the folder '{checkpoint}'"
        if os.path.isdir(checkpoint)
        else f"'{checkpoint}', which is no folder here, from the Hub"
    )
    try:
        yield
    except Exception as error:  # libraries raise all kinds of errors over values that they never expected
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise ValueError(
            f"cannot load {name} ({reason}); give the folder or Hub id of a MambaMia checkpoint."
        ) from error


def find_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU where there is one; checked by a tensor on it."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"the device '{name}' cannot be used ({reason}); name another, as cpu.") from error


def _multiplies_bfloat16_fast() -> bool:
    """Whether products in bfloat16 are no slower than in float32; measured, since the flags of a CPU may mislead."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        matrix @ matrix
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            matrix @ matrix
            runs.append(time.perf_counter() - start)
        seconds[dtype] = min(runs)
    return seconds[torch.bfloat16] <= seconds[torch.float32]


def _shortest(values: torch.Tensor) -> list[float]:
    """The numbers with as few digits as tell them apart in float32."""
    return [float(str(value)) for value in values.float().cpu().numpy()]


@dataclass
class _Stopwatch:
    """Seconds of stages that follow each other, what an accelerator still has to do of each included."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        self.start = time.perf_counter()

    def lap(self, stage: str) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        self._add(stage, now - self.start)
        self.start = now

    def move(self, seconds: float, stage: str, other: str) -> None:
        """Counts a part of one stage as part of another."""
        self._add(stage, -seconds)
        self._add(other, seconds)

    def _add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 6)


__all__ = ["Answer", "EncodedVideo", "ask", "encode_video", "load_checkpoint"]
