"""Checks what `mambamia demo` printed: the answer is the truth."""

import sys
from pathlib import Path


lines = dict(
    line.split(maxsplit=1) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines() if " " in line
)
answer, truth = lines.get("answer", ""), lines.get("truth", "").partition(" (of ")[0]
if not answer or answer != truth:
    sys.exit(f"the demo answers {answer!r}, and {truth!r} is right")
