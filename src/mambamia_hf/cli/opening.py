"""What `ask`, `chat` and `encode` have in common: opening a video or a memory, and what is said about an answer."""

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import BUNDLED_CHECKPOINT
from ..inputs import STANDARD_INPUT, check_checkpoint, check_part, check_video, is_memory
from .console import format_time, quieten_libraries, say


if TYPE_CHECKING:
    from ..inference import EncodedVideo


PLOT_FORMATS = ("png", "svg", "pdf", "jpg", "webp")
_OPTIONS = ("num_frames", "fps", "start", "end", "seek_mode", "keep_frames", "keep_ratio", "delta_threshold")


@contextmanager
def open_video(arguments: Namespace) -> Iterator["EncodedVideo"]:
    """What the model has seen of the video, or of the one in the memory, that the command line names."""
    check_part(arguments.start, arguments.end)
    checkpoint = checkpoint_of(arguments)
    video = arguments.video
    if video != STANDARD_INPUT and not is_memory(video):
        check_video(video)
    say_loading()
    from ..inference import encode_video

    encoded = encode_video(
        checkpoint,
        video,
        **{name: getattr(arguments, name) for name in _OPTIONS},
        device=arguments.device,
        dtype=arguments.dtype,
        max_new_tokens=arguments.max_new_tokens,
        progress=sys.stderr.isatty(),
    )
    with encoded:
        yield encoded


def checkpoint_of(arguments: Namespace) -> str:
    """The checkpoint that the command line names, or the bundled one.

    Raises:
        ValueError: if that is none.
    """
    checkpoint = arguments.model or BUNDLED_CHECKPOINT
    check_checkpoint(checkpoint)
    return checkpoint


def say_loading() -> None:
    """Before the first import that takes long."""
    if sys.stderr.isatty():
        say("loading ...")
    quieten_libraries()


def name_bundled_model(arguments: Namespace) -> None:
    """Says what to expect, where no model was named."""
    if arguments.model is None:
        say(
            "no --model given: the bundled checkpoint only knows about shapes and digits that show up in a video: "
            "which, in what colour, in what order, how often and when."
        )


def describe_evidence(evidence: Sequence[dict[str, Any]]) -> str:
    """One line about the rows of [`VideoChat.evidence`], most important first."""
    if evidence[0]["attention"] is None:
        return "Δ is largest at " + ", ".join(
            f"{format_time(row['time'], 1)} ({row['delta']:.2g})" for row in evidence
        )
    times = (f"{format_time(row['time'], 1)} ({row['attention']:.0%})" for row in evidence)
    return "attends most to " + ", ".join(times)


def check_plot_path(path: str | os.PathLike[str]) -> None:
    """Check the path of a picture before any work is done for it.

    Raises:
        ValueError: if the suffix is not one of `PLOT_FORMATS`, or the file cannot be written there.
    """
    path = Path(path)
    if path.suffix[1:].lower() not in PLOT_FORMATS:
        raise ValueError(
            f"the plot '{path}' has no suffix of a picture that can be written; give it one of "
            f"{', '.join('.' + name for name in PLOT_FORMATS)}."
        )
    check_output_path(path, "plot")


def check_output_path(path: str | os.PathLike[str], what: str) -> None:
    """Check that a file can be written before any work is done for it.

    Args:
        path: of the file.
        what: it is, for the message.

    Raises:
        ValueError: if it cannot.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder '{path.parent}' for the {what} '{path}'; make it, or name another.")
    if path.is_dir():
        raise ValueError(f"there is a folder in the place of the {what} '{path}'; name another file.")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"the {what} '{path}' cannot be written ({error.strerror}); name another place.") from error
