"""Files and folders that are written whole or not at all."""

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


# The lock of a folder that is in use, which is there long before this time is over.
_LOCK, _SECONDS_TO_LOCK = ".lock", 60


@contextmanager
def locked_folder(parent: str | os.PathLike[str], prefix: str) -> Iterator[Path]:
    """Yields a new folder that is gone afterwards, Ctrl-C included.

    What killed processes left is removed by the next one that asks for a folder of the same prefix.

    Args:
        parent: the folder to make it in.
        prefix: how its name begins.
    """
    for left in Path(parent).glob(f"{glob.escape(prefix)}*"):
        try:
            if time.time() - left.stat().st_mtime > _SECONDS_TO_LOCK:
                with FileLock(left / _LOCK, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
        except (OSError, Timeout):
            continue  # another process uses it or has removed it, or it is another user's
    folder, owner = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)), os.getpid()
    try:
        with FileLock(folder / _LOCK):
            yield folder
    finally:
        if os.getpid() == owner:  # a forked child may drop what its parent still uses
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path to write to, and moves that file to `path` when the block succeeds.

    Readers see the former file or the new one, never a part of it. The temporary file is in a hidden folder beside
    `path`, which is removed when the block raises, Ctrl-C included; what a killed process left is removed by the next
    one that writes to `path`. It has the name of `path`, as many writers choose the format by its suffix.

    Args:
        path: the file to write; an existing one is replaced.

    Yields:
        The temporary path.
    """
    path = Path(path)
    with locked_folder(path.parent, f".{path.name}.partial-") as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path` to write into, and moves it to `path` when the block succeeds.

    The temporary folder is removed when the block raises, Ctrl-C included; what a killed process left is removed by
    the next one that writes to `path`.

    Args:
        path: the folder to write, new or empty; its parents are created.

    Yields:
        The temporary folder, which has the name of `path`.

    Raises:
        ValueError: if `path` is anything else than a new or empty folder, or another process is writing it.
    """
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; give the name of a new one.")
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"Another process is writing {path}; wait for it, or give the name of a new folder."
        ) from error
    try:
        folder = partial / path.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        if path.exists():
            path.rmdir()
        folder.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # under the lock, so that nobody else has begun to write there
        lock.release()


__all__ = ["atomic_folder", "atomic_write", "locked_folder"]
