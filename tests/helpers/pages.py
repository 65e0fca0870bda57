"""The blocks of code of the documentation's pages."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


BLOCK = re.compile(r"(?:^<!-- skip: (?P<skip>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    language: str
    code: str
    skip: str | None
    line: int  # of its first line of code in the page
    text: str | None  # the text block right after it


def blocks(page: Path, language: str) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match["language"] == language:
            after = re.match(r"\n+```text\n(.*?)^```$", text[match.end() :], re.M | re.S)
            line = text[: match.start("code")].count("\n") + 1
            yield Block(language, match["code"], match["skip"], line, after and after[1])


def code_with(page: Path, language: str, fragment: str) -> str:
    """The code of the one block with a fragment in it."""
    (code,) = [block.code for block in blocks(page, language) if fragment in block.code]
    return code
