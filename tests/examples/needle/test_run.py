"""`examples/needle/run.sh`: commands that their programs understand, in an order that can be interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import needle
import pytest

from mambamia_hf.training.arguments import parse_arguments


SCRIPT = Path(needle.__file__).with_name("run.sh")

# Stands in for `python`: notes the command line.
RECORDER = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script and returns the command lines of its calls of `python -m`."""
    log = tmp_path / "log.jsonl"
    recorder = tmp_path / "bin" / "python"
    recorder.parent.mkdir()
    recorder.write_text(RECORDER.format(python=sys.executable, log=str(log)))
    recorder.chmod(0o755)

    def run(output: Path) -> list[list[str]]:
        log.write_text("")
        environment = {**os.environ, "PATH": f"{recorder.parent}:{os.environ['PATH']}"}
        subprocess.run([SCRIPT, output], env=environment, check=True, cwd=tmp_path)
        commands = [json.loads(line) for line in log.read_text().splitlines()]
        assert {flag for flag, *_ in commands} == {"-m"}
        return [arguments for _, *arguments in commands]

    return run


def test_stages_build_on_each_other(run, tmp_path):
    output = tmp_path / "a run"
    commands = run(output)
    stages = [parse_arguments(arguments) for module, *arguments in commands if module == "mambamia_hf.training"]
    assert [stage.stage for stage, _ in stages] == ["image", "align", "video", "video"]
    assert [stage.length_scale for stage, _ in stages] == [1, 1, 1, 8]
    model = str(output / "vision")
    for stage, training in stages:
        assert stage.model == model and stage.features == str(output / "features")
        model = training.output_dir
        assert training.seed == 2025 and training.weight_decay == 0.05
    assert model == str(output / "long_video")


def test_finished_stages_are_left_out(run, tmp_path):
    output = tmp_path / "a run"
    for name in ("vision", "image"):
        (output / name).mkdir(parents=True)
        (output / name / "trainer_state.json").touch()
    modules = [module for module, *_ in run(output)]
    assert modules.count("mambamia_hf.training") == 3
    assert "needle.pretrain_vision" not in modules
