"""`mambamia watch`: an answer per interval, how a source ends, what is saved, and that bad input leaves one line."""

import json
import os
import subprocess
import time

import pytest
from live_sources import WebServer, being_written, pieces, quiet_pipe
from program import COMMAND, check_error, environment, interrupt
from tiny_model import ask as ask_in_python
from video_files import write_video

from mambamia_hf import VideoMemory
from mambamia_hf.cli.watch import clock


QUESTION = "What is shown?"


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A transport stream of 12 seconds, long finished."""
    path = write_video(tmp_path_factory.mktemp("recording") / "recording.ts", num_frames=48, fps=4, key_every=8)
    os.utime(path, (1, 1))
    return path


@pytest.fixture
def watch(program, checkpoint):
    """Runs `mambamia watch` with the untrained checkpoint."""

    def run(source, *arguments):
        return program(
            "watch", source, QUESTION, "--model", checkpoint[0], "--max-new-tokens", 4, "--timeout", 1, *arguments
        )

    return run


def answers(printed):
    return [tuple(line.split("  ", 1)) for line in printed.splitlines()]


def test_an_answer_per_interval_and_one_at_the_end(watch, recording):
    code, printed, error = watch(recording, "--every", "5")
    assert code == 0, error
    assert [time for time, _ in answers(printed)] == ["0:00:05", "0:00:10", "0:00:11"]
    assert (
        error.splitlines()[-1]
        == f"mambamia: '{recording}' has not grown for 1 seconds, so it has ended; that was 0:00:11."
    )


def test_the_last_answer_is_that_for_the_file(watch, recording, checkpoint):
    _, printed, _ = watch(recording, "--every", "100")
    _, model, processor = checkpoint
    expected = ask_in_python(
        model, processor, recording, QUESTION, max_new_tokens=4, delta_threshold=0.0, num_beams=1
    ).strip()
    assert answers(printed) == [("0:00:11", expected)]


def test_json_tells_what_is_held(watch, recording, checkpoint):
    code, printed, error = watch(recording, "--every", "0:05", "--keep-frames", 6, "--json")
    assert code == 0, error
    found = [json.loads(line) for line in printed.splitlines()]
    assert [answer["time"] for answer in found] == [5.0, 10.0, 11.75]
    assert [answer["num_frames"] for answer in found] == [10, 20, 24]
    for answer in found:
        assert (answer["question"], answer["source"], answer["model"]) == (
            QUESTION,
            str(recording),
            str(checkpoint[0]),
        )
        assert len(answer["kept_frames"]) == 6 == len(answer["kept_times"])
        assert answer["kept_frames"][-1] == answer["num_frames"] - 1
        assert max(answer["kept_times"]) < answer["time"] + 1e-6


def test_a_growing_file(watch, recording, tmp_path):
    with being_written(tmp_path / "growing.ts", recording.read_bytes(), pause=0.3) as path:
        code, printed, error = watch(path, "--every", "5")
    assert code == 0, error
    assert [time for time, _ in answers(printed)] == ["0:00:05", "0:00:10", "0:00:11"]
    assert "has not grown for 1 seconds, so it has ended" in error


def test_a_local_stream(watch, recording):
    with WebServer({"/live.ts": pieces(recording.read_bytes())}) as server:
        code, printed, error = watch(
            f"http://me:secret@{server.address}/live.ts?token=t0ken", "--every", "5", "--json"
        )
    assert code == 0, error
    assert [json.loads(line)["time"] for line in printed.splitlines()] == [5.0, 10.0, 11.75]
    assert f"'http://{server.address}/live.ts' has ended" in error
    for secret in ("secret", "t0ken"):
        assert secret not in printed + error


def test_a_stall_leaves_the_answer_so_far_and_the_memory(watch, recording, checkpoint, tmp_path):
    saved = tmp_path / "memory.safetensors"
    with WebServer({"/live.ts": [recording.read_bytes()]}, hangs=True) as server:
        address = f"http://me:secret@{server.address}/live.ts?token=t0ken"
        code, printed, error = watch(address, "--every", "100", "--save", saved)
    assert code == 2
    assert [time for time, _ in answers(printed)] == ["0:00:11"]
    assert "error: nothing has come from" in error.splitlines()[-1]
    memory = VideoMemory.load(saved, checkpoint[1])
    assert len(memory) == 24 and memory.name == f"http://{server.address}/live.ts"
    assert b"secret" not in saved.read_bytes() and b"t0ken" not in saved.read_bytes()


def test_ctrl_c_ends_and_saves_the_memory(recording, checkpoint, tmp_path):
    saved = tmp_path / "memory.safetensors"
    options = ["--model", checkpoint[0], "--max-new-tokens", "4", "--every", "5", "--timeout", "60", "--save", saved]
    with quiet_pipe(tmp_path / "pipe", recording.read_bytes()) as pipe:
        command = [*COMMAND, "watch", pipe, QUESTION, *options]
        with subprocess.Popen(
            list(map(str, command)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            lines = [process.stdout.readline() for _ in range(2)]
            time.sleep(1)  # for the rest of what has come
            interrupt(process)
            printed, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert [line.split()[0] for line in lines] == ["0:00:05", "0:00:10"] and printed == ""
    assert error.splitlines()[-1] == "mambamia: interrupted"
    assert "Traceback" not in error and f"in {saved}" in error
    memory = VideoMemory.load(saved, checkpoint[1])
    assert memory.timestamps[-1] > 10


def test_standard_input(recording, checkpoint):
    options = ["--model", str(checkpoint[0]), "--max-new-tokens", "4", "--every", "100"]
    result = subprocess.run(
        [*COMMAND, "watch", "-", QUESTION, *options],
        env=environment(),
        input=recording.read_bytes(),
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(b"0:00:11  ")
    assert result.stderr.decode().splitlines()[-1] == "mambamia: the standard input has ended; that was 0:00:11."


def test_bad_input(watch, recording, tmp_path):
    (tmp_path / "text.ts").write_text("no video\n" * 100)
    os.utime(tmp_path / "text.ts", (1, 1))
    check_error(*watch(tmp_path / "none.ts"), "no file or device", "none.ts")
    check_error(*watch(tmp_path), "is a folder")
    check_error(*watch(tmp_path / "text.ts"), "cannot be read as a video")
    check_error(*watch("ftp://127.0.0.1/a.ts"), "http, https, rtsp, rtsps")
    check_error(*watch("rtsp://me:secret@127.0.0.1:9/door"), "rtsp://127.0.0.1:9/door")
    check_error(*watch(recording, "--save", tmp_path / "none" / "memory"), "no folder")
    check_error(*watch(recording, "--save", tmp_path), "a folder in the place")


@pytest.mark.parametrize("option", [["--every", "0"], ["--every", "soon"], ["--timeout", "0"], ["--keep-frames", "0"]])
def test_wrong_options(watch, recording, option):
    code, printed, error = watch(recording, *option)
    assert code == 2 and printed == ""
    assert error.startswith("mambamia: error: ") and option[0] in error


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3600, 100 * 3600 + 1)] == [
        "0:00:00",
        "0:00:59",
        "0:01:01",
        "1:00:00",
        "100:00:01",
    ]


def test_the_program_answers_help_without_loading_anything():
    result = subprocess.run([*COMMAND, "watch", "--help"], capture_output=True, text=True, env=environment())
    assert result.returncode == 0 and "--every" in result.stdout
