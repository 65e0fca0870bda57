"""The program `mambamia` in a process of its own, and what an error of it looks like."""

import os
import signal
import subprocess
import sys
from contextlib import suppress


COMMAND = [sys.executable, "-m", "mambamia_hf"]


def environment(**variables: str) -> dict[str, str]:
    """This process's, without access to the Hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", **variables}


def run_program(*arguments, encoding: str = "utf-8", **kwargs) -> subprocess.CompletedProcess:
    """Run `mambamia` with pipes of an encoding as stdout and stderr."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=environment(PYTHONIOENCODING=encoding),
        capture_output=True,
        encoding=encoding,
        **kwargs,
    )


def interrupt(process: subprocess.Popen) -> None:
    """Ctrl-C until the process ends: Python overlooks one that comes just before a system call that waits."""
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)


def check_error(code: int, printed: str, error: str, *fragments) -> None:
    """That there was one line about what is wrong, holding some fragments, and nothing else."""
    assert code == 2, error
    assert printed == ""
    assert error.count("\n") == 1 and error.startswith("mambamia: error: "), error
    for fragment in fragments:
        assert str(fragment) in error
