"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to, and moves that file to `path` when the block succeeds.

    Readers see the former file or the new one, never a part of it. The temporary file is removed when the block
    raises, Ctrl-C included. It keeps the suffix of `path`, as many writers choose the format by it.

    Args:
        path: the file to write; an existing one is replaced.

    Yields:
        The temporary path.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["atomic_write"]
