"""The command line of the converter, as a process."""

import subprocess
import sys

from original_checkpoint import Original, load


def test_command_line(tmp_path):
    src = Original().write(tmp_path / "src")
    command = [sys.executable, "-m", "mambamia_hf.convert", src, tmp_path / "dst"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"Wrote {tmp_path / 'dst'}.\n"
    load(tmp_path / "dst")
