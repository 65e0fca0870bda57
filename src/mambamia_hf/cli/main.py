"""The program's commands and options, and its exit codes."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .. import __version__
from . import arguments, ask, chat, demo, encode, serve, watch, web
from .console import escape_unprintable, say, short_warnings


# Of each argument its name and its settings; those under one heading other than "" exclude each other.
Options = dict[str, dict[str, dict[str, Any]]]

VIDEO_OR_MEMORY: dict[str, Any] = {
    "metavar": "VIDEO|MEMORY",
    "type": arguments.text,
    "help": "a video file, its URL, a folder of its frames as images, a memory that `mambamia encode` wrote, or - for "
    "a video from standard input",
}
MODEL: dict[str, dict[str, Any]] = {
    "--model": {
        "metavar": "DIR_OR_HUB_ID",
        "type": arguments.text,
        "help": "a MambaMia checkpoint; without it the small bundled one, which knows shapes, digits and colours",
    },
    "--device": {"type": arguments.device, "help": "where to compute, e.g. cpu or cuda:1 (default: a GPU if any)"},
    "--dtype": {
        "choices": ("float32", "bfloat16", "float16"),
        "help": "type of the weights (default: the checkpoint's; float32 on a CPU that is faster with it)",
    },
}
PART: dict[str, dict[str, Any]] = {
    "--start": {
        "metavar": "TIME",
        "type": arguments.seconds,
        "default": 0.0,
        "help": "look at the video from here on, in seconds or h:mm:ss",
    },
    "--end": {
        "metavar": "TIME",
        "type": arguments.seconds,
        "help": "look at the video until here, in seconds or h:mm:ss",
    },
    "--seek-mode": {
        "choices": ("exact", "keyframe"),
        "help": "take the sampled frames, or the key frames nearest to them, which is faster (default: exact, or "
        "as the checkpoint says)",
    },
}
ANSWERS: dict[str, dict[str, Any]] = {
    "--max-new-tokens": {
        "metavar": "N",
        "type": arguments.whole_number,
        "help": "end answers after N tokens (default: as the checkpoint says, or 256)",
    },
    "--evidence": {
        "action": "store_true",
        "help": "name the times of the frames that question and answer attended to most",
    },
}
SAMPLING: Options = {
    "which frames are sampled": {
        "--num-frames": {
            "metavar": "N",
            "type": arguments.whole_number,
            "help": "sample N frames, evenly, or all if there are fewer (default: as --fps, at most 384)",
        },
        "--fps": {
            "metavar": "R",
            "type": arguments.rate,
            "help": "sample R frames per second, at most as many as the checkpoint allows (default: 2, or as the "
            "checkpoint says); images in a folder count as R per second",
        },
    },
}
SELECTION: Options = {
    "which sampled frames the language model reads": {
        "--keep-frames": {
            "metavar": "K",
            "type": arguments.whole_number,
            "help": "keep the K frames that matter most",
        },
        "--keep-ratio": {"metavar": "R", "type": arguments.share, "help": "keep this share of the frames, e.g. 0.5"},
        "--delta-threshold": {
            "metavar": "X",
            "type": arguments.threshold,
            "help": "keep a frame each time Δ has added up to X",
        },
        "--keep-all": {
            "dest": "delta_threshold",
            "action": "store_const",
            "const": 0.0,
            "help": "keep every sampled frame",
        },
    },
}
ASK: Options = {
    "": {
        "video": VIDEO_OR_MEMORY,
        "questions": {
            "metavar": "QUESTION",
            "type": arguments.text,
            "nargs": "+",
            "help": "what to ask about it; several questions are answered one by one, for the price of one video",
        },
        **MODEL,
        **PART,
        **ANSWERS,
        "--plot": {"metavar": "FILE", "help": "draw Δ over time and the kept frames, as .png, .svg, .pdf ..."},
        "--json": {
            "action": "store_true",
            "help": "print a JSON object per question, each on a line of its own, with all that was measured",
        },
    },
    **SAMPLING,
    **SELECTION,
}
CHAT: Options = {"": {"video": VIDEO_OR_MEMORY, **MODEL, **PART, **ANSWERS}, **SAMPLING, **SELECTION}
ENCODE: Options = {
    "": {
        "videos": {
            "metavar": "VIDEO",
            "type": arguments.text,
            "nargs": "+",
            "help": "video files, URLs, or folders of frames as images",
        },
        "-o, --output": {
            "metavar": "FOLDER",
            "type": arguments.text,
            "required": True,
            "help": "where to write the memories, each under its video's name; what is there already is skipped",
        },
        **MODEL,
        **PART,
    },
    **SAMPLING,
}
DEMO: Options = {
    "": {
        "--output": {
            "metavar": "FOLDER",
            "type": arguments.text,
            "default": "mambamia_demo",
            "help": "where to put video and picture (default: mambamia_demo)",
        },
    },
}
WATCH: Options = {
    "": {
        "source": {
            "metavar": "SOURCE",
            "type": arguments.text,
            "help": "a file that may still grow, - for standard input, a pipe, a camera (/dev/video0), or an address "
            "(http, https, rtsp, rtsps)",
        },
        "question": {"metavar": "QUESTION", "type": arguments.text, "help": "what to ask about it, again and again"},
        "--every": {
            "metavar": "TIME",
            "type": arguments.interval,
            "default": 30.0,
            "help": "answer once per so many seconds of the video (default: 30)",
        },
        "--save": {"metavar": "FILE", "help": "at the end, also after Ctrl-C, save the memory for further questions"},
        "--timeout": {
            "metavar": "SECONDS",
            "type": arguments.rate,
            "default": 10.0,
            "help": "how long to wait for something to come (default: 10)",
        },
        "--fps": {
            "metavar": "R",
            "type": arguments.rate,
            "help": "look at R frames per second (default: 2, or as the checkpoint says)",
        },
        "--keep-frames": {
            "metavar": "K",
            "type": arguments.whole_number,
            "default": 256,
            "help": "hold at most K frames, those that matter most (default: 256)",
        },
        **{name: ASK[""][name] for name in ("--model", "--device", "--dtype", "--max-new-tokens")},
        "--json": {"action": "store_true", "help": "print a JSON object per answer, each on a line of its own"},
    },
}
SERVE: Options = {
    "": {
        "--model": ASK[""]["--model"],
        "--host": {"metavar": "NAME", "default": "localhost", "help": "where to listen (default: localhost)"},
        "--port": {
            "metavar": "N",
            "type": arguments.whole_number,
            "default": 8000,
            "help": "where to listen (default: 8000)",
        },
        "options": {"metavar": "OPTION", "nargs": "*", "help": "after --: other options of `transformers serve`"},
    },
}
WEB: Options = {
    "": {
        **MODEL,
        "--host": {
            "metavar": "ADDRESS",
            "type": arguments.text,
            "default": "127.0.0.1",
            "help": "listen there (default: 127.0.0.1, for this machine only); elsewhere the page takes uploads only",
        },
        "--port": {
            "metavar": "N",
            "type": arguments.port,
            "default": 7860,
            "help": "listen at this port, or at a free one for 0 (default: 7860)",
        },
    },
}
# Of each command its function, its options, and what it does.
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int | None], Options, str]] = {
    "ask": (ask.run, ASK, "ask about a video"),
    "chat": (chat.run, CHAT, "talk about a video"),
    "encode": (encode.run, ENCODE, "have videos seen once, and write memories of them that can be asked"),
    "web": (web.run, WEB, "serve a page to open videos, see when they matter and ask about them"),
    "demo": (demo.run, DEMO, "ask about a small video with something hidden in it, and draw a picture of the answer"),
    "watch": (watch.run, WATCH, "ask about a video that is still coming, once per interval"),
    "serve": (serve.run, SERVE, "answer requests in OpenAI's format, by Transformers' own server"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns:
        The exit code: 0; 2 after bad input, of which one line on stderr says what is wrong; 130 after Ctrl-C; 1 where
        nobody reads the output any more.
    """
    escape_unprintable()
    try:
        given, unknown = _build_parser().parse_known_args(argv)
        if unknown:
            given.command.error(f"unrecognized arguments: {' '.join(unknown)}")
        with short_warnings():
            return given.run(given) or 0
    except BrokenPipeError:
        # Python would complain of the same when it flushes stdout at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        # What was half built may complain as it is thrown away; that says nothing to who asked to stop.
        sys.unraisablehook = lambda _: None
        say("interrupted")
        return 130


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mambamia", description="Answers questions about videos of up to hours.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mambamia {__version__}")
    names = "{" + ",".join(COMMANDS) + "}"
    commands = parser.add_subparsers(title="commands", required=True, metavar=names)
    for name, (run, options, purpose) in COMMANDS.items():
        description = f"{purpose[0].upper()}{purpose[1:]}."
        command = commands.add_parser(name, help=purpose, description=description, allow_abbrev=False)
        command.set_defaults(run=run, command=command)
        add_options(command, options)
    return parser


def add_options(parser: argparse.ArgumentParser, options: Options) -> None:
    """Adds the options under their headings to a parser."""
    for heading, group in options.items():
        target = parser.add_argument_group(heading).add_mutually_exclusive_group() if heading else parser
        for option, settings in group.items():
            target.add_argument(*option.split(", "), **settings)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mambamia: error: {message}; see {self.prog} --help.\n")
