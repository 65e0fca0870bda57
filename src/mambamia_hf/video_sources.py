"""Where a video comes from: a path, a URL, bytes or an open file; in any case a local file while it is read."""

import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from huggingface_hub.utils import httpx


VideoSource = str | os.PathLike | bytes | BinaryIO

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class VideoLimits:
    """What a video may cost before it is refused.

    Args:
        pixels (`int`, *optional*, defaults to 67,108,864, that is 8192 x 8192): The most pixels of a frame.
        copied_bytes (`int`, *optional*, defaults to 16 GiB):
            The most bytes of a source that has to be copied to a temporary file: a download, a pipe, an open file.
        download_seconds (`float`, *optional*, defaults to 3600): The longest time that a download may take.
    """

    pixels: int = 8192 * 8192
    copied_bytes: int = 16 << 30
    download_seconds: float = 3600.0


@contextmanager
def as_local_file(source: VideoSource, limits: VideoLimits) -> Iterator[tuple[str, str]]:
    """Gives the path of a local file with the video, and what to call the video in messages.

    What is not a local path is copied to a temporary file, which is gone afterwards. So are pipes and devices, of
    which `"-"` is the standard input.

    Raises:
        FileNotFoundError: if there is no file at the path.
        ValueError: if the source is a folder, empty, beyond the limits, cannot be downloaded, or is of another type.
    """
    if isinstance(source, str | os.PathLike):
        location = os.fspath(source)
        if not isinstance(location, str):
            raise ValueError(f"{source!r} is a path of bytes: decode it with `os.fsdecode`.")
        scheme = location.partition("://")[0].lower() if "://" in location else ""
        if scheme in ("http", "https") and not os.path.exists(location):
            name = f"'{without_secrets(location)}'"
            with _temporary_copy(_download(location, name, limits), name, limits) as path:
                yield path, name
            return
        if scheme == "file" and not os.path.exists(location):
            location = url2pathname(urlsplit(location).path)
        name = f"'{printable(location)}'"
        if location == "-":
            with _temporary_copy(_blocks(sys.stdin.buffer), "The standard input", limits) as path:
                yield path, "The standard input"
        elif _is_stream(location):
            with open(location, "rb") as file, _temporary_copy(_blocks(file), name, limits) as path:
                yield path, name
        else:
            _check_path(location, name)
            with _encodable(location) as path:
                yield path, name
    elif isinstance(source, bytes):
        with _temporary_copy([source], "The given video", limits) as path:
            yield path, "The given video"
    elif hasattr(source, "read"):
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)  # it may have been read before
        with _temporary_copy(_blocks(source), "The given video", limits) as path:
            yield path, "The given video"
    else:
        raise ValueError(
            f"A source of type {type(source).__name__} is not a video: pass a path, a URL, the bytes of a file or an "
            "open file."
        )


def printable(text: str) -> str:
    """`text` with escapes for what could move the cursor or change colours on a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def without_secrets(url: str) -> str:
    """The address without user name, password and query, which may hold a token."""
    host_and_path = url.partition("://")[2].partition("?")[0].partition("#")[0]
    host, slash, path = host_and_path.partition("/")
    return printable(url.partition("://")[0] + "://" + host.rpartition("@")[2] + slash + path)


def _is_stream(path: str) -> bool:
    """Whether this is a pipe or a device, which can be read only once."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _check_path(path: str, name: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no video file at {name}: check the path.")
    if os.path.isdir(path):
        raise ValueError(f"{name} is a folder, not a video file: give the path of a file.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"The video file {name} is empty (0 bytes): copy or download it again.")


@contextmanager
def _encodable(path: str) -> Iterator[str]:
    """The path itself, or a link to it where its name is not UTF-8, which FFmpeg could not open."""
    try:
        path.encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = os.path.join(folder, "video")
            os.symlink(os.path.abspath(path), link)
            yield link
    else:
        yield path


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(_COPY_BYTES), b"")


@contextmanager
def _temporary_copy(blocks: Iterable[bytes], name: str, limits: VideoLimits) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "video")
        size = 0
        with open(path, "wb") as file:
            for block in blocks:
                size += len(block)
                if size > limits.copied_bytes:
                    raise ValueError(
                        f"{name} has more than {limits.copied_bytes} bytes: save it to a file first, or raise "
                        "`copied_bytes` of `limits`."
                    )
                file.write(block)
        if size == 0:
            raise ValueError(f"{name} is empty (0 bytes): give the whole content of a video file.")
        yield path


def _download(url: str, name: str, limits: VideoLimits) -> Iterator[bytes]:
    deadline = time.monotonic() + limits.download_seconds
    try:
        with httpx.stream("GET", url, follow_redirects=True) as response:
            response.raise_for_status()
            for block in response.iter_bytes():
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"The video {name} takes more than {limits.download_seconds:g} seconds to download: save it "
                        "to a file first, or raise `download_seconds` of `limits`."
                    )
                yield block
    except httpx.HTTPStatusError as error:
        # The message of the error itself holds the address with its secrets.
        reason = f"status {error.response.status_code} {printable(error.response.reason_phrase)}"
        raise ValueError(f"The video {name} could not be downloaded ({reason}): check the address.") from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        reason = type(error).__name__
        raise ValueError(f"The video {name} could not be downloaded ({reason}): check the address.") from None
