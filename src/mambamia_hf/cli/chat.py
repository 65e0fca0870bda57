"""`mambamia chat`: a conversation about a video."""

import sys
from argparse import ArgumentTypeError, Namespace
from contextlib import closing, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .arguments import share, whole_number
from .console import format_time, handled_ctrl_c, say
from .opening import check_output_path, check_plot_path, describe_evidence, name_bundled_model, open_video


if TYPE_CHECKING:
    from ..chat import VideoChat
    from ..inference import EncodedVideo


PROMPT = "> "
MOST_ROWS = 40
HELP = """\
/frames         the frames that the language model reads, with their Δ
/budget N|R%    read the N frames that matter most, or R % of them; all: every frame; auto: as the checkpoint says
/plot FILE      draw Δ over time and the kept frames, as .png, .svg, .pdf ...
/save FILE      write the memory of the video, to be asked again without the video
/new            begin a new conversation
/help           this list
Ctrl-C stops an answer, Ctrl-D leaves."""


def run(arguments: Namespace) -> int:
    """Answer one line after the other; the exit code is 2 if lines from a pipe or a file could not be answered."""
    with open_video(arguments) as encoded:
        name_bundled_model(arguments)
        return Conversation(encoded, arguments.evidence).run()


class Conversation:
    """Lines from standard input: questions, and commands that begin with a slash.

    Args:
        encoded: the video.
        evidence: whether to name, after each answer, the times of the frames that it attended to most.
    """

    def __init__(self, encoded: "EncodedVideo", evidence: bool = False):
        self.encoded, self.evidence = encoded, evidence
        self.is_interactive = sys.stdin.isatty()

    @property
    def chat(self) -> "VideoChat":
        return self.encoded.chat

    def run(self) -> int:
        """Goes on until standard input ends."""
        if self.is_interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  # gives `input` a history
            say(f"{self._read_frames()}; ask, or see /help.")
        failed, ctrl_c = False, _CtrlC()
        with handled_ctrl_c(ctrl_c.interrupt) if self.is_interactive else nullcontext():
            while True:
                said = "\n(Ctrl-D leaves)"
                try:
                    ctrl_c.arm()
                    line = self._read_line()
                    if line is None:
                        return 2 if failed and not self.is_interactive else 0
                    said = " (stopped)"
                    failed = not self._did(line) or failed
                except KeyboardInterrupt:
                    if not self.is_interactive:
                        raise
                    print(said, flush=True)

    def _read_line(self) -> str | None:
        """The next line; None where standard input ends."""
        try:
            return input(PROMPT if self.is_interactive else "").strip()
        except EOFError:
            if self.is_interactive:
                print()
            return None

    def _did(self, line: str) -> bool:
        """Whether what the line asks for could be done; says why not."""
        try:
            self._do(line)
        except (OSError, ValueError) as error:
            say(f"error: {error}")
            return False
        return True

    def _do(self, line: str) -> None:
        if line.startswith("/"):
            command, _, argument = line[1:].partition(" ")
            actions = {
                "frames": self._frames,
                "budget": self._budget,
                "plot": self._plot,
                "save": self._save,
                "new": self._new,
                "help": lambda _: print(HELP),
            }
            if command not in actions:
                raise ValueError(f"there is no command '/{command}'; /help lists them.")
            actions[command](argument.strip())
        elif line:
            self._ask(line)

    def _ask(self, question: str) -> None:
        """Prints the answer as it comes; where Ctrl-C stops it, what was printed counts."""
        with closing(self.chat.stream(question)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        print(flush=True)
        if self.evidence:
            print(describe_evidence(self.chat.evidence()), flush=True)

    def _read_frames(self) -> str:
        return f"{len(self.chat.kept_frames)} of {len(self.chat.memory)} frames are read"

    def _frames(self, _: str) -> None:
        rows = self.chat.memory.frames()
        kept = [rows[frame] for frame in self.chat.kept_frames]
        shown, which = kept, ""
        if len(kept) > MOST_ROWS:
            largest = sorted(kept, key=lambda row: row["delta"] or 0, reverse=True)[:MOST_ROWS]
            shown, which = sorted(largest, key=lambda row: row["frame"]), f"; the {MOST_ROWS} of the largest Δ:"
        print(f"{self._read_frames()}{which}")
        for row in shown:
            delta = "" if row["delta"] is None else f"  Δ {row['delta']:.4f}"
            print(f"{format_time(row['time'], 1):>10}{delta}")

    def _budget(self, text: str) -> None:
        """Goes on with other frames; what was said stays."""
        selection = self._selection(text)
        if selection is not None:
            chat = self.chat.with_selection(**selection)
            self.encoded = replace(self.encoded, chat=chat)
        print(self._read_frames())

    def _selection(self, text: str) -> dict[str, Any] | None:
        """The arguments of a chat for a budget in words; None for none."""
        frames = len(self.chat.memory)
        if text in ("", "all", "auto"):
            return {"": None, "all": {"delta_threshold": 0.0}, "auto": {}}[text]
        try:
            if text.endswith("%"):
                return {"keep_ratio": share(str(float(text[:-1]) / 100))}
            budget = whole_number(text)
        except (ArgumentTypeError, ValueError):
            raise ValueError(
                f"a budget is a number of frames, as 16, a share above 0 and up to 100, as 25%, all or auto, not "
                f"'{text}'."
            ) from None
        if budget > frames:
            raise ValueError(f"the memory has {frames} frames, so {budget} cannot be read; give a number up to that.")
        return {"keep_frames": budget}

    def _plot(self, path: str) -> None:
        check_plot_path(_given(path, "/plot"))
        if self.encoded.frame_deltas is None:
            raise ValueError("the checkpoint has no temporal layer and so no Δ to plot.")
        from .timeline import draw_timeline

        texts = [message["content"][-1]["text"] for message in self.chat.messages]
        draw_timeline(path, self.encoded, list(zip(texts[::2], texts[1::2], strict=True)))
        say(f"wrote {path}")

    def _save(self, path: str) -> None:
        check_output_path(_given(path, "/save"), "memory")
        self.chat.memory.save(path)
        say(f"wrote {path}")

    def _new(self, _: str) -> None:
        self.encoded = replace(self.encoded, chat=self.chat.fork())


class _CtrlC:
    """Raises `KeyboardInterrupt` once after each `arm()`: what comes while the first is dealt with asks for nothing
    else, and is ignored."""

    def __init__(self) -> None:
        self._is_armed = False

    def arm(self) -> None:
        self._is_armed = True

    def interrupt(self, *_: object) -> None:
        if self._is_armed:
            self._is_armed = False
            raise KeyboardInterrupt


def _given(path: str, command: str) -> str:
    if not path:
        raise ValueError(f"{command} needs the name of a file.")
    return path
