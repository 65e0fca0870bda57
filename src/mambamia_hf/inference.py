"""Questions about a video file: encode it once, ask as often as wanted, and know how long each stage took."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError
from safetensors import SafetensorError
from tqdm.auto import tqdm

from .auto import MambaMiaConfig, MambaMiaForConditionalGeneration, MambaMiaProcessor
from .inputs import check_checkpoint, check_part, check_video
from .modeling_encoder import MambaMiaFeaturesOutput
from .video_decoding import VideoReader
from .video_sampling import FrameFolder, open_video, sample_part


MAX_NEW_TOKENS = 256


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
        seconds: how long decode, vision and compress took, once per video, and generate.
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


@dataclass(frozen=True)
class EncodedVideo:
    """A video that a model has seen: each question costs the language model's time only. Made by [`encode_video`].

    Use it as a context manager, or call `reader.close()`: a downloaded file is gone then.

    Args:
        video, checkpoint: path or URL of the video; folder or Hub id of the checkpoint.
        reader: of the video, for more of its frames.
        model, processor: what was loaded from the checkpoint.
        features: what `get_video_features` gave.
        frame_indices: numbers, among the frames of the file, of the sampled ones.
        timestamps, kept_frames, frame_deltas: see [`Answer`].
        seconds: how long decode, vision and compress took.
    """

    video: str
    checkpoint: str
    reader: "VideoReader | FrameFolder"
    model: MambaMiaForConditionalGeneration
    processor: MambaMiaProcessor
    features: MambaMiaFeaturesOutput
    frame_indices: list[int]
    timestamps: list[float]
    kept_frames: list[int]
    frame_deltas: list[float] | None
    seconds: dict[str, float]

    def __enter__(self) -> "EncodedVideo":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.reader.close()

    def ask(self, question: str, max_new_tokens: int | None = None) -> Answer:
        """Answer a question, by greedy decoding.

        Args:
            question: what to ask; each question by itself, not as a conversation.
            max_new_tokens: where to stop; by default the checkpoint's own limit, or 256.

        Raises:
            ValueError: if the question holds the placeholder of a video.
        """
        watch = _Stopwatch(self.model.device)
        prompt = self._prompt(question)
        output = self.model.generate(
            **prompt,
            mm_encoder_outputs={"video": self.features},
            max_new_tokens=max_new_tokens or self.model.generation_config.max_new_tokens or MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
        )
        new_tokens = output[:, prompt["input_ids"].shape[1] :]
        text = self.processor.batch_decode(new_tokens, skip_special_tokens=True)[0].strip()
        watch.lap("generate")
        return Answer(
            question=question,
            answer=text,
            video=self.video,
            model=self.checkpoint,
            timestamps=self.timestamps,
            kept_frames=self.kept_frames,
            kept_times=[self.timestamps[frame] for frame in self.kept_frames],
            frame_deltas=self.frame_deltas,
            video_tokens=self._video_tokens,
            seconds={**self.seconds, **watch.seconds},
        )

    @property
    def _video_tokens(self) -> int:
        return len(self.kept_frames) * self.processor.placeholders_per_frame

    def _prompt(self, question: str) -> dict[str, Any]:
        """The conversation as the processor makes it, with a placeholder for each token of the kept frames."""
        tokenizer, placeholder = self.processor.tokenizer, self.processor.video_token
        content: list[dict[str, Any]] = [{"type": "video"}, {"type": "text", "text": question}]
        conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        if text.count(placeholder) != 1:
            raise ValueError(f"the question '{question}' holds {placeholder}, which stands for a video; leave it out.")
        video = self.processor.video_replacement(
            len(self.timestamps), self.reader.metadata.duration, keep_frames=len(self.kept_frames)
        )
        (text,), _ = self.processor.get_text_with_replacements([text], videos_replacements=[video])
        starts = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        prompt = tokenizer(text, add_special_tokens=not starts, return_tensors="pt").to(self.model.device)
        return {name: prompt[name] for name in ("input_ids", "attention_mask")}


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
    progress: bool = False,
) -> EncodedVideo:
    """Load a checkpoint and have it see a video.

    Args:
        checkpoint: folder or Hub id of a MambaMia checkpoint.
        video: path or URL of a video file, or a folder of its frames as images, in the order of their names.
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
    check_video(video)
    place = find_device(device)
    processor = load_processor(checkpoint)

    watch = _Stopwatch(place)
    video_processor = processor.video_processor
    resize = partial(video_processor.resize, size=video_processor.size, resample=video_processor.resample)
    reader = open_video(video, video_processor, fps, seek_mode)
    indices = sample_part(video_processor, num_frames, fps, start, end, reader.metadata)
    batch = reader.frames_at(indices, resize if video_processor.do_resize else None, progress)
    metadata = copy(reader.metadata)
    metadata.frames_indices = batch.indices
    inputs = processor(
        videos=[batch.data],
        video_metadata=[metadata],
        do_sample_frames=False,
        keep_frames=keep_frames,
        keep_ratio=keep_ratio,
        return_tensors="pt",
    )
    watch.lap("decode")

    model = load_model(checkpoint, place, dtype)
    selection: dict[str, Any] = {"num_kept_frames": inputs["num_kept_frames"]}
    if delta_threshold is not None:
        selection = {"delta_threshold": delta_threshold, "delta_min_frames": 0}
    watch.restart()
    with torch.no_grad(), _vision_progress(model, len(batch.indices), progress):
        patch_features = model.model.encode_frames(inputs["pixel_values_videos"][0]).last_hidden_state
        watch.lap("vision")
        features: Any = model.get_video_features(
            patch_features_videos=patch_features[None], video_timestamps=inputs["video_timestamps"], **selection
        )
    watch.lap("compress")
    return EncodedVideo(
        video,
        checkpoint,
        reader,
        model,
        processor,
        features,
        frame_indices=batch.indices,
        timestamps=[round(time, 6) for time in batch.timestamps],  # no container knows them better
        kept_frames=features.keep_mask[0].nonzero().flatten().tolist(),
        frame_deltas=None if features.frame_deltas is None else _shortest(features.frame_deltas[0]),
        seconds=watch.seconds,
    )


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
    with encode_video(checkpoint, video, **options) as encoded:
        return [encoded.ask(question, max_new_tokens) for question in questions]


def load_processor(checkpoint: str) -> MambaMiaProcessor:
    """The processor of a checkpoint, once that is known to be one."""
    check_checkpoint(checkpoint)
    with _loading(checkpoint):
        model_type = MambaMiaConfig.get_config_dict(checkpoint)[0].get("model_type", "unknown")
        if model_type != MambaMiaConfig.model_type:
            raise ValueError(f"its model type is {model_type}, not {MambaMiaConfig.model_type}")
        return MambaMiaProcessor.from_pretrained(checkpoint)


def load_model(checkpoint: str, device: torch.device, dtype: str | None) -> MambaMiaForConditionalGeneration:
    with _loading(checkpoint):
        config = MambaMiaConfig.from_pretrained(checkpoint)
        if dtype is None:
            slow = device.type == "cpu" and config.dtype != torch.float32 and not _multiplies_bfloat16_fast()
            dtype = "float32" if slow else "auto"
            if slow:
                warnings.warn(f"on this CPU {config.dtype} is slower than float32: weights are float32.", stacklevel=3)
        loaded: Any = MambaMiaForConditionalGeneration.from_pretrained(
            checkpoint, config=config, dtype=dtype, output_loading_info=True
        )
        model, report = loaded
        if report["missing_keys"]:
            raise ValueError(f"it lacks {len(report['missing_keys'])} of the model's weights")
    return model.to(device).eval()


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
    except (OSError, ValueError, RuntimeError, SafetensorError, HFValidationError) as error:
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
        self.seconds[stage] = round(now - self.start, 6)
        self.start = now


@contextmanager
def _vision_progress(model: MambaMiaForConditionalGeneration, num_frames: int, progress: bool) -> Iterator[None]:
    """A bar over the frames that go through the vision tower: on a CPU that is most of the work."""
    with tqdm(total=num_frames, desc="Looking at the frames", unit="frame", disable=not progress) as bar:

        def advance(tower: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            bar.update(len(output[0]))

        handle = model.model.vision_tower.register_forward_hook(advance)
        try:
            yield
        finally:
            handle.remove()


__all__ = ["Answer", "EncodedVideo", "ask", "encode_video"]
