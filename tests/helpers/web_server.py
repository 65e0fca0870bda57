"""`mambamia web` in a process of its own, and a browser to visit it with."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from program import COMMAND, environment, interrupt


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The path of a Chromium on this machine."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[str]:
    """The address of a page that is served meanwhile; temporary files go to `folder`, and none is left afterwards."""
    command = [*COMMAND, "web", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, env=environment(TMPDIR=os.fspath(folder)), stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if "mambamia: open http" in line:
                break
        else:
            raise AssertionError("".join(said))
        yield said[-1].split()[2]
    finally:
        interrupt(process)
        rest = process.communicate()[1]
    assert "Traceback" not in rest, rest
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert left == [], left
