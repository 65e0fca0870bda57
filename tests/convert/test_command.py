"""The command line of the converter, as a process."""

import subprocess
import sys

import pytest
import torch
from original_checkpoint import Original, load

from mambamia_hf.convert.command import main


def test_command_line(tmp_path):
    src = Original().write(tmp_path / "src")
    command = [sys.executable, "-m", "mambamia_hf.convert", src, tmp_path / "dst"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"Wrote {tmp_path / 'dst'}.\n"
    load(tmp_path / "dst")


def test_what_is_ignored_is_listed(tmp_path, capsys, caplog):
    original = Original()
    original.tensors |= {f"model.audio_tower.{name}.weight": torch.ones(1) for name in ("conv1", "conv2")}
    src = original.write(tmp_path / "src")
    main([str(src), str(tmp_path / "dst"), "--ignore", "model.audio_tower.conv1.*", "*.conv2.weight"])
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'dst'}.\n"
    assert "Left out 2 tensors: model.audio_tower.conv1.weight, model.audio_tower.conv2.weight." in caplog.text


@pytest.mark.parametrize("option", [["--ignore", "a"], ["--new-compressor"]])
def test_what_is_refused_in_reverse(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as exit:
        main(["--reverse", *option, "--", str(tmp_path), str(tmp_path / "dst")])
    assert exit.value.code == 2 and f"{option[0]} applies to" in capsys.readouterr().err
