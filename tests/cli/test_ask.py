"""`mambamia ask`: what it prints and draws, which videos it takes, and that bad input leaves one line and no file."""

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
from PIL import Image
from program import COMMAND, check_error, environment
from tiny_model import NUM_ANCHORS, tiny_config, tiny_model, tiny_processor
from tiny_model import ask as ask_in_python
from video_files import draw_number, write_cut_video, write_sound, write_video

from mambamia_hf import select_frames
from mambamia_hf.cli.opening import PLOT_FORMATS, check_plot_path


QUESTION = "What shape appears in the video?"
NUM_FRAMES = 16  # of `video`, 8 seconds at 2 per second
DELTA_THRESHOLD = tiny_config().delta_threshold


def ask_json(ask, *arguments, **kwargs):
    """The one object that `ask --json` prints."""
    code, printed, error = ask(*arguments, "--json", **kwargs)
    assert code == 0, error
    assert printed.count("\n") == 1
    return json.loads(printed)


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
        (["--num-frames", "999"], {"num_frames": 16}, {}, {"threshold": DELTA_THRESHOLD}),
        (["--fps", "1"], {"fps": 1.0}, {}, {"threshold": DELTA_THRESHOLD}),
        (["--seek-mode", "keyframe"], {"seek_mode": "keyframe"}, {}, {"threshold": DELTA_THRESHOLD}),
    ],
)
@pytest.mark.filterwarnings("ignore:.* has too few key frames")
def test_json_tells_what_the_model_did(ask, checkpoint, video, options, processor_kwargs, generate_kwargs, selection):
    result = ask_json(ask, video, QUESTION, *options)
    assert list(result) == [
        "question",
        "answer",
        "video",
        "model",
        "timestamps",
        "kept_frames",
        "kept_times",
        "frame_deltas",
        "video_tokens",
        "seconds",
    ]
    assert (result["question"], result["video"], result["model"]) == (QUESTION, str(video), str(checkpoint[0]))
    num_frames = 8 if "--fps" in options else processor_kwargs.get("num_frames", NUM_FRAMES)
    assert len(result["timestamps"]) == num_frames == len(result["frame_deltas"])
    kept = select_frames(torch.tensor([result["frame_deltas"]]), **selection)[0]
    assert result["kept_frames"] == kept.nonzero().flatten().tolist()
    assert result["kept_times"] == [result["timestamps"][frame] for frame in result["kept_frames"]]
    assert result["video_tokens"] == NUM_ANCHORS * len(result["kept_frames"])
    assert list(result["seconds"]) == ["decode", "vision", "compress", "generate"]
    assert all(seconds > 0 for seconds in result["seconds"].values())
    model, processor = checkpoint[1:]
    expected = ask_in_python(
        model, processor, video, QUESTION, processor_kwargs, max_new_tokens=256, **generate_kwargs
    )
    assert result["answer"] == expected.strip()


def test_the_selections_above_differ(ask, video):
    kept = {
        option: len(ask_json(ask, video, QUESTION, *option.split())["kept_frames"])
        for option in ("", "--keep-frames=5", "--keep-ratio=0.25", "--delta-threshold=0.4", "--keep-all")
    }
    assert kept["--keep-frames=5"] == 5 and kept["--keep-ratio=0.25"] == 4 and kept["--keep-all"] == NUM_FRAMES
    assert 0 < kept["--delta-threshold=0.4"] < kept[""] < NUM_FRAMES


def test_floats_are_as_short_as_they_are_exact(ask, video):
    result = ask_json(ask, video, QUESTION)
    assert result["timestamps"] == [0.5 * number for number in range(NUM_FRAMES)]
    assert all(len(str(delta)) <= 12 for delta in result["frame_deltas"])
    assert all(len(str(seconds).partition(".")[2]) <= 6 for seconds in result["seconds"].values())


@pytest.mark.parametrize(
    ("options", "times"),
    [
        (["--start", "2"], [2.0 + 0.5 * number for number in range(12)]),
        (["--end", "0:03"], [0.5 * number for number in range(6)]),
        (["--start", "2.25", "--end", "0:00:03.5"], [2.5, 3.0]),
        (["--start", "2.25", "--end", "3.5", "--num-frames", "3"], [2.0, 2.5, 3.0]),
        (["--start", "2", "--end", "100", "--num-frames", "3"], [3.0, 5.0, 7.0]),
        (["--start", "2", "--end", "4", "--num-frames", "100"], [2.0, 2.5, 3.0, 3.5]),
        (["--start", "1", "--end", "7", "--fps", "0.5"], [2.0, 4.0, 6.0]),
        (["--start", "5", "--end", "5.01"], [5.0]),
    ],
)
def test_a_part_of_a_video(ask, video, options, times):
    assert ask_json(ask, video, QUESTION, *options)["timestamps"] == times


def test_a_part_after_the_end_is_an_error(ask, video):
    check_error(*ask(video, QUESTION, "--start", "0:08"), "8 seconds")


def test_several_questions(ask, video, monkeypatch):
    questions = ["What shape?", "Which colour?", "How often?"]
    single = [ask_json(ask, video, question) for question in questions]
    code, printed, _ = ask(video, *questions, "--json")
    assert code == 0
    together = [json.loads(line) for line in printed.splitlines()]
    assert len({result["answer"] for result in single}) > 1
    for alone, one in zip(single, together, strict=True):
        del alone["seconds"], one["seconds"]
        assert alone == one
    expected = "".join(f"{result['question']}\n{result['answer']}\n\n" for result in single)
    assert ask(video, *questions)[:2] == (0, expected)


def test_max_new_tokens(ask, checkpoint, video):
    for count in (2, 5):
        expected = ask_in_python(*checkpoint[1:], video, QUESTION, max_new_tokens=count).strip()
        assert ask_json(ask, video, QUESTION, "--max-new-tokens", count)["answer"] == expected


def test_dtype(ask, video):
    deltas = [ask_json(ask, video, QUESTION, "--dtype", dtype)["frame_deltas"] for dtype in ("float32", "bfloat16")]
    assert deltas[0] != deltas[1] == pytest.approx(deltas[0], rel=0.1)


def test_a_device_that_is_not_there(ask, video):
    if torch.cuda.device_count() > 7:
        pytest.skip("it is there")
    check_error(*ask(video, QUESTION, "--device", "cuda:7"), "cuda:7")


@pytest.fixture(scope="module")
def frame_folder(tmp_path_factory):
    """The frames of `video` as images, named so that the order of letters is not theirs."""
    folder = tmp_path_factory.mktemp("frames")
    for number in range(NUM_FRAMES):
        Image.fromarray(draw_number(number)).save(folder / f"frame{number}.png")
    (folder / "notes.txt").write_text("no frame")
    return folder


def test_a_folder_of_frames(ask, video, frame_folder, tmp_path):
    from_file = ask_json(ask, video, QUESTION)
    result = ask_json(ask, frame_folder, QUESTION, "--plot", tmp_path / "timeline.png")
    assert result["timestamps"] == from_file["timestamps"]  # both have 2 frames per second
    assert result["frame_deltas"] == pytest.approx(from_file["frame_deltas"], abs=0.05)  # the file's are compressed
    assert (tmp_path / "timeline.png").exists()
    assert ask_json(ask, frame_folder, QUESTION, "--fps", "4", "--end", "1")["timestamps"] == [0.0, 0.25, 0.5, 0.75]


def test_images_of_two_sizes_are_no_video(ask, tmp_path):
    for number, size in enumerate([(32, 32), (48, 32)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    check_error(*ask(tmp_path, QUESTION), "0.png of 32 x 32", "1.png of 48 x 32")


def test_an_image_that_cannot_be_read(ask, tmp_path):
    (tmp_path / "0.png").write_text("no image")
    check_error(*ask(tmp_path, QUESTION), "0.png")


def test_standard_input(ask, checkpoint, video, tmp_path):
    """Also with a picture, for which the video is read once more."""
    plot = tmp_path / "timeline.png"
    command = [*COMMAND, "ask", "-", QUESTION, "--json", "--model", str(checkpoint[0]), "--plot", str(plot)]
    with open(video, "rb") as file:
        result = subprocess.run(command, env=environment(), stdin=file, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    from_file, result = ask_json(ask, video, QUESTION), json.loads(result.stdout)
    assert result.pop("video") == "-" and from_file.pop("video") == str(video)
    assert plot.exists()
    del from_file["seconds"], result["seconds"]
    assert result == from_file

    result = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    check_error(result.returncode, result.stdout, result.stderr, "standard input", "empty")


def test_the_plot_is_written_and_named(ask, video, tmp_path):
    plot = tmp_path / "timeline.png"
    answer = ask_json(ask, video, QUESTION)["answer"]
    assert answer
    assert ask(video, QUESTION, "--plot", plot) == (0, f"{answer}\n", f"mambamia: wrote {plot}\n")
    with Image.open(plot) as picture:
        assert picture.width > picture.height > 1000
    assert list(tmp_path.iterdir()) == [plot]


def test_the_answer_comes_before_a_plot_that_fails(ask, video, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("mambamia_hf.cli.timeline.draw_timeline", fail)
    answer = ask_json(ask, video, QUESTION)["answer"]
    code, printed, error = ask(video, QUESTION, "--plot", tmp_path / "timeline.png")
    assert (code, printed, error) == (2, f"{answer}\n", "mambamia: error: the disk is full\n")


def test_a_model_without_temporal_layer_has_no_plot(ask, video, tmp_path):
    processor = tiny_processor()
    model = tiny_model(
        text_config={"vocab_size": len(processor.tokenizer)},
        compressor_config={"num_temporal_layers": 0},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        delta_threshold=None,
    )
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    result = ask_json(ask, video, QUESTION, "--max-new-tokens", "2", model=tmp_path / "model")
    assert result["frame_deltas"] is None
    assert result["kept_frames"] == list(range(NUM_FRAMES))
    plot = tmp_path / "timeline.png"
    check_error(*ask(video, QUESTION, "--plot", plot, model=tmp_path / "model"), "no temporal layer")


def test_a_budget_saved_in_the_processor_gives_way(ask, checkpoint, video, tmp_path):
    _, model, processor = checkpoint
    model.save_pretrained(tmp_path)
    processor.keep_ratio = 0.25
    try:
        processor.save_pretrained(tmp_path)
    finally:
        processor.keep_ratio = None
    for option, expected in (("", 4), ("--keep-all", NUM_FRAMES), ("--keep-frames=9", 9)):
        assert len(ask_json(ask, video, QUESTION, *option.split(), model=tmp_path)["kept_frames"]) == expected


def test_a_video_that_is_cut_off_is_answered_with_a_warning(ask, tmp_path):
    path = write_cut_video(tmp_path / "cut.mkv", 0.6, num_frames=60)
    code, printed, error = ask(path, QUESTION, "--json", "--plot", tmp_path / "timeline.png")
    assert code == 0
    assert 0 < len(json.loads(printed)["timestamps"]) < 12
    warning, wrote = error.splitlines()
    assert warning.startswith("mambamia: warning: ") and "cut off" in warning and "wrote" in wrote


def test_progress_is_shown_on_a_terminal(ask, video, monkeypatch):
    _, answer, error = ask(video, QUESTION)
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
        assert ask(video, QUESTION)[:2] == (0, answer)
        monkeypatch.undo()
    reader.join()
    shown = b"".join(shown).decode()
    assert shown.startswith("mambamia: loading ...")
    assert "Looking at the frames" in shown and f"{NUM_FRAMES}/{NUM_FRAMES}" in shown


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
def test_bad_videos(ask, tmp_path, kind):
    path = make_bad_video(kind, tmp_path)
    before = sorted(tmp_path.iterdir())
    check_error(*ask(path, QUESTION, "--plot", tmp_path / "timeline.png"), path.name)
    assert sorted(tmp_path.iterdir()) == before


def make_bad_checkpoint(kind, folder, checkpoint):
    path = folder / "model"
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
    elif kind == "adapter beside the model":
        (path / "adapter_config.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    ("kind", "fragment"),
    [
        ("no processor", "cannot load"),
        ("no weights", "cannot load"),
        ("cut weights", "cannot load"),
        ("lacks weights", "lacks"),
        ("adapter beside the model", "merge it"),
    ],
)
def test_bad_checkpoints(ask, checkpoint, video, tmp_path, kind, fragment):
    path = make_bad_checkpoint(kind, tmp_path, checkpoint)
    plot = tmp_path / "timeline.png"
    check_error(*ask(video, QUESTION, "--plot", plot, model=path), fragment, path)
    assert not plot.exists()


@pytest.mark.parametrize("name", ["timeline", "text.txt/timeline.png", "timeline.jpeg.exe"])
def test_plots_that_cannot_be_written_are_refused(tmp_path, name):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match="suffix|no folder"):
        check_plot_path(tmp_path / name)


@pytest.mark.parametrize("suffix", [*PLOT_FORMATS, "PNG"])
def test_a_good_plot_path_is_left_untouched(tmp_path, suffix):
    path = tmp_path / f"timeline.{suffix}"
    check_plot_path(path)
    assert not list(tmp_path.iterdir())
    path.write_text("of before")
    check_plot_path(path)
    assert path.read_text() == "of before"
