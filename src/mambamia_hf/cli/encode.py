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
from .console import remembered_ctrl_c, say
from .opening import checkpoint_of, say_loading


if TYPE_CHECKING:
    from ..memory_writer import MemoryWriter


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
        from ..auto import MambaMiaEncoder
        from ..inference import load_checkpoint
        from ..memory_writer import MemoryWriter

        encoder, processor = load_checkpoint(checkpoint, arguments.device, arguments.dtype, MambaMiaEncoder)
        writer = MemoryWriter(encoder, processor, **sampling_of(arguments))
        with remembered_ctrl_c() as ctrl_c:
            for video in there:
                done += _succeeds(_write, writer, video, targets[video])
                if ctrl_c.is_set():
                    raise KeyboardInterrupt
    return 0 if done == len(targets) else 2


def sampling_of(arguments: Namespace) -> dict[str, Any]:
    """Which frames are sampled, as the command line says."""
    return {name: getattr(arguments, name) for name in ("num_frames", "fps", "start", "end", "seek_mode")}


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


def _write(writer: "MemoryWriter", video: str, target: Path) -> None:
    """Writes a memory, unless it is there already, and prints its path."""
    with _progress_bar(video) as progress:
        outcome = writer.write(video, target, progress)
    if outcome == "written again":
        say(f"{target} was cut off and is written again")
    elif outcome == "there already":
        say(f"{target} is there already")
    print(target, flush=True)


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
