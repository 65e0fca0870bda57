"""Records in LLaVA's format, and the reports of what was done with them."""

import json
from pathlib import Path


def record(name: str, *texts: str, **media) -> dict:
    """A conversation of these turns, a question first."""
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"id": name, **media, "conversations": turns}


# Of the media that the fixture `media_folder` has; the last three cannot be read.
VIDEO = record("video", "<video>\nWhat is shown?", "A number.", video="a.mp4")
IMAGE = record("image", "<image>\nWhat is shown?", "Another number.", image="a.png")
TEXT = record("text", "Hello.", "Hi!", "Who is there?", "Me.")
MIXED = record("mixed", "Is <image> in <video> or in <video>?", "In neither.", image="a.png", video=["a.mp4", "b.mp4"])
BROKEN = record("broken", "<video>\nWhat?", "Nothing.", video="broken.mp4")
CUT = record("cut", "<video>\nWhat?", "Nothing.", video="cut.mp4")
MISSING = record("missing", "<image>\nWhat?", "Nothing.", image="missing.png")


def reported(report: Path) -> list[tuple[str, str]]:
    """Samples and events that a collator has written to a file."""
    lines = report.read_text().splitlines() if report.exists() else []
    return [(note["sample"], note["event"]) for note in map(json.loads, lines)]


def arguments(**settings) -> list[str]:
    """Settings as a command line."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]
