"""Lets pages link to files outside docs/, as on GitHub.

README is the first page, images come along, and what would lead to another file of the repository is its name.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[1]
IMAGES = (".png", ".svg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\((?!https?:|#)", "](../", readme)))
    for folder in ("benchmarks/results", "examples/results"):
        for image in sorted((ROOT / folder).iterdir()):
            if image.suffix in IMAGES:
                path = image.relative_to(ROOT).as_posix()
                files.append(File.generated(config, path, abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: Any) -> str:
    def resolve(match: re.Match) -> str:
        text, path = match[1], match[2]
        if path.startswith("docs/") or path.endswith(IMAGES):
            return f"[{text}]({path.removeprefix('docs/')})"
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    return re.sub(r"\[([^\]]*)\]\(\.\./([^)\s]+)\)", resolve, markdown)
