"""Shell recipes, run without what they call."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


# Stands in for `python` and notes its arguments.
RECORDER = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def modules_of(tmp_path) -> Callable[..., list[tuple[str, list[str]]]]:
    """Runs a script and returns the module and the arguments of every `python -m` in it."""
    log, python = tmp_path / "log.jsonl", tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(RECORDER.format(python=sys.executable, log=str(log)))
    python.chmod(0o755)

    def run(script: Path, *arguments: Path) -> list[tuple[str, list[str]]]:
        log.write_text("")
        environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
        subprocess.run([script, *arguments], env=environment, check=True, cwd=tmp_path)
        commands = [json.loads(line) for line in log.read_text().splitlines()]
        assert all(flag == "-m" for flag, *_ in commands)
        return [(module, arguments) for _, module, *arguments in commands]

    return run
