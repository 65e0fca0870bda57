"""`mambamia ask`: questions about a video."""

import json
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .. import BUNDLED_CHECKPOINT
from ..inputs import check_checkpoint, check_part, check_video
from .console import quieten_libraries, say


if TYPE_CHECKING:
    from ..inference import Answer


PLOT_FORMATS = ("png", "svg", "pdf", "jpg", "webp")
STANDARD_INPUT = "-"


def run(arguments: Namespace) -> None:
    """Answer the questions, each as soon as it can be; then draw the picture."""
    checkpoint = arguments.model or BUNDLED_CHECKPOINT
    check_part(arguments.start, arguments.end)
    check_checkpoint(checkpoint)
    if arguments.plot is not None:
        check_plot_path(arguments.plot)
    with _video_file(arguments.video) as video:
        check_video(video)
        if sys.stderr.isatty():
            say("loading ...")
        quieten_libraries()
        from ..inference import encode_video

        encoded = encode_video(
            checkpoint,
            video,
            num_frames=arguments.num_frames,
            fps=arguments.fps,
            start=arguments.start,
            end=arguments.end,
            seek_mode=arguments.seek_mode,
            keep_frames=arguments.keep_frames,
            keep_ratio=arguments.keep_ratio,
            delta_threshold=arguments.delta_threshold,
            device=arguments.device,
            dtype=arguments.dtype,
            progress=sys.stderr.isatty(),
        )
        with encoded:
            if arguments.plot is not None and encoded.frame_deltas is None:
                raise ValueError("the checkpoint has no temporal layer and so no Δ to plot; leave out --plot.")
            answers = []
            for question in arguments.questions:
                answer = encoded.ask(question, arguments.max_new_tokens)
                answers.append(answer)
                if arguments.json:
                    print(to_json(answer, arguments.video), flush=True)
                else:
                    is_one = len(arguments.questions) == 1
                    print(answer.answer if is_one else f"{question}\n{answer.answer}\n", flush=True)
            if arguments.model is None:
                say(
                    "no --model given: the bundled checkpoint only knows about shapes and digits that show up in a "
                    "video: which, in what colour, in what order, how often."
                )
            if arguments.plot is not None:
                from .timeline import draw_timeline

                draw_timeline(arguments.plot, encoded, answers)
                say(f"wrote {arguments.plot}")


def to_json(answer: "Answer", video: str) -> str:
    """One line with everything in an answer about `video`; in ASCII where stdout cannot print all characters."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps({**asdict(answer), "video": video}, ensure_ascii=not is_unicode)


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
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder '{path.parent}' for the plot '{path}'; make it, or name another.")
    if path.is_dir():
        raise ValueError(f"there is a folder in the place of the plot '{path}'; name another file.")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"the plot '{path}' cannot be written ({error.strerror}); name another place.") from error


@contextmanager
def _video_file(video: str) -> Iterator[str]:
    """The video as it was named, or a temporary file with what comes in on standard input."""
    if video != STANDARD_INPUT:
        yield video
        return
    if sys.stdin.isatty():
        raise ValueError("the video - is standard input, which is a terminal; send a video file there, with < or |.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "standard input")
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield str(path)
