"""What the program says besides its answers, one line each on stderr, and how it writes times."""

import io
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..messages import printable


def say(text: str) -> None:
    """Print one line on stderr."""
    print(f"mambamia: {printable(' '.join(text.split()))}", file=sys.stderr, flush=True)


def format_time(seconds: float, decimals: int = 0) -> str:
    """Seconds as m:ss, from an hour on as h:mm:ss, with so many decimals."""
    ticks = round(seconds * 10**decimals)
    whole, rest = divmod(ticks, 10**decimals)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    text = f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{text}.{rest:0{decimals}d}" if decimals else text


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


@contextmanager
def remembered_ctrl_c() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C sets, beside its exception, which Python drops within a finaliser or a callback."""
    event = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.default_int_handler(number, frame)

    with handled_ctrl_c(interrupt):
        yield event


@contextmanager
def handled_ctrl_c(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has Ctrl-C call `handler` in place of Python's own, where that would have been called."""
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
