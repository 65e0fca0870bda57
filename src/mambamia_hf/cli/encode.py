"""`mambamia encode`: memories of videos, each written once."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ..inputs import MEMORY_SUFFIX, check_part, check_video, is_url
from .console import say
from .opening import checkpoint_of, say_loading


if TYPE_CHECKING:
    from ..auto import MambaMiaForConditionalGeneration, MambaMiaProcessor


def run(arguments: Namespace) -> int:
    """Encode the videos one after the other, and print the path of each memory; what fails is named, and others go on.

    Returns:
        The exit code: 0, or 2 if a video could not be encoded.
    """
    check_part(arguments.start, arguments.end)
    checkpoint = checkpoint_of(arguments)
    targets = name_targets(arguments.videos, Path(arguments.output))
    there = [video for video in targets if _succeeds(check_video, video)]
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    done = 0
    if there:
        say_loading()
        from ..inference import load_checkpoint

        model, processor = load_checkpoint(checkpoint, arguments.device, arguments.dtype)
        encoder = Encoder(model, processor, arguments)
        for video in there:
            done += _succeeds(encoder.encode, video, targets[video])
    return 0 if done == len(targets) else 2


def name_targets(videos: list[str], folder: Path) -> dict[str, Path]:
    """The file of the memory of each video.

    Raises:
        ValueError: if two of them would be one.
    """
    targets: dict[str, Path] = {}
    sources: dict[Path, str] = {}
    for video in videos:
        name = unquote(urlsplit(video).path) if is_url(video) else os.path.abspath(video)
        target = folder / f"{Path(name).name}{MEMORY_SUFFIX}"
        if sources.setdefault(target, video) != video:
            raise ValueError(
                f"'{sources[target]}' and '{video}' have one name, so '{target}' would be the memory of both; encode "
                "them into two folders."
            )
        targets[video] = target
    return targets


class Encoder:
    """Writes memories of videos.

    Args:
        model, processor: what sees the videos.
        arguments: with the options about which frames are sampled.
    """

    def __init__(
        self, model: "MambaMiaForConditionalGeneration", processor: "MambaMiaProcessor", arguments: Namespace
    ):
        from ..video_memory import encoder_fingerprint

        self.model, self.processor = model, processor
        names = ("num_frames", "fps", "start", "end", "seek_mode")
        self.sampling = {name: getattr(arguments, name) for name in names}
        self.made_by = encoder_fingerprint(model)

    def encode(self, video: str, target: Path) -> None:
        """Writes a memory, unless it is there already.

        Raises:
            OSError, ValueError: if the video cannot be read, or the file is there and is something else.
        """
        if not target.exists() or self._is_cut(target):
            with _progress_bar(video) as progress:
                memory = self.model.encode_video(video, self.processor, **self.sampling, progress=progress)
            memory.save(target)
        else:
            self._check(target)
            say(f"{target} is there already")
        print(target, flush=True)

    def _is_cut(self, target: Path) -> bool:
        """Whether a part of the file is missing; nothing is lost if it is written again."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(target, "pt"):
                return False
        except SafetensorError:
            say(f"{target} is cut off and is written again")
            return True

    def _check(self, target: Path) -> None:
        """Raises unless the file is a memory that this model would make with these options."""
        from ..video_memory import VideoMemory, describe_images, describe_sampling

        try:
            memory = VideoMemory.load(target)
            memory.check({**self.made_by, "images": describe_images(self.processor.video_processor)})
            memory.check({"sampling": describe_sampling(**self.sampling)})
        except ValueError as error:
            raise ValueError(
                f"{str(error).rstrip('.')}; '{target}' stays as it is: name another folder, or delete it."
            ) from error


@contextmanager
def _progress_bar(video: str) -> Iterator[Callable[[int, int], None]]:
    from tqdm.auto import tqdm

    with tqdm(desc=Path(video).name, unit="frame", disable=not sys.stderr.isatty()) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def _succeeds(step: Callable[..., None], *arguments: Any) -> bool:
    """Whether a step for one video works; what is wrong is said."""
    try:
        step(*arguments)
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        return False
    return True
