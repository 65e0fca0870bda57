"""Where a video comes from: a path, an address, bytes or an open file; in any case a local file while it is read."""

import base64
import binascii
import io
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from huggingface_hub.utils import httpx
from PIL import Image

from .files import locked_folder
from .inputs import STANDARD_INPUT
from .messages import printable, without_secrets


VideoSource = str | os.PathLike | bytes | BinaryIO

_COPY_BYTES = 1 << 20


class VideoPart:  # no dataclass: Transformers makes dictionaries of those in a chat
    """A video of which only a part counts.

    Args:
        source: The video, in any form that the video processor takes.
        start (`float`, *optional*, defaults to 0.0): The second from which on frames are sampled.
        end (`float`, *optional*): The second until which frames are sampled, by default the end of the video.

    Raises:
        ValueError: if no video has such a part.
    """

    def __init__(self, source: Any, start: float = 0.0, end: float | None = None) -> None:
        if not 0 <= start < (float("inf") if end is None else end):
            raise ValueError(
                f"There is nothing from `video_start={start}` to `video_end={end}` seconds: give a start from 0 on "
                "and a later end."
            )
        self.source, self.start, self.end = source, start, end


def content_of(source: Any) -> Any:
    """What to read where a source is a dictionary, as data sets have it: its `bytes`, or else the file at its `path`.

    With `video_start` or `video_end` in it, it stands for that part of the video. Anything else is what it is.

    Raises:
        ValueError: for a dictionary without a file.
    """
    if not isinstance(source, dict):
        return source
    content = source.get("path") if source.get("bytes") is None else source["bytes"]
    if content is None:
        raise ValueError(
            f"A video or image is given as a dictionary with {', '.join(map(repr, source)) or 'nothing'} in it: give "
            "it `bytes` or a `path`."
        )
    return part_of(content, source.get("video_start"), source.get("video_end"))


def image_source(source: Any) -> Any:
    """What Transformers' loading of images takes in place of a source: a picture, a path or another address."""
    source = content_of(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return Image.open(io.BytesIO(source))
    if isinstance(source, str | os.PathLike):
        return local_path(os.fspath(source))
    return Image.open(source) if hasattr(source, "read") else source


def part_of(source: Any, start: float | None, end: float | None) -> Any:
    """The source itself where neither time is given, else a [`VideoPart`] of it."""
    return source if start is None and end is None else VideoPart(source, 0.0 if start is None else start, end)


def is_address(location: str) -> bool:
    """Whether this is an address (`http://`, `https://`, `file://`, `data:`) rather than a path."""
    return location.lower().startswith(("http://", "https://", "file://", "data:"))


def local_path(location: str) -> str:
    """The path that a `file://` address stands for; other places stay as they are."""
    if location[:7].lower() == "file://" and not os.path.exists(location):
        return url2pathname(urlsplit(location).path)
    return location


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
def temporary_folder() -> Iterator[str]:
    """Gives a folder that is gone afterwards. What processes left that were killed is removed before."""
    with locked_folder(tempfile.gettempdir(), "mambamia-video-") as folder:
        yield str(folder)


@contextmanager
def as_local_file(source: VideoSource, limits: VideoLimits) -> Iterator[tuple[str, str]]:
    """Gives the path of a local file with the video, and what to call the video in messages.

    What is not a local path is copied to a temporary file, which is gone afterwards. So are pipes and devices, of
    which `"-"` is the standard input.

    Raises:
        FileNotFoundError: if there is no file at the path.
        ValueError: if the source is a folder, empty, beyond the limits, cannot be downloaded, or is of another type.
    """
    source = content_of(source)
    if isinstance(source, str | os.PathLike):
        with _file_at(os.fspath(source), limits) as file:
            yield file
    elif isinstance(source, bytes | bytearray | memoryview):
        with _temporary_copy([bytes(source)], "The given video", limits) as path:
            yield path, "The given video"
    elif hasattr(source, "read"):
        if hasattr(source, "seekable") and source.seekable():
            source.seek(0)  # it may have been read before
        with _temporary_copy(_blocks(source), "The given video", limits) as path:
            yield path, "The given video"
    else:
        raise ValueError(
            f"A source of type {type(source).__name__} is not a video: pass a path, an address, the bytes of a file "
            "or an open file."
        )


@contextmanager
def _file_at(location: str | bytes, limits: VideoLimits) -> Iterator[tuple[str, str]]:
    """As `as_local_file`, for a path or an address."""
    if isinstance(location, bytes):
        raise ValueError(f"{location!r} is a path of bytes: decode it with `os.fsdecode`.")
    if is_address(location) and not os.path.exists(location):
        blocks, name = _content_at(location, limits)
        if blocks is not None:
            with _temporary_copy(blocks, name, limits) as path:
                yield path, name
            return
        location = local_path(location)
    name = f"'{printable(location)}'"
    if location == STANDARD_INPUT:
        check_standard_input()
        with _temporary_copy(_blocks(sys.stdin.buffer), "The standard input", limits) as path:
            yield path, "The standard input"
    elif _is_stream(location):
        with open(location, "rb") as file, _temporary_copy(_blocks(file), name, limits) as path:
            yield path, name
    else:
        _check_path(location, name)
        with _encodable(location) as path:
            yield path, name


def check_standard_input() -> None:
    """Checks that a video may come in on standard input.

    Raises:
        ValueError: if there is none, or a person at a terminal.
    """
    if sys.stdin is None or sys.stdin.isatty():
        what = "not there" if sys.stdin is None else "a terminal"
        raise ValueError(f"The video - is standard input, which is {what}: send a video file there, with < or |.")


def _content_at(address: str, limits: VideoLimits) -> tuple[Iterable[bytes] | None, str]:
    """The content at an address, None for that of a local file, and what to call it in messages."""
    if address[:5].lower() == "data:":
        return [_data(address)], "The given video"
    if address[:7].lower() == "file://":
        return None, address
    name = f"'{without_secrets(address)}'"
    return _download(address, name, limits), name


def _data(address: str) -> bytes:
    """The content of a `data:` address."""
    kind, comma, text = address.partition(",")
    content = unquote_to_bytes(text)
    if not kind.endswith(";base64"):
        return content
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError(
            f"The video given as '{printable(kind[:80])}{comma}...' is no base64 ({error}): encode the whole file."
        ) from None


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
        with temporary_folder() as folder:
            link = os.path.join(folder, "video")
            os.symlink(os.path.abspath(path), link)
            yield link
    else:
        yield path


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    # One system call per step where the file can do that, so that Ctrl-C is not lost between two of them.
    read = getattr(file, "read1", file.read)
    while block := read(_COPY_BYTES):
        if not isinstance(block, bytes):
            raise ValueError(f"The open file gives {type(block).__name__}, not bytes: open it in binary mode, 'rb'.")
        yield block


@contextmanager
def _temporary_copy(blocks: Iterable[bytes], name: str, limits: VideoLimits) -> Iterator[str]:
    with temporary_folder() as folder:
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
