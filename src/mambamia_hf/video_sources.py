"""Where a video comes from: a path, a URL, bytes or an open file; in any case a local file while it is read."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from huggingface_hub.utils import httpx


VideoSource = str | os.PathLike | bytes | BinaryIO


@contextmanager
def as_local_file(source: VideoSource) -> Iterator[tuple[str, str]]:
    """Gives the path of a local file with the video, and what to call the video in messages.

    What is not a local path is copied to a temporary file, which is gone afterwards.

    Raises:
        FileNotFoundError: if there is no file at the path.
        ValueError: if the source is a folder, empty, cannot be downloaded, or is of another type.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        with tempfile.TemporaryDirectory() as folder:
            yield _download(source, folder), f"'{source}'"
    elif isinstance(source, str | os.PathLike):
        yield _checked_path(os.fspath(source)), f"'{os.fspath(source)}'"
    elif isinstance(source, bytes) or hasattr(source, "read"):
        with tempfile.TemporaryDirectory() as folder:
            yield _write_copy(source, folder), "The given video"
    else:
        raise ValueError(f"{source!r} is not a video: pass a path, a URL, the bytes of a file or an open file.")


def _checked_path(path: str) -> str:
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no video file at '{path}': check the path.")
    if not os.path.isfile(path):
        raise ValueError(f"'{path}' is a folder, not a video file: give the path of a file.")
    if os.path.getsize(path) == 0:
        raise ValueError(f"The video file '{path}' is empty (0 bytes): copy or download it again.")
    return path


def _download(url: str, folder: str) -> str:
    path = os.path.join(folder, "video")
    try:
        with httpx.stream("GET", url, follow_redirects=True) as response, open(path, "wb") as file:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
    except httpx.HTTPError as error:
        raise ValueError(f"The video '{url}' could not be downloaded ({error}): check the address.") from error
    return path


def _write_copy(source: bytes | BinaryIO, folder: str) -> str:
    path = os.path.join(folder, "video")
    with open(path, "wb") as file:
        if isinstance(source, bytes):
            file.write(source)
        else:
            shutil.copyfileobj(source, file)
    if os.path.getsize(path) == 0:
        raise ValueError("The given video is empty (0 bytes): give the whole content of a video file.")
    return path
