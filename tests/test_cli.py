"""The program `mambamia`: what it prints, its exit codes, and that bad input leaves one line and nothing else."""

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
import threading

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from PIL import Image
from tiny_model import NUM_ANCHORS, ask, tiny_checkpoint, tiny_config
from transformers import Qwen2Config
from transformers.utils import logging
from video_files import write_cut_video, write_sound, write_video

from mambamia_hf import cli, select_frames
from mambamia_hf.cli import main
from mambamia_hf.needle import write_needle_video


QUESTION = "What shape appears in the video?"
NUM_FRAMES = 16  # 8 seconds at 2 frames a second
DELTA_THRESHOLD = tiny_config().delta_threshold


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of an untrained checkpoint, its model and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, *tiny_checkpoint(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_needle_video(tmp_path_factory.mktemp("video") / "video.mp4", 0, duration=8.0, size=(64, 96)).path


@pytest.fixture(autouse=True)
def restore_logging():
    """The program quietens the libraries for its own process, which here is that of the other tests as well."""
    levels = [(module, module.get_verbosity()) for module in (logging, hub_logging)]
    yield
    for module, level in levels:
        module.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.fixture
def run(checkpoint, capsys):
    """Runs `mambamia ask` with the untrained checkpoint; gives exit code, stdout and stderr."""

    def run_main(*arguments, model=checkpoint[0]):
        capsys.readouterr()  # what making the input has printed
        try:
            code = main(["ask", *map(str, arguments), "--model", str(model)])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run_main


def check_error(result, *fragments):
    code, printed, error = result
    assert code == 2
    assert printed == ""
    assert error.count("\n") == 1 and error.startswith("mambamia: error: "), error
    for fragment in fragments:
        assert str(fragment) in error


def python_answer(model, processor, video, processor_kwargs, generate_kwargs):
    """What the model answers when it is called from Python."""
    return ask(model, processor, video, QUESTION, processor_kwargs, max_new_tokens=256, **generate_kwargs).strip()


@pytest.mark.parametrize(
    ("options", "processor_kwargs", "generate_kwargs", "selection"),
    [
        ([], {}, {}, {"threshold": DELTA_THRESHOLD}),
        (["--keep-frames", "5"], {"keep_frames": 5}, {}, {"keep_frames": 5}),
        (["--keep-ratio", "0.25"], {"keep_ratio": 0.25}, {}, {"keep_ratio": 0.25}),
        (["--keep-frames", "999"], {}, {"delta_threshold": 0.0}, {}),
        (["--delta-threshold", "0.4"], {}, {"delta_threshold": 0.4, "delta_min_frames": 0}, {"threshold": 0.4}),
        (["--keep-all"], {}, {"delta_threshold": 0.0}, {}),
        (["--num-frames", "7", "--keep-frames", "3"], {"num_frames": 7, "keep_frames": 3}, {}, {"keep_frames": 3}),
    ],
)
def test_json_tells_what_the_model_did(run, checkpoint, video, options, processor_kwargs, generate_kwargs, selection):
    code, printed, _ = run(video, QUESTION, "--json", *options)
    assert code == 0
    assert printed.count("\n") == 1
    result = json.loads(printed)
    assert set(result) == {
        "answer",
        "frames",
        "selected_frames",
        "timestamps",
        "frame_deltas",
        "video_tokens",
        "seconds",
    }
    num_frames = processor_kwargs.get("num_frames", NUM_FRAMES)
    assert result["frames"] == num_frames == len(result["frame_deltas"])
    if num_frames == NUM_FRAMES:
        assert result["timestamps"] == pytest.approx([0.5 * number for number in range(NUM_FRAMES)])
    kept = select_frames(torch.tensor([result["frame_deltas"]]), **selection)[0]
    assert result["selected_frames"] == kept.nonzero().flatten().tolist()
    assert result["video_tokens"] == NUM_ANCHORS * len(result["selected_frames"])
    assert list(result["seconds"]) == ["decode", "vision", "compress", "generate"]
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["answer"] == python_answer(*checkpoint[1:], video, processor_kwargs, generate_kwargs)


def test_the_selections_above_differ(run, video):
    kept = {
        option: len(json.loads(run(video, QUESTION, "--json", *option.split())[1])["selected_frames"])
        for option in ("", "--keep-frames=5", "--keep-ratio=0.25", "--delta-threshold=0.4", "--keep-all")
    }
    assert kept["--keep-frames=5"] == 5 and kept["--keep-ratio=0.25"] == 4 and kept["--keep-all"] == NUM_FRAMES
    assert 0 < kept["--delta-threshold=0.4"] < kept[""] < NUM_FRAMES


def test_only_the_answer_is_printed_and_the_plot_written(run, video, tmp_path):
    plot = tmp_path / "timeline.png"
    answer = json.loads(run(video, QUESTION, "--json")[1])["answer"]
    assert answer
    assert run(video, QUESTION, "--plot", plot)[:2] == (0, answer + "\n")
    with Image.open(plot) as picture:
        assert picture.width > picture.height > 1000
        assert len(picture.convert("P", palette=Image.Palette.ADAPTIVE).getcolors()) > 100, "no thumbnails"
    assert list(tmp_path.iterdir()) == [plot]


def test_a_budget_saved_in_the_processor_gives_way(checkpoint, video, tmp_path, capsys):
    _, model, processor = checkpoint
    model.save_pretrained(tmp_path)
    processor.keep_ratio = 0.25
    try:
        processor.save_pretrained(tmp_path)
    finally:
        processor.keep_ratio = None
    for option, expected in (("", 4), ("--keep-all", NUM_FRAMES), ("--keep-frames=9", 9)):
        assert main(["ask", str(video), QUESTION, "--json", "--model", str(tmp_path), *option.split()]) == 0
        assert len(json.loads(capsys.readouterr().out)["selected_frames"]) == expected


def test_a_video_that_is_cut_off_is_answered_with_a_warning(run, tmp_path):
    path = write_cut_video(tmp_path / "cut.mkv", 0.6, num_frames=60)
    code, printed, error = run(path, QUESTION, "--json")
    assert code == 0
    assert 0 < json.loads(printed)["frames"] < 12
    assert error.startswith("mambamia: warning: ") and error.count("\n") == 1 and "cut off" in error


def test_progress_is_shown_on_a_terminal(run, video, monkeypatch):
    _, answer, error = run(video, QUESTION)
    assert error == ""
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    shown = []

    def read_terminal():
        with open(reading, "rb", buffering=0) as terminal, contextlib.suppress(OSError):
            while text := terminal.read(4096):  # raises OSError when the other side is closed
                shown.append(text)

    reader = threading.Thread(target=read_terminal)
    reader.start()
    with open(writing, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run(video, QUESTION)[:2] == (0, answer)
        monkeypatch.undo()
    reader.join()
    shown = b"".join(shown).decode()
    assert "Decoding" in shown and "Looking at the frames" in shown and f"{NUM_FRAMES}/{NUM_FRAMES}" in shown


def make_bad_video(kind, folder):
    path = folder / "video.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("This is not a video.\n" * 50)
    elif kind == "truncated":
        write_cut_video(path, 0.5, num_frames=20)
    elif kind == "sound":
        write_sound(path)
    elif kind == "no frames":
        write_video(path, num_frames=1)
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"moov") - 4])
    elif kind == "image":
        Image.new("RGB", (32, 32)).save(path, "PNG")
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "sound", "no frames", "image", "folder"])
def test_bad_videos(run, tmp_path, kind):
    path = make_bad_video(kind, tmp_path)
    before = sorted(tmp_path.iterdir())
    check_error(run(path, QUESTION, "--plot", tmp_path / "timeline.png"), path.name)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--num-frames", "0"], ["--num-frames", "'0'"]),
        (["--num-frames", "17"], ["17", "16 frames"]),
        (["--keep-frames", "0"], ["--keep-frames", "'0'"]),
        (["--keep-frames", "2.5"], ["--keep-frames", "whole number"]),
        (["--keep-ratio", "0"], ["--keep-ratio", "'0'"]),
        (["--keep-ratio", "1.5"], ["--keep-ratio", "'1.5'"]),
        (["--keep-ratio", "half"], ["--keep-ratio", "'half'"]),
        (["--delta-threshold", "-1"], ["--delta-threshold", "'-1'"]),
        (["--delta-threshold", "nan"], ["--delta-threshold", "'nan'"]),
        (["--keep-ratio", "0.5", "--keep-all"], ["--keep-all", "--keep-ratio"]),
        (["--plot", "timeline.gif"], ["timeline.gif", ".png"]),
        (["--plot", "missing/timeline.png"], ["no folder 'missing'"]),
        (["--unknown"], ["--unknown"]),
    ],
)
def test_bad_options(run, video, tmp_path, monkeypatch, options, fragments):
    monkeypatch.chdir(tmp_path)
    check_error(run(video, QUESTION, *options), *fragments)
    assert not list(tmp_path.iterdir())


def test_a_question_needs_a_video_and_the_reverse(run, video):
    check_error(run(video), "QUESTION")
    check_error(run(video, " "), "QUESTION", "empty")
    check_error(run("", QUESTION), "VIDEO", "empty")


def make_bad_checkpoint(kind, folder, checkpoint):
    path = folder / "model"
    if kind == "other type":
        Qwen2Config().save_pretrained(path)
    elif kind == "empty":
        path.mkdir()
    elif kind != "missing":
        model, processor = checkpoint[1:]
        model.save_pretrained(path)
        if kind != "no processor":
            processor.save_pretrained(path)
        weights = path / "model.safetensors"
        if kind == "no weights":
            weights.unlink()
        elif kind == "cut weights":
            weights.write_bytes(weights.read_bytes()[:10_000])
        elif kind == "lacks weights":
            state = {name: value for name, value in model.state_dict().items() if "temporal" not in name}
            model.save_pretrained(path, state_dict=state)
    return path


@pytest.mark.parametrize(
    ("kind", "fragment"),
    [
        ("missing", "no folder"),
        ("empty", "model type"),
        ("other type", "qwen2"),
        ("no processor", "cannot load"),
        ("no weights", "cannot load"),
        ("cut weights", "cannot load"),
        ("lacks weights", "lacks"),
    ],
)
def test_bad_checkpoints(run, checkpoint, video, tmp_path, kind, fragment):
    path = make_bad_checkpoint(kind, tmp_path, checkpoint)
    plot = tmp_path / "timeline.png"
    check_error(run(video, QUESTION, "--plot", plot, model=path), fragment, path)
    assert not plot.exists()


def test_demo_answers_its_own_question(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--output", str(folder)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["answer"] == lines["truth"]
    assert lines["question"].endswith("?")
    assert lines["tokens"].startswith("64 frames -> 576 patches -> 64 anchors -> 32 video tokens")
    assert sorted(entry.name for entry in folder.iterdir()) == ["needle.mp4", "timeline.png"]


def run_program(*arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mambamia_hf.cli", *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def test_the_program_itself(video):
    code, printed, error = run_program("ask", video, QUESTION, "--json")
    assert code == 0
    assert json.loads(printed)["frames"] == NUM_FRAMES
    assert "bundled checkpoint" in error.splitlines()[0]
    check_error(run_program("ask", video, QUESTION, "--model", "nobody/no-such-model"), "nobody/no-such-model", "Hub")


@pytest.mark.parametrize("other", ["keep_frames", "keep_ratio"])
def test_a_budget_and_a_threshold_from_python(other):
    with pytest.raises(ValueError, match="Give one of keep_frames, keep_ratio and delta_threshold"):
        cli.ask("nowhere", "nowhere.mp4", QUESTION, delta_threshold=0.5, **{other: 1})
