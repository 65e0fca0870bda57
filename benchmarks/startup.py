"""How long a fresh process takes to import the package, beside a Transformers model, and to answer a command line.

python benchmarks/startup.py
"""

import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

from measure import bars, median_seconds, report


IMPORTS = {
    "import mambamia_hf": "mambamia_hf",
    "import of LLaVA-OneVision's module": "transformers.models.llava_onevision.modeling_llava_onevision",
}
COMMAND_LINES = {
    "mambamia --help": ["--help"],
    "mambamia ask --help": ["ask", "--help"],
    "mambamia ask video.mp4 (no question)": ["ask", "video.mp4"],
    "mambamia ask missing.mp4 Why? (no such file)": ["ask", "missing.mp4", "Why?"],
    "mambamia ask . Why? (no images in the folder)": ["ask", ".", "Why?"],
    "mambamia ask video.mp4 Why? --plot timeline.gif": ["ask", "video.mp4", "Why?", "--plot", "timeline.gif"],
    "mambamia ask video.mp4 Why? --model ./missing": ["ask", "video.mp4", "Why?", "--model", "./missing"],
    "mambamia ask video.mp4 Why? --keep-ratio 2": ["ask", "video.mp4", "Why?", "--keep-ratio", "2"],
    "mambamia answer (no such command)": ["answer"],
}


def run(command: list[str], returncode: int):
    completed = subprocess.run(command, capture_output=True, text=True)
    if completed.returncode != returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {completed.returncode}: {completed.stderr}")


def main():
    program = str(Path(sysconfig.get_path("scripts")) / "mambamia")
    imports = {name: partial(run, [sys.executable, "-c", f"import {module}"], 0) for name, module in IMPORTS.items()}
    command_lines = {
        name: partial(run, [program, *arguments], 0 if "--help" in arguments else 2)
        for name, arguments in COMMAND_LINES.items()
    }
    seconds = median_seconds({**imports, **command_lines}, runs=7)
    ours, theirs = (seconds[name] for name in IMPORTS)
    rows = [{"process": name, "seconds": value} for name, value in seconds.items()]
    rows[0] |= {"above the other import": ours - theirs, "times the other import": ours / theirs}
    report("startup", rows)
    bars("startup", "seconds", seconds)


if __name__ == "__main__":
    main()
