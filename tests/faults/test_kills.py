"""`kill -9` in the middle of a file: the next run takes nothing half for whole, and ends as an unbroken one."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversations import record
from original_checkpoint import Original
from safetensors.torch import load_file
from tiny_model import tiny_checkpoint
from video_files import write_video

from mambamia_hf import MambaMiaForConditionalGeneration, VideoMemory
from mambamia_hf.cli.main import main as mambamia
from mambamia_hf.convert.command import main as convert
from mambamia_hf.training.features import main as precompute


# Writes half of the file that a function writes, and dies.
DIES = """
import importlib, os, signal, sys
sys.path.insert(0, {helpers!r})
module = importlib.import_module({module!r})
whole = module.{function}
left = {times}

def half(content, file, *args, **kwargs):
    global left
    whole(content, file, *args, **kwargs)
    left -= 1
    if not left:
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

module.{function} = half
"""


def run_until_killed(module: str, function: str, program: str, times: int = 1) -> None:
    helpers = str(Path(__file__).parents[1] / "helpers")
    dies = DIES.format(module=module, function=function, times=times, helpers=helpers)
    done = subprocess.run([sys.executable, "-c", dies + program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_precomputing(tmp_path, times):
    tiny_checkpoint(tmp_path / "model")
    names = [f"{number}.mp4" for number in range(3)]
    for number, name in enumerate(names):
        write_video(tmp_path / name, num_frames=10 + number)
    data = [record(name, "<video>\nWhat?", "It.", video=name) for name in names]
    (tmp_path / "data.json").write_text(json.dumps(data))

    def arguments(output: str) -> list[str]:
        settings = {"model": "model", "data": "data.json", "media_folder": "", "output": output}
        paths = [text for name, path in settings.items() for text in (f"--{name}", str(tmp_path / path))]
        return [*paths, "--num_workers", "0", "--shard_size", "0"]

    program = f"from mambamia_hf.training.features import main; main({arguments('features')!r})"
    run_until_killed("mambamia_hf.training.features", "save_file", program, times)
    precompute(arguments("features"))
    precompute(arguments("unbroken"))
    files = {file.name for file in (tmp_path / "unbroken").iterdir() if file.suffix != ".lock"}
    for name in files - {"index.json", ".lock"}:
        found, expected = load_file(tmp_path / "features" / name), load_file(tmp_path / "unbroken" / name)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_converting(tmp_path):
    src = Original().write(tmp_path / "src")
    program = f"from mambamia_hf.convert.command import main; main({[str(src), str(tmp_path / 'dst')]!r})"
    run_until_killed("mambamia_hf.convert.weights", "save_file", program)
    assert not (tmp_path / "dst").exists()
    convert([str(src), str(tmp_path / "dst")])
    MambaMiaForConditionalGeneration.from_pretrained(tmp_path / "dst")
    assert {path.name for path in tmp_path.iterdir()} == {"src", "dst"}


def test_saving_a_model(tmp_path):
    """Transformers writes into place: what is left is refused, not loaded."""
    tiny_checkpoint(tmp_path / "model")
    program = (
        "from mambamia_hf import MambaMiaForConditionalGeneration\n"
        f"model = MambaMiaForConditionalGeneration.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"model.save_pretrained({str(tmp_path / 'copy')!r})"
    )
    run_until_killed("transformers.modeling_utils", "safe_save_file", program)
    with pytest.raises(OSError, match="is damaged"):
        MambaMiaForConditionalGeneration.from_pretrained(tmp_path / "copy")


def test_encoding(tmp_path, capfd):
    """The memory that is there stays whole, and the next run goes on."""
    tiny_checkpoint(tmp_path / "model")
    videos = [str(write_video(tmp_path / f"{number}.mp4", num_frames=10 + number)) for number in range(3)]
    arguments = [
        "encode",
        *videos,
        "--model",
        str(tmp_path / "model"),
        "-o",
        str(tmp_path / "memories"),
        "--fps",
        "10",
    ]
    program = f"from mambamia_hf.cli.main import main; main({arguments!r})"
    run_until_killed("mambamia_hf.video_memory", "save_file", program, times=2)
    (left,) = (tmp_path / "memories").glob("*.safetensors")
    assert len(VideoMemory.load(left)) == 10
    assert mambamia(arguments) == 0
    assert "0.mp4.safetensors is there already" in capfd.readouterr().err
    names = {path.name for path in (tmp_path / "memories").glob("*.safetensors")}
    assert names == {f"{number}.mp4.safetensors" for number in range(3)}
    assert [len(VideoMemory.load(tmp_path / "memories" / name)) for name in sorted(names)] == [10, 11, 12]


def test_drawing(tmp_path):
    program = (
        "import numpy as np\nfrom mambamia_hf.cli.timeline import plot_timeline\n"
        "picture = np.zeros((8, 8, 3), dtype=np.uint8)\n"
        f"plot_timeline({str(tmp_path / 'plot.png')!r}, [0, 1], [0.1, 0.2], [1], lambda frames: [picture])"
    )
    run_until_killed("matplotlib.figure", "Figure.savefig", program)
    assert not (tmp_path / "plot.png").exists()
