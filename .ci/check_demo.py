"""Checks what `mambamia demo` printed: the answer is the truth."""

import sys
from pathlib import Path


lines = dict(
    line.split(maxsplit=1) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if " " in line
)
if not lines.get("answer") or lines["answer"] != lines.get("truth"):
    sys.exit(f"the demo answers {lines.get('answer')!r}, and {lines.get('truth')!r} is right")
