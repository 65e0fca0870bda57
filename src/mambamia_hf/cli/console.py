"""What the program says besides its answers: one line each, on stderr."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """Print one line on stderr."""
    print(f"mambamia: {' '.join(text.split())}", file=sys.stderr, flush=True)


def escape_unprintable() -> None:
    """Have stdout and stderr escape what their encoding lacks, where it would be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def short_warnings() -> Iterator[None]:
    """Show warnings as one line each, without the place in the code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
        yield


def quieten_libraries() -> None:
    """Have the libraries log errors only, and draw progress bars on a terminal only.

    What matters of their warnings is an error in this program, as is what FFmpeg (libav) says of a file.
    """
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
