"""The program `mambamia` in a process of its own, and what an error of it looks like."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen


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


def wait_for_server(process: subprocess.Popen, address: str, log: Path) -> None:
    """Until a server of OpenAI's format answers; what it wrote is shown if it ends before."""
    while True:
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(f"{address}/health"):
                return
        except URLError:
            time.sleep(0.2)


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
