"""A video as an object that is kept and asked: the anchors, Δ and time of every frame, and what made them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import is_dataclass
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .files import atomic_write
from .frame_selection import select_frames


_FORMAT, _VERSION = "mambamia_video_memory", "1"

# The parts of a fingerprint, as messages name them.
_PARTS = {
    "vision_tower": "the settings of the vision tower",
    "vision_weights": "the weights of the vision tower",
    "compressor": "the settings of the compressor",
    "compressor_weights": "the weights of the compressor",
    "images": "size or normalisation of the frames",
    "sampling": "the sampling of the frames",
}
# Those that a model tells.
_MODEL_PARTS = ("vision_tower", "vision_weights", "compressor", "compressor_weights")

# Entries of a configuration that change no number.
_NO_SETTINGS = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map")

# Numbers that are summed up at a time: a part that stays in a processor's cache.
_DIGEST_CHUNK = 1 << 18
_DIGEST_COLUMNS = 1024


class VideoMemory:
    """What a model remembers of every frame of a video, before any is dropped: any number of questions, each with any
    selection of frames, and no second look at the video. It goes where a video goes. It never changes.

    Made by `model.encode_video`.

    ```python
    >>> memory = model.encode_video("video.mp4", processor)
    >>> memory.save("video.memory")
    >>> memory = VideoMemory.load("video.memory", model)
    >>> inputs = processor(text="<|video_pad|>What happens?", videos=[memory], return_tensors="pt")
    >>> output = model.generate(**inputs)
    ```

    Args:
        anchors (`torch.FloatTensor` of shape `(num_frames, num_anchors, hidden_size)`):
            The compressor's anchors of every frame, before its final norm and output projection.
        frame_deltas (`torch.FloatTensor` of shape `(num_frames,)`, *optional*):
            Δ of every frame; None of a compressor without a temporal layer.
        timestamps (`list[float]`): when each frame appears, in seconds from the start of the video; ascending.
        fingerprint (`dict[str, str]`): what made it, as `encoder_fingerprint` tells of a model, and how frames were
            prepared ("images") and chosen ("sampling"), as far as known.
        name (`str`, defaults to ""): of the video.
        width, height (`int`, *optional*): of the video's frames in pixels.
        duration (`float`, *optional*): of the video in seconds.
        is_selected (`bool`, defaults to `False`): whether its frames are the ones to keep, all of them.

    Raises:
        ValueError: if the parts do not fit each other, there is no frame, a number is not finite, a Δ is negative, or
            times go backwards.
    """

    # No dataclass: Transformers makes dictionaries of those that it finds in a conversation.
    anchors: Tensor
    frame_deltas: Tensor | None
    timestamps: list[float]
    fingerprint: dict[str, str]
    name: str
    width: int | None
    height: int | None
    duration: float | None
    is_selected: bool

    def __init__(
        self,
        anchors: Tensor,
        frame_deltas: Tensor | None,
        timestamps: Sequence[float],
        fingerprint: Mapping[str, str],
        name: str = "",
        width: int | None = None,
        height: int | None = None,
        duration: float | None = None,
        is_selected: bool = False,
    ) -> None:
        _check(anchors, frame_deltas, torch.tensor(timestamps, dtype=torch.float64))
        vars(self).update(
            anchors=anchors,
            frame_deltas=frame_deltas,
            timestamps=[float(seconds) for seconds in timestamps],
            fingerprint=dict(fingerprint),
            name=name,
            width=width,
            height=height,
            duration=duration,
            is_selected=is_selected,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"A video memory never changes, so `{name}` cannot be set; make another one.")

    def __len__(self) -> int:
        return len(self.anchors)

    def __getitem__(self, frames: slice) -> "VideoMemory":
        """A part of the video, as `memory[10:20]`; the frames to keep are chosen later."""
        if not isinstance(frames, slice):
            raise TypeError(f"Take a slice of a video memory, as memory[10:20], not memory[{frames!r}].")
        return self._take(torch.tensor(range(len(self))[frames], dtype=torch.long))

    def __deepcopy__(self, copies: dict) -> "VideoMemory":
        return self  # it never changes

    def __repr__(self) -> str:
        seconds = f"{self.timestamps[0]:g} to {self.timestamps[-1]:g} s"
        return f"VideoMemory({self.name!r}, {len(self)} frames, {seconds}{', selected' if self.is_selected else ''})"

    def select(
        self,
        keep_frames: int | None = None,
        keep_ratio: float | None = None,
        threshold: float | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> "VideoMemory":
        """The frames of a part of the video that matter most. All of them are kept later, whatever the settings.

        Args:
            keep_frames, keep_ratio, threshold: at most one of them; see `select_frames`. By default, all frames.
            start, end: only frames from this second on, and before that one.

        Raises:
            ValueError: if there is no frame in that part, for more than one way to select, or without Δ.
        """
        times = torch.tensor(self.timestamps, dtype=torch.float64)
        first, stop = (times[0] if start is None else start), (times[-1] + 1 if end is None else end)
        frames = ((times >= first) & (times < stop)).nonzero().squeeze(1)
        if not len(frames):
            raise ValueError(
                f"There is no frame from {float(first):g} to {float(stop):g} s in a video memory of frames from "
                f"{times[0]:g} to {times[-1]:g} s."
            )
        if any(option is not None for option in (keep_frames, keep_ratio, threshold)):
            if self.frame_deltas is None:
                raise ValueError("Selecting frames needs their Δ, and this video memory has none; keep every frame.")
            deltas = self.frame_deltas.cpu()[frames]
            frames = frames[select_frames(deltas[None], threshold, keep_frames, keep_ratio)[0]]
        return self._take(frames, is_selected=True)

    def _take(self, frames: Tensor, **changes: Any) -> "VideoMemory":
        """The frames of these numbers."""
        deltas = None if self.frame_deltas is None else self.frame_deltas[frames.to(self.frame_deltas.device)]
        taken = {
            "anchors": self.anchors[frames.to(self.anchors.device)],
            "frame_deltas": deltas,
            "timestamps": [self.timestamps[frame] for frame in frames.tolist()],
        }
        return VideoMemory(**{**vars(self), **taken, **changes})

    def frames(self) -> list[dict[str, Any]]:
        """A row for each frame: its number in this memory, time and Δ; what `pandas.DataFrame` takes."""
        deltas = [None] * len(self) if self.frame_deltas is None else self.frame_deltas.tolist()
        return [
            {"frame": frame, "time": time, "delta": delta}
            for frame, (time, delta) in enumerate(zip(self.timestamps, deltas, strict=True))
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, whole or not at all.

        Args:
            path: of the file; an existing one is replaced.
        """
        tensors = {"anchors": self.anchors, "timestamps": torch.tensor(self.timestamps, dtype=torch.float64)}
        if self.frame_deltas is not None:
            tensors["frame_deltas"] = self.frame_deltas
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {name: getattr(self, name) for name in _ABOUT}
        metadata = {"format": _FORMAT, "version": _VERSION, "about": json.dumps(about, sort_keys=True)}
        metadata["digest"] = _file_digest(tensors, metadata["about"])
        with atomic_write(path) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any = None, processor: Any = None) -> "VideoMemory":
        """Reads a file that `save` wrote.

        Args:
            path: of the file.
            model (*optional*): that is to be asked; it has to be the one that made the memory.
            processor (*optional*): that is to be used; it has to prepare frames as those of the memory were.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: for a file that is damaged or no video memory, and for a memory of another model.
        """
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no video memory at '{path}': check the path.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                _check_format(path, metadata)
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"'{path}' is no video memory, or a part of it is missing ({error}); encode the video again."
            ) from error
        if metadata.get("digest") != _file_digest(tensors, metadata.get("about", "")):
            raise ValueError(f"The video memory '{path}' is damaged; encode the video again.")
        try:
            about = json.loads(metadata["about"])
            memory = cls(tensors["anchors"], tensors.get("frame_deltas"), tensors["timestamps"].tolist(), **about)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The video memory '{path}' cannot be used: {error}") from error
        if model is not None:
            memory.check(encoder_fingerprint(model))
        if processor is not None:
            memory.check({"images": describe_images(processor.video_processor)})
        return memory

    def check(self, fingerprint: Mapping[str, str]) -> None:
        """Checks that it was made by what has this fingerprint.

        Args:
            fingerprint: all parts of one, or some.

        Raises:
            ValueError: naming the parts that differ.
        """
        parts = [_PARTS[part] for part, value in fingerprint.items() if self.fingerprint.get(part) != value]
        if parts:
            raise ValueError(
                f"The memory of '{self.name}' was made by another model or processor: {', '.join(parts)} differ; "
                f"encode the video again, or load what made it, with weights in the same type (its anchors are "
                f"{str(self.anchors.dtype).removeprefix('torch.')})."
            )


def _check(anchors: Tensor, deltas: Tensor | None, times: Tensor) -> None:
    """Checks the parts of a memory."""
    if anchors.ndim != 3 or not anchors.is_floating_point() or 0 in anchors.shape:
        raise ValueError(
            f"The anchors of a video memory must be floating-point numbers of shape (num_frames, num_anchors, "
            f"hidden_size) with at least one frame, not {anchors.dtype} of shape {tuple(anchors.shape)}."
        )
    if times.shape != anchors.shape[:1] or (deltas is not None and deltas.shape != anchors.shape[:1]):
        number = "no" if deltas is None else len(deltas)
        raise ValueError(
            f"A video memory needs a time and a Δ for each of its frames, and has {len(anchors)} frames, "
            f"{len(times)} times and {number} Δ."
        )
    for what, numbers in (("anchors", anchors), ("Δ", deltas), ("times", times)):
        if numbers is not None and not bool(numbers.isfinite().all()):
            raise ValueError(
                f"The {what} of a video memory must be finite, and there is a NaN or infinity among them; encode "
                f"the video again, in float32 or bfloat16."
            )
    if deltas is not None and bool((deltas < 0).any()):
        raise ValueError(f"Δ must not be negative, and a frame of this video memory has Δ = {float(deltas.min())}.")
    steps = times.diff()
    if bool((steps < 0).any()):
        frame = int(steps.argmin()) + 1
        raise ValueError(
            f"The times of a video memory must ascend, and frame {frame} is at {times[frame]:g} s after one at "
            f"{times[frame - 1]:g} s."
        )


def is_video_memory(thing: Any) -> TypeGuard[VideoMemory]:
    """Whether this is a video memory, also of another copy of this code: Transformers loads the code that a checkpoint
    brings along once for its model and once for its processor."""
    return type(thing).__name__ == VideoMemory.__name__ and hasattr(thing, "fingerprint")


# What a file tells in words.
_ABOUT = ("fingerprint", "name", "width", "height", "duration", "is_selected")


def encoder_fingerprint(model: nn.Module) -> dict[str, str]:
    """What a model's video memories depend on: settings and weights of vision tower and compressor.

    The weights are read through each time, so that no change goes unnoticed; that takes about as long as it takes to
    add them up. What counts is their values as float32: a checkpoint in bfloat16 that is loaded in float32 has the
    same fingerprint, and one in float32 that is loaded in bfloat16 has another.

    Args:
        model: a whole MambaMia model or its encoder.

    Returns:
        "vision_tower" and "compressor", settings as JSON; "vision_weights" and "compressor_weights", hashes.
    """
    encoder: Any = getattr(model, "model", model)
    config = encoder.config
    tower = {name: getattr(config, name) for name in ("vision_feature_layer", "vision_feature_norm")}
    tower["vision_feature_layer"] = config.vision_layer(config.vision_feature_layer)
    return {
        "vision_tower": json.dumps({**tower, **_settings(config.vision_config)}, sort_keys=True),
        "vision_weights": _digest(_weights(encoder.vision_tower)),
        "compressor": json.dumps(_settings(config.compressor_config), sort_keys=True),
        "compressor_weights": _digest(_weights(encoder.compressor)),
    }


def describe_images(video_processor: Any) -> str:
    """How a video processor prepares frames, in words."""
    names = ["do_resize", "size", "resample", "do_center_crop", "crop_size"]
    names += ["do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"]
    names += ["do_pad"] if getattr(video_processor, "do_pad", False) else []
    settings = {name: getattr(video_processor, name, None) for name in names}
    return json.dumps({name: _plain(value) for name, value in settings.items() if value is not None}, sort_keys=True)


def describe_sampling(
    num_frames: int | None, fps: float | None, start: float, end: float | None, seek_mode: str | None
) -> str:
    """How frames were chosen, by the options of `encode_video`."""
    return json.dumps({"num_frames": num_frames, "fps": fps, "start": start, "end": end, "seek_mode": seek_mode})


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if is_dataclass(value):  # a size
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a configuration that differ from its defaults, and change a number."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in _NO_SETTINGS}


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The saved weights of a module by name; those that are offloaded are brought back one module at a time."""
    saved = module.state_dict().keys()
    for prefix, child in module.named_modules():
        with _brought_back(child):
            own = {**dict(child.named_parameters(recurse=False)), **dict(child.named_buffers(recurse=False))}
            for name, tensor in own.items():
                whole_name = f"{prefix}.{name}" if prefix else name
                if whole_name in saved:
                    yield whole_name, tensor


def _brought_back(module: nn.Module) -> Any:
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    return align_module_device(module)


@torch.no_grad()
def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of the values of named tensors: SHA-256 over sums of their bits, in rows and in columns."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        sums = [total for chunk in tensor.reshape(-1).split(_DIGEST_CHUNK) for total in _bit_sums(chunk)]
        if sums:
            digest.update(torch.cat(sums).cpu().numpy().tobytes())
    return digest.hexdigest()


def _bit_sums(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of numbers as whole numbers in a table, summed up by column and by row; sums may wrap around."""
    if numbers.is_floating_point() and numbers.dtype != torch.float64:
        numbers = _padded(numbers.to(torch.float32), 2)
        if numbers.storage_offset() % 2:  # 64 bits at a time are read at their multiples
            numbers = numbers.clone()
    words = numbers.view(torch.int64) if numbers.is_floating_point() else numbers.to(torch.int64)
    table = _padded(words, _DIGEST_COLUMNS).view(-1, _DIGEST_COLUMNS)
    return table.sum(dim=0), table.sum(dim=1)


def _padded(numbers: Tensor, multiple: int) -> Tensor:
    """With zeros at the end, up to a multiple of a length."""
    missing = -len(numbers) % multiple
    return nn.functional.pad(numbers, (0, missing)) if missing else numbers


def _file_digest(tensors: dict[str, Tensor], about: str) -> str:
    return _digest([(f"{name} {tensor.dtype} {about}", tensor) for name, tensor in sorted(tensors.items())])


def _check_format(path: str, metadata: dict[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"'{path}' is a safetensors file, but no video memory; give a file that `save` wrote.")
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"The video memory '{path}' has version {metadata.get('version')} of the format, and this code reads "
            f"version {_VERSION}; update mambamia_hf, or encode the video again."
        )


__all__ = ["VideoMemory", "describe_images", "describe_sampling", "encoder_fingerprint", "is_video_memory"]
