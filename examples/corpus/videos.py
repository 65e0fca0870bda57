"""Which videos a corpus has."""

import mimetypes
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mambamia_hf.inputs import is_url
from mambamia_hf.messages import without_secrets


def find_videos(source: Path) -> dict[str, str]:
    """The paths or addresses of the videos of a corpus, by their names in it.

    Args:
        source: a folder, of which all video files count, those in its folders too, and are named by their paths in
            it; or a text file, the listing of a bucket for example, with a path or an address per line. Paths start
            from the folder of that file. Addresses are named by their host and path.

    Raises:
        ValueError: if there is no video, or two have one name.
        OSError: if there is no such folder or file, or it cannot be read.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file() and _is_named_as_video(path))
        videos = {str(path.relative_to(source)): str(path) for path in files}
    else:
        videos = {}
        for line in source.read_text(encoding="utf-8").split("\n"):
            if video := line.strip():
                name, video = _listed(video, source.parent)
                if videos.setdefault(name, video) != video:
                    raise ValueError(
                        f"'{source}' lists two videos of the name '{name}', addresses that differ in their "
                        "queries only; keep one of them."
                    )
    if not videos:
        raise ValueError(f"there is no video in '{source}'; name a folder with videos, or a list of their paths.")
    return videos


def _is_named_as_video(path: Path) -> bool:
    return (mimetypes.guess_type(path.name)[0] or "").startswith("video/") and not path.name.startswith(".")


def _listed(line: str, folder: Path) -> tuple[str, str]:
    """Name and path or address of a video that a listing names."""
    if is_url(line):
        parts = urlsplit(without_secrets(line))
        return parts.netloc + os.path.normpath(f"/{unquote(parts.path).lstrip('/')}"), line
    path = os.path.abspath(folder / line)
    relative = os.path.relpath(path, folder)
    return (path.lstrip(os.sep) if relative.startswith("..") else relative), path
