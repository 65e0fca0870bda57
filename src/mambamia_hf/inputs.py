"""What can be said about a video or a checkpoint by its name alone, before anything that takes long is imported."""

import json
import os
import re
from pathlib import Path

from .checkpoint_layout import check_layout


STANDARD_INPUT = "-"  # in place of the name of a video
MEMORY_SUFFIX = ".safetensors"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def is_url(video: str) -> bool:
    return video.startswith(("http://", "https://"))


def is_memory(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a saved video memory, by its suffix or by how a safetensors file begins."""
    path = os.fspath(path)
    if is_url(path) or not os.path.isfile(path):
        return False
    if path.lower().endswith(MEMORY_SUFFIX):
        return True
    with open(path, "rb") as file:
        beginning = file.read(10)
    return beginning[8:] == b'{"' and int.from_bytes(beginning[:8], "little") < os.path.getsize(path)


def frame_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The images in a folder of frames, in the order of their names; numbers in names count as numbers.

    Raises:
        ValueError: if there is no image in the folder.
    """
    files = [path for path in Path(folder).iterdir() if _is_image(path)]
    if not files:
        raise ValueError(
            f"the folder '{folder}' has no images ({', '.join(IMAGE_SUFFIXES)}); name a video file, or a folder of "
            "its frames."
        )
    return sorted(files, key=lambda path: [_number_or_text(part) for part in re.split(r"(\d+)", path.name)])


def check_video(video: str) -> None:
    """Check that `video` is a URL, a file or a folder of frames.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the file is empty, or the folder has no images.
    """
    if is_url(video):
        return
    if not os.path.exists(video):
        raise FileNotFoundError(f"there is no video file '{video}'; check the path.")
    if os.path.isdir(video):
        frame_files(video)
    elif os.path.isfile(video) and os.path.getsize(video) == 0:
        raise ValueError(f"the video file '{video}' is empty (0 bytes); copy or download it again.")


def check_part(start: float, end: float | None) -> None:
    """Check the seconds from which and until which a video is looked at.

    Raises:
        ValueError: if they are no part of any video.
    """
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"there is nothing from {start} to {end} seconds; give a start from 0 on and a later end.")


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Check that `checkpoint` can be a Hub id, or is the folder of a whole MambaMia checkpoint.

    Raises:
        ValueError: if it is neither, is in the layout of the authors' code, or holds an adapter (PEFT) without the
            model that it adapts.
    """
    name = os.fspath(checkpoint)
    remedy = "give the folder or Hub id of a MambaMia checkpoint"
    if not os.path.isdir(name):
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
            raise ValueError(f"there is no folder '{name}'; {remedy}.")
        return
    if os.path.exists(os.path.join(name, "adapter_config.json")):
        raise ValueError(
            f"the folder '{name}' holds an adapter, not a whole model; merge it (PEFT's `merge_and_unload`), save the "
            "result with its processor, and give that folder."
        )
    try:
        config = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the folder '{name}' has no readable config.json; {remedy}.") from error
    if not isinstance(config, dict):
        config = {}
    check_layout(config, f"the folder '{name}'")
    model_type = config.get("model_type", "unknown")
    if model_type != "mambamia":
        raise ValueError(f"the folder '{name}' holds a model of type {model_type}, not mambamia; {remedy}.")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _number_or_text(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part)
