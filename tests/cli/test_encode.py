"""`mambamia encode`: memories of many videos, each written once and whole, and answers from them."""

import json
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
from program import COMMAND, check_error, environment, interrupt, run_program
from safetensors.numpy import save_file
from video_files import write_video

from mambamia_hf import MambaMiaForConditionalGeneration
from mambamia_hf.memory_writer import MemoryWriter
from mambamia_hf.video_memory import VideoMemory


QUESTION = "What shape appears in the video?"


@pytest.fixture
def encode(program, checkpoint):
    return lambda *arguments, model=checkpoint[0]: program("encode", *arguments, "--model", model)


@pytest.fixture
def another_checkpoint(checkpoint, tmp_path):
    """A folder with a model of other weights."""
    folder = tmp_path / "model"
    torch.manual_seed(1)
    MambaMiaForConditionalGeneration(checkpoint[1].config).save_pretrained(folder)
    checkpoint[2].save_pretrained(folder)
    return folder


@pytest.fixture
def videos(video, tmp_path):
    """Two videos and a file that is none."""
    other = write_video(tmp_path / "other.mkv", num_frames=10, fps=2)
    (tmp_path / "text.mp4").write_text("This is not a video.\n" * 50)
    return [video, tmp_path / "text.mp4", other]


def test_memories_are_written_and_asked(encode, ask, checkpoint, videos, tmp_path):
    """One bad file is reported, and the others go on."""
    folder = tmp_path / "memories" / "new"
    code, printed, error = encode(*videos, "-o", folder)
    assert code == 2
    assert error.count("\n") == 1 and "text.mp4" in error
    paths = [folder / "video.mp4.safetensors", folder / "other.mkv.safetensors"]
    assert printed.splitlines() == list(map(str, paths))
    assert sorted(folder.iterdir()) == sorted(paths)
    for source, path in zip((videos[0], videos[2]), paths, strict=True):
        code, from_file, _ = ask(source, QUESTION, "--json", "--keep-frames", "5", "--evidence")
        code, from_memory, _ = ask(path, QUESTION, "--json", "--keep-frames", "5", "--evidence")
        from_file, from_memory = json.loads(from_file), json.loads(from_memory)
        assert list(from_memory["seconds"]) == ["load", "generate"]
        for name in ("seconds", "video"):
            assert from_file.pop(name) != from_memory.pop(name)
        attention = [[row.pop("attention") for row in result["evidence"]] for result in (from_file, from_memory)]
        assert attention[0] == pytest.approx(attention[1])
        assert from_memory == from_file
        assert [row["time"] for row in from_memory["evidence"]] != []


def test_what_is_there_is_not_done_again(encode, checkpoint, videos, tmp_path, monkeypatch):
    folder = tmp_path / "memories"
    assert encode(videos[0], "-o", folder)[0] == 0
    path = folder / "video.mp4.safetensors"
    before = path.stat()
    code, printed, error = encode(videos[0], videos[2], "--output", folder)
    assert code == 0
    assert error == f"mambamia: {path} is there already\n" and len(printed.splitlines()) == 2
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_cut_memory_is_written_again(encode, checkpoint, videos, tmp_path):
    assert encode(videos[0], "-o", tmp_path)[0] == 0
    path = tmp_path / "video.mp4.safetensors"
    whole, memory = path.read_bytes(), VideoMemory.load(path)
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        code, _, error = encode(videos[0], "-o", tmp_path)
        assert code == 0 and "cut off" in error
        assert torch.equal(VideoMemory.load(path, *checkpoint[1:]).anchors, memory.anchors)


def test_another_file_in_its_place_stays(encode, checkpoint, another_checkpoint, videos, tmp_path):
    """A memory of another model or with other options, one that was changed, and something else."""
    path = tmp_path / "video.mp4.safetensors"

    def check(*options, model=checkpoint[0], fragments):
        content = path.read_bytes()
        code, printed, error = encode(videos[0], "-o", tmp_path, *options, model=model)
        check_error(code, printed, error, "name another folder, or delete it", *fragments)
        assert path.read_bytes() == content

    assert encode(videos[0], "-o", tmp_path)[0] == 0
    check("--num-frames", "3", fragments=["sampling"])
    check(model=another_checkpoint, fragments=["weights"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    check(fragments=["damaged"])
    save_file({"weight": np.zeros(3)}, path)
    check(fragments=["video memory"])


def test_ctrl_c_leaves_whole_memories_only(checkpoint, video, tmp_path):
    """And the next call goes on."""
    videos = [video, *(write_video(tmp_path / f"{number}.mp4", num_frames=200, fps=2) for number in range(6))]
    folder = tmp_path / "memories"
    arguments = ["encode", *map(str, videos), "-o", str(folder), "--model", str(checkpoint[0])]
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip().endswith("video.mp4.safetensors")
    interrupt(process)
    assert process.returncode == 130 and process.stderr.read().endswith("mambamia: interrupted\n")
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    left = sorted(folder.iterdir())
    assert 1 <= len(left) < 7 and all(VideoMemory.load(path) for path in left)
    result = run_program(*arguments)
    assert result.returncode == 0
    assert result.stderr.count("is there already") == len(left)
    assert len(list(folder.iterdir())) == 7


class InterruptedFinaliser:
    """Ctrl-C comes while it is thrown away, where Python drops the exception."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_is_not_lost(encode, videos, tmp_path, monkeypatch):
    whole = MemoryWriter.write

    def write(self, *arguments):
        InterruptedFinaliser()
        return whole(self, *arguments)

    monkeypatch.setattr(MemoryWriter, "write", write)
    code, printed, error = encode(*videos, "-o", tmp_path)
    assert code == 130 and printed.count("\n") == 1 and error.endswith("mambamia: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("names", "fragment"),
    [(["missing.mp4"], "no video file 'missing.mp4'"), (["a/x.mp4", "b/x.mp4"], "have one name")],
)
def test_bad_names(encode, tmp_path, monkeypatch, names, fragment):
    monkeypatch.chdir(tmp_path)
    check_error(*encode(*names, "-o", "memories"), fragment)


def test_memories_that_cannot_be_asked(ask, checkpoint, another_checkpoint, video, tmp_path):
    path = tmp_path / "video.safetensors"
    checkpoint[1].encode_video(video, checkpoint[2]).save(path)
    content = path.read_bytes()
    check_error(*ask(path, QUESTION, model=another_checkpoint), "weights of the vision tower")
    for name, bad in (("cut.safetensors", content[: len(content) // 2]), ("empty.safetensors", b"")):
        (tmp_path / name).write_bytes(bad)
        check_error(*ask(tmp_path / name, QUESTION), name)
    (tmp_path / "no_suffix").write_bytes(content)
    assert ask(tmp_path / "no_suffix", QUESTION)[0] == 0
    save_file({"weight": np.zeros(3)}, tmp_path / "weights.safetensors")
    check_error(*ask(tmp_path / "weights.safetensors", QUESTION), "weights.safetensors")
    check_error(*ask(path), "QUESTION")


def test_the_plot_of_a_memory(ask, checkpoint, video, tmp_path):
    path, plot = tmp_path / "video.safetensors", tmp_path / "timeline.png"
    checkpoint[1].encode_video(video, checkpoint[2]).save(path)
    assert ask(path, QUESTION, "--plot", plot)[0] == 0
    assert plot.stat().st_size > 10000 and os.listdir(tmp_path) != []
