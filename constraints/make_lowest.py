"""Prints the lowest version of each requirement in `setup.cfg`, as constraints for pip.

python constraints/make_lowest.py > constraints/lowest.txt
"""

import re
from configparser import ConfigParser
from pathlib import Path


def lowest_versions(setup_cfg: Path) -> str:
    """The constraints, one per line, sorted by name."""
    parser = ConfigParser()
    parser.read(setup_cfg, encoding="utf-8")
    texts = [parser["options"]["install_requires"]]
    texts += [text for extra, text in parser["options.extras_require"].items() if extra != "cuda"]
    found = re.findall(r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", "\n".join(texts), flags=re.MULTILINE)
    return "".join(f"{name}=={version}\n" for name, version in sorted(set(found)))


if __name__ == "__main__":
    print(lowest_versions(Path(__file__).parents[1] / "setup.cfg"), end="")
