"""`mambamia chat`: on a terminal and in a pipe, what it prints, stops, draws and saves, and that nothing is lost."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from PIL import Image
from program import COMMAND, environment, run_program

from mambamia_hf.chat import VideoChat
from mambamia_hf.video_memory import VideoMemory


QUESTIONS = ["What shape appears?", "Which colour is it?"]
OPTIONS = ["--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def answers(checkpoint, video):
    """To the questions as one conversation, as from Python."""
    chat = VideoChat(*checkpoint[1:], video, max_new_tokens=8)
    return [chat.ask(question) for question in QUESTIONS]


@pytest.fixture
def endless_checkpoint(checkpoint, tmp_path):
    """Its answers do not end before they are stopped."""
    folder = shutil.copytree(checkpoint[0], tmp_path / "endless")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 10**6
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def piped(checkpoint, source, lines, *options):
    arguments = ("chat", source, "--model", checkpoint[0], *OPTIONS, *options)
    return run_program(*arguments, input="\n".join(lines) + "\n")


def test_questions_from_a_pipe(checkpoint, video, answers):
    result = piped(checkpoint, video, [QUESTIONS[0], "", QUESTIONS[1]])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)


def test_commands(checkpoint, video, answers, tmp_path):
    memory, plot = tmp_path / "video.safetensors", tmp_path / "timeline.png"
    lines = ["/budget", "/budget 3", "/frames", QUESTIONS[0], "/budget 25%", "/budget all", "/new", "/budget auto"]
    result = piped(checkpoint, video, [*lines, QUESTIONS[0], f"/plot {plot}", f"/save {memory}", "/help"])
    assert result.returncode == 0
    printed = result.stdout.splitlines()
    read = [int(match[1]) for line in printed if (match := re.fullmatch(r"(\d+) of 16 frames are read:?", line))]
    auto = read[0]
    assert 0 < auto < 16 and read == [auto, 3, 3, 4, 16, auto]
    rows = [line.split() for line in printed[3:6]]
    assert [row[1] for row in rows] == ["Δ"] * 3 and rows == sorted(rows)
    assert answers[0] in printed and "/budget N|R%" in result.stdout
    assert result.stderr.splitlines() == [f"mambamia: wrote {plot}", f"mambamia: wrote {memory}"]
    with Image.open(plot) as picture:
        assert picture.width > 1000
    assert len(VideoMemory.load(memory, *checkpoint[1:])) == 16
    again = piped(checkpoint, memory, [QUESTIONS[0], f"/plot {plot}"])
    assert again.stdout == f"{answers[0]}\n"


BAD_LINES = {
    "/frame": "no command '/frame'; /help lists them",
    "/budget 17": "the memory has 16 frames, so 17 cannot be read",
    "/budget 0": "a budget is a number of frames",
    "/budget half": "not 'half'",
    "/budget 101%": "not '101%'",
    "/plot": "/plot needs the name of a file",
    "/plot timeline.gif": "'timeline.gif' has no suffix",
    "/save": "/save needs the name of a file",
    "/save missing/video.safetensors": "no folder 'missing'",
    "What is <|video_pad|>?": "leave it out",
    "Why? " * 300: "would not fit",
}


def test_what_cannot_be_done_is_said_and_nothing_is_lost(checkpoint, video, answers, tmp_path):
    lines = [QUESTIONS[0], *BAD_LINES, QUESTIONS[1]]
    result = piped(checkpoint, video, lines)
    assert result.returncode == 2
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)
    errors = result.stderr.splitlines()
    assert len(errors) == len(BAD_LINES)
    for error, fragment in zip(errors, BAD_LINES.values(), strict=True):
        assert error.startswith("mambamia: error: ") and fragment in error


def test_evidence(checkpoint, video, answers):
    result = piped(checkpoint, video, [QUESTIONS[0]], "--evidence")
    answer, evidence = result.stdout.splitlines()
    assert answer == answers[0]
    assert re.fullmatch(r"attends most to (0:0\d\.\d \(\d+%\)(, )?){3}", evidence)


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *arguments):
        self.screen, terminal = pty.openpty()
        command = [*COMMAND, *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            env=environment(TERM="dumb"),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self.shown = ""

    def wait_for(self, text: str) -> str:
        """What is shown up to a text, that text included."""
        deadline = time.monotonic() + 120
        while text not in self.shown:
            assert self._is_ready(deadline - time.monotonic()), self.shown
            self._read()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def wait_for_an_answer(self, question: str) -> None:
        """Until its first piece is shown."""
        self.wait_for(f"{question}\r\n")
        if not self.shown:
            assert self._is_ready(120)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C until a text is shown: Python overlooks one that comes just before `input` begins to wait."""
        self._repeat_until(self.interrupt, text)

    def type_until(self, line: str, text: str) -> None:
        """Types a line until a text is shown: a Ctrl-C that is still on its way clears the first."""
        self._repeat_until(lambda: self.type(line), text)

    def _repeat_until(self, action: Callable[[], None], text: str) -> None:
        end = time.monotonic() + 120
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            action()
            again = time.monotonic() + 5
            while text not in self.shown and self._is_ready(again - time.monotonic()):
                self._read()
        self.wait_for(text)

    def _is_ready(self, seconds: float) -> bool:
        return bool(select.select([self.screen], [], [], max(seconds, 0))[0])

    def _read(self) -> None:
        try:
            self.shown += os.read(self.screen, 4096).decode(errors="replace")
        except OSError:  # Linux's way to say that no program has the terminal any more
            raise EOFError(f"The program has ended: {self.shown}") from None


def test_on_a_terminal(endless_checkpoint, video):
    """Ctrl-C stops an answer and the conversation goes on, up calls back what was asked, Ctrl-D leaves."""
    terminal = Terminal("chat", video, "--model", endless_checkpoint, "--max-new-tokens", "100000")
    terminal.wait_for("frames are read; ask, or see /help.")
    terminal.wait_for("> ")
    terminal.type(f"{QUESTIONS[0]}\n")
    terminal.wait_for_an_answer(QUESTIONS[0])
    terminal.interrupt_until("(stopped)")
    terminal.wait_for("> ")
    terminal.type("\x1b[A\n")  # the last line again
    terminal.wait_for_an_answer(QUESTIONS[0])
    terminal.interrupt_until("(stopped)")
    terminal.wait_for("> ")
    terminal.interrupt_until("(Ctrl-D leaves)")
    terminal.wait_for("> ")
    terminal.type("/budget 99\n")
    terminal.wait_for("the memory has 16 frames")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=120) == 0
    os.close(terminal.screen)


def test_no_number_of_interrupts_ends_a_conversation(endless_checkpoint, video):
    terminal = Terminal("chat", video, "--model", endless_checkpoint, "--max-new-tokens", "100000")
    terminal.wait_for("see /help.")
    terminal.wait_for("> ")
    for _ in range(3):
        terminal.type(f"{QUESTIONS[0]}\n")
        terminal.wait_for_an_answer(QUESTIONS[0])
        for _ in range(60):
            terminal.interrupt()
            time.sleep(0.002)
        terminal.interrupt_until("(stopped)")
        terminal.type_until("/budget 3\n", "3 of 16 frames are read\r\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=120) == 0
    os.close(terminal.screen)


def test_the_bundled_model_is_named(video):
    result = run_program("chat", video, input="/frames\n")
    assert result.returncode == 0
    assert "the bundled checkpoint only knows about shapes" in result.stderr


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--num-frames", "3"], "leave out num_frames"),
        (["--seek-mode", "keyframe"], "leave out seek_mode"),
        (["--start", "20"], "the video ends after 8 seconds"),
    ],
)
def test_options_that_a_memory_cannot_follow(ask, checkpoint, video, tmp_path, options, fragment):
    path = tmp_path / "video.safetensors"
    checkpoint[1].encode_video(video, checkpoint[2]).save(path)
    code, printed, error = ask(path, QUESTIONS[0], *options)
    assert (code, printed) == (2, "") and fragment in error and error.count("\n") == 1


def test_a_part_of_a_memory(ask, checkpoint, video, tmp_path):
    path = tmp_path / "video.safetensors"
    checkpoint[1].encode_video(video, checkpoint[2]).save(path)
    for options, times in ((["--start", "2", "--end", "3.2"], [2.0, 2.5, 3.0]), (["--end", "1"], [0.0, 0.5])):
        code, printed, error = ask(path, QUESTIONS[0], "--json", *options)
        assert code == 0, error
        assert json.loads(printed)["timestamps"] == times
