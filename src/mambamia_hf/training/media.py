"""The images and videos of records: decoded to pixels, or as vision features that were computed before."""

import copy
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.image_utils import load_image
from transformers.integrations import is_deepspeed_zero3_enabled

from ..inputs import frame_files
from ..modeling_mambamia import MambaMiaForConditionalGeneration
from ..processing_mambamia import MambaMiaProcessor
from ..video_processing_mambamia import duration_of
from ..video_sources import image_source
from .records import in_folder, media_path, whole_path


# When this many records or files are all unusable from the start, the settings are wrong rather than the media.
FIRST_TRIES = 20

# The setting of features that have the times of videos, which earlier versions left out.
TIMES = "video times"

# The settings of a processor that decide how a file becomes pixels.
_PIXEL_SETTINGS = (
    "do_sample_frames num_frames fps sample_at do_pad do_convert_rgb do_resize size resample do_center_crop crop_size "
    "do_rescale rescale_factor do_normalize image_mean image_std"
).split()


class Medium(NamedTuple):
    """An image or a video of a record.

    Args:
        kind: `"image"` or `"video"`.
        tensor: its pixels or its features.
        times: of a video, `(num_frames,)`, in seconds, in float64; None where they are not known.
        duration: of a video, in seconds; None where it is not known.
    """

    kind: str
    tensor: Tensor
    times: Tensor | None = None
    duration: float | None = None


class MediaReader:
    """Reads images and videos as pixels, as the processor does.

    Args:
        processor: that of the model.
        media_folder: the folder that relative paths start from.
        num_frames: the largest number of frames per video; by default that of the video processor.
        fps: the largest number of frames per second; by default that of the video processor.
    """

    def __init__(
        self,
        processor: MambaMiaProcessor,
        media_folder: str | os.PathLike[str] | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
    ):
        self.image_processor = processor.image_processor
        self._needs_times = processor.frame_time_format is not None or processor.time_instruction
        self.video_processor = copy.copy(processor.video_processor)
        if num_frames is not None:
            self.video_processor.num_frames = num_frames
        if fps is not None:
            self.video_processor.fps = fps
        self.media_folder = media_folder

    def locate(self, path: str) -> str:
        """The path of a file from here, given as a record has it; addresses stay as they are."""
        return path if self.media_folder is None else in_folder(self.media_folder, path)

    def read(self, kind: str, source: Any) -> Medium:
        """Reads one image or video.

        Args:
            kind: `"image"` or `"video"`.
            source: a path, an address, bytes, a dictionary with `path` and `bytes` as `datasets` has and with
                `video_start` and `video_end`, or what else the processors take. A video may be a folder of its frames,
                which count as `fps` per second.

        Returns:
            `(channels, height, width)` of an image, `(num_frames, channels, height, width)` of a video.
        """
        path = media_path(source)
        if path is not None:
            source = {**(source if isinstance(source, dict) else {}), "path": self.locate(path)}
        if kind == "image":
            image = load_image(image_source(source))
            return Medium(kind, self.image_processor(image, return_tensors="pt")["pixel_values"][0])
        told: dict[str, Any] = {}
        if path and os.path.isdir(source["path"]):
            told = {name: source.get(name) for name in ("video_start", "video_end")}
            told["video_metadata"] = [{"fps": self.video_processor.fps or 1.0}]
            source = [[load_image(str(file)) for file in frame_files(source["path"])]]
        video = self.video_processor(source, **told, return_tensors="pt", return_metadata=True)
        times = video["video_timestamps"][0] if "video_timestamps" in video else None
        return Medium(kind, video["pixel_values_videos"][0], times, duration_of(video["video_metadata"][0]))

    def settings(self, model: MambaMiaForConditionalGeneration) -> dict[str, Any]:
        """What the vision features of a file depend on beside the file; they may replace pixels where it is equal.

        Args:
            model: the model whose vision tower makes the features.

        Returns:
            Settings by name, as JSON would give them back.
        """
        digest, tower = hashlib.sha256(), model.model.vision_tower
        with _whole_weights(tower):
            for name, tensor in sorted(tower.state_dict().items()):
                digest.update(name.encode())  # in bfloat16, so that the type it was loaded in does not matter
                digest.update(tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
        settings = {
            "vision_tower": f"{tower.config.model_type} {digest.hexdigest()[:16]}",
            "vision_feature_layer": model.config.vision_layer(model.config.vision_feature_layer),
        }
        for kind, processor in (("image", self.image_processor), ("video", self.video_processor)):
            given = processor.to_dict()
            settings |= {f"{kind} {name}": given.get(name) for name in _PIXEL_SETTINGS}
        if self._needs_times:
            settings[TIMES] = True
        return json.loads(json.dumps(settings))


@contextmanager
def _whole_weights(module: nn.Module) -> Iterator[None]:
    """Within it, each process has the whole weights of a module, which DeepSpeed's ZeRO-3 splits."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def times_name(path: str) -> str:
    """What a shard calls the times of the frames of a video and, at the end, of its end."""
    return f"times of {path}"


@functools.cache
def _open_shard(path: Path) -> Any:
    """An open shard, one per process: reading its list of tensors is what takes time."""
    return safe_open(path, framework="pt")


class VisionFeatures:
    """Reads vision features that `python -m mambamia_hf.training.features` wrote, mapped into memory.

    Args:
        folder: the folder with the shards and `index.json`.
        settings: what the features must have been made with, see [`MediaReader.settings`].

    Raises:
        ValueError: if the folder has no index, or the features were made by another vision tower. Asking for images or
            videos raises it if other settings of theirs were used.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]):
        self.folder = Path(folder)
        file = self.folder / "index.json"
        if not file.is_file():
            raise ValueError(
                f"There are no features in '{folder}': it has no index.json; precompute them first, with `python -m "
                f"mambamia_hf.training.features`."
            )
        index = json.loads(file.read_text(encoding="utf-8"))
        self._changed: dict[str, tuple[Any, Any]] = {
            name: (index["settings"].get(name), now)
            for name, now in settings.items()
            if now != index["settings"].get(name)
        }
        self.check_settings("vision")
        self.has_times: bool = index["settings"].get(TIMES, False)
        self.shards: dict[str, str] = index["shards"]
        self.skipped: dict[str, str] = index["skipped"]
        self.sizes: dict[str, int | None] = index["sizes"]

    def check_settings(self, *kinds: str) -> None:
        """Checks what the features were made with.

        Args:
            kinds: first words of settings: `"vision"` for those of all features, `"image"`, `"video"`.

        Raises:
            ValueError: if a setting is another one now.
        """
        for name, (then, now) in self._changed.items():
            if name.startswith(kinds):
                raise ValueError(
                    f"The features in '{self.folder}' were made with {name} {then!r} and it is {now!r} now; "
                    f"precompute them again, or use the settings that they were made with."
                )

    def __contains__(self, source: Any) -> bool:
        path = whole_path(source)
        return path in self.shards or path in self.skipped

    def read(self, kind: str, source: Any) -> Medium:
        """Reads the features of one image or video.

        Args:
            kind: `"image"` or `"video"`.
            source: a path or address, or a dictionary with `path`, as the record has it.

        Returns:
            `(num_patches, vision_size)` of an image, `(num_frames, num_patches, vision_size)` of a video, in float16.

        Raises:
            ValueError: if the file could not be decoded when the features were made.
        """
        path = whole_path(source)
        if path in self.skipped:
            raise ValueError(self.skipped[path])
        shard = _open_shard(self.folder / self.shards[path])
        if kind == "image" or not self.has_times:
            return Medium(kind, shard.get_tensor(path))
        *times, duration = shard.get_tensor(times_name(path))
        return Medium(kind, shard.get_tensor(path), torch.stack(times), float(duration))


__all__ = ["FIRST_TRIES", "TIMES", "MediaReader", "Medium", "VisionFeatures", "times_name"]
