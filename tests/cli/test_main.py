"""The program as a process: exit codes, encodings, Ctrl-C, and what it answers before heavy imports."""

import json
import os
import subprocess
import sys

import pytest
from program import COMMAND, check_error, environment, interrupt, run_program
from transformers import Qwen2Config

import mambamia_hf


HEAVY = ("av", "huggingface_hub", "matplotlib", "numpy", "torch", "transformers")
# Runs the program as its entry point does, and tells which of these modules it has imported.
LIGHT = """
import sys
sys.argv[0] = "mambamia"
from mambamia_hf.cli import main
try:
    code = main()
except SystemExit as exit:
    code = exit.code
print([name for name in sys.argv.pop().split(",") if name in sys.modules])
sys.exit(code)
"""


def run_light(*arguments):
    """Runs the program; gives exit code and stderr, after a check that it has imported nothing heavy."""
    script = LIGHT.replace("main()", f"main({list(map(str, arguments))!r})")
    result = subprocess.run(
        [sys.executable, "-c", script, ",".join(HEAVY)], env=environment(), capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == "[]", "imported"
    return result.returncode, result.stderr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with files that can and files that cannot be used."""
    (tmp_path / "video.mp4").write_bytes(b"never read")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "no_images").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "taken.png").mkdir()
    Qwen2Config().save_pretrained(tmp_path / "qwen2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(mambamia_hf.__file__)))
    return tmp_path


BAD_INPUT = [
    ([], "{ask,chat,encode,web,demo,watch,serve}"),
    (["answer"], "answer"),
    (["ask", "video.mp4"], "QUESTION"),
    (["ask", "video.mp4", " "], "QUESTION: is empty"),
    (["ask", "", "Why?"], "MEMORY: is empty"),
    (["ask", "missing.mp4", "Why?"], "no video file 'missing.mp4'"),
    (["ask", "empty.mp4", "Why?"], "'empty.mp4' is empty"),
    (["ask", "no_images", "Why?"], "'no_images' has no images"),
    (["ask", "video.mp4", "Why?", "--model", "../missing"], "no folder '../missing'"),
    (["ask", "video.mp4", "Why?", "--model", "no_images"], "'no_images' has no readable config.json"),
    (["ask", "video.mp4", "Why?", "--model", "damaged"], "'damaged' has no readable config.json"),
    (["ask", "video.mp4", "Why?", "--model", "qwen2"], "type qwen2"),
    (["ask", "video.mp4", "Why?", "--model", "adapter"], "merge it"),
    (["ask", "video.mp4", "Why?", "--plot", "timeline.gif"], "'timeline.gif' has no suffix"),
    (["ask", "video.mp4", "Why?", "--plot", "missing/timeline.png"], "no folder 'missing'"),
    (["ask", "video.mp4", "Why?", "--plot", "taken.png"], "a folder in the place"),
    (["ask", "video.mp4", "Why?", "--start", "20", "--end", "10"], "from 20.0 to 10.0"),
    (["ask", "video.mp4", "Why?", "--num-frames", "0"], "--num-frames: must be a whole number"),
    (["demo", "--output", "video.mp4"], "video.mp4"),
    (["web", "--model", "no_images"], "'no_images' has no readable config.json"),
    (["web", "--port", "65536"], "--port: must be a number from 0 to 65535, not '65536'"),
    (["web", "--host", " "], "--host: is empty"),
]


@pytest.mark.parametrize(("arguments", "fragment"), BAD_INPUT)
def test_bad_input_is_answered_before_anything_heavy_is_imported(folder, arguments, fragment):
    before = sorted(folder.rglob("*"))
    code, error = run_light(*arguments)
    check_error(code, "", error, fragment)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["demo", "--help"], ["--version"]])
def test_help_is_cheap(folder, arguments):
    assert run_light(*arguments) == (0, "")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--num-frames", "2.5"], ["--num-frames", "whole number"]),
        (["--keep-frames", "0"], ["--keep-frames", "'0'"]),
        (["--keep-ratio", "0"], ["--keep-ratio", "'0'"]),
        (["--keep-ratio", "1.5"], ["--keep-ratio", "'1.5'"]),
        (["--keep-ratio", "half"], ["--keep-ratio", "'half'"]),
        (["--keep-ratio", "0.5", "--keep-all"], ["--keep-all", "--keep-ratio"]),
        (["--delta-threshold", "-1"], ["--delta-threshold", "'-1'"]),
        (["--delta-threshold", "nan"], ["--delta-threshold", "'nan'"]),
        (["--fps", "0"], ["--fps", "above 0"]),
        (["--fps", "inf"], ["--fps", "'inf'"]),
        (["--fps", "2", "--num-frames", "8"], ["--fps", "--num-frames"]),
        (["--start", "1:75"], ["--start", "h:mm:ss", "'1:75'"]),
        (["--end", "-1"], ["--end"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "'0'"]),
        (["--seek-mode", "fast"], ["--seek-mode", "keyframe"]),
        (["--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["--device", "gpu"], ["--device", "cuda"]),
        (["--model", ""], ["--model", "empty"]),
        (["--num", "8"], ["--num"]),
        (["--unknown"], ["--unknown"]),
    ],
)
def test_bad_options(ask, video, options, fragments):
    check_error(*ask(video, "Why?", *options), *fragments)


def test_version(program):
    assert program("--version") == (0, f"mambamia {mambamia_hf.__version__}\n", "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_nothing_is_lost_to_an_encoding(checkpoint, video, encoding):
    delta = "Δ" if encoding == "utf-8" else r"\u0394"
    result = run_program("ask", "--help", encoding=encoding)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"draw {delta} over time" in result.stdout

    arguments = ("ask", video, "Δ or é?", "Really?", "--model", checkpoint[0], "--max-new-tokens", "2")
    result = run_program(*arguments, encoding=encoding)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == {"ascii": r"\u0394 or \xe9?", "cp1252": r"\u0394 or é?"}.get(
        encoding, "Δ or é?"
    )
    result = run_program(*arguments, "--json", encoding=encoding)
    assert [json.loads(line)["question"] for line in result.stdout.splitlines()] == ["Δ or é?", "Really?"]

    result = run_program("ask", "Δ.mp4", "Why?", encoding=encoding)
    check_error(result.returncode, result.stdout, result.stderr, f"no video file '{delta}.mp4'")


def test_a_file_name_that_is_no_text_is_named(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.mp4"
    result = subprocess.run([*COMMAND, "ask", name, "Why?"], env=environment(), capture_output=True)
    assert result.returncode == 2
    assert rb"\udcff.mp4'; check the path" in result.stderr


def test_ctrl_c(checkpoint, tmp_path):
    """One line and exit code 130; the file that standard input was copied to is gone."""
    process = subprocess.Popen(
        [*COMMAND, "ask", "-", "Why?", "--model", str(checkpoint[0])],
        env=environment(TMPDIR=str(tmp_path)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # More than a pipe holds: where this returns, the program is reading.
    process.stdin.write(bytes(2**20))
    process.stdin.flush()
    interrupt(process)
    assert (process.returncode, process.stdout.read()) == (130, b"")
    assert process.stderr.read() == b"mambamia: interrupted\n"
    assert not list(tmp_path.iterdir())
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


def test_ctrl_c_while_loading(checkpoint, video):
    reading, writing = os.openpty()
    process = subprocess.Popen(
        [*COMMAND, "ask", str(video), "Why?", "--model", str(checkpoint[0])],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=writing,
    )
    os.close(writing)
    with open(reading, "rb", buffering=0) as terminal:
        shown = b""
        while not shown.endswith(b"loading ...\r\n"):
            shown += terminal.read(1)
        interrupt(process)
        assert process.returncode == 130
        while not shown.endswith(b"mambamia: interrupted\r\n"):  # a terminal may give a line in pieces
            shown += terminal.read(1)
    assert process.stdout.read() == b""
    process.stdout.close()


def test_a_reader_who_leaves_is_no_error(checkpoint, video):
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ["ask", str(video), "Why?", "--model", str(checkpoint[0]), "--max-new-tokens", "2"]
    result = subprocess.run([*COMMAND, *arguments], env=environment(), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")


def test_the_bundled_model_is_named_with_an_answer(video, tmp_path):
    result = run_program("ask", video, "What shape appears in the video?")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr.count("\n") == 1 and "the bundled checkpoint only knows about shapes" in result.stderr
    (tmp_path / "text.mp4").write_text("This is not a video.\n" * 50)
    result = run_program("ask", tmp_path / "text.mp4", "Why?")
    check_error(result.returncode, result.stdout, result.stderr, "text.mp4")


def test_a_model_that_is_nowhere(video):
    result = run_program("ask", video, "Why?", "--model", "nobody/no-such-model")
    check_error(result.returncode, result.stdout, result.stderr, "nobody/no-such-model", "Hub")
