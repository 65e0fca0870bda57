"""What README and docs/ promise: snippets run and print what the page says, commands exist, links lead somewhere.

Python snippets of a page run in order, in one namespace, in a folder with `video.mp4`. Commands of bash that start
with one of `RUN` run; the options of any other are looked up in its `--help`. After `<!-- skip: REASON -->` a block
does not run, but what it imports must exist. What is printed must equal the comments beside the `print` or right
below the statement, or the block of text below a block of bash.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tokenize
import unicodedata
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from pages import BLOCK, Block, blocks

import mambamia_hf
from mambamia_hf import (
    MambaMiaCompressorConfig,
    MambaMiaConfig,
    MambaMiaModel,
    MambaMiaProcessor,
    MambaMiaVideoProcessor,
)


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "MODEL_CARD.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKING_PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]
RUN = ("mambamia", "python -m needle.generate")


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(blocks(page, language))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where snippets run: what a clone holds, and a video of a star."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ("src", "examples", "benchmarks", "setup.cfg"):
        (folder / path).symlink_to(ROOT / path)
    shutil.copyfile(Path(mambamia_hf.__file__).parent / "demo/needle.mp4", folder / "video.mp4")
    return folder


# Python.


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_python_snippets(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        tree = ast.parse("\n" * (block.line - 1) + block.code, str(page))  # errors name the line of the page
        if block.skip:
            check_imports(tree)
            continue
        comments = comments_by_line(block)
        for statement in tree.body:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(ast.Module([statement], []), str(page), "exec"), namespace)
            expected = expected_output(statement, comments)
            if expected:
                assert printed.getvalue().splitlines() == expected, f"{name(page)}, line {statement.lineno}"


def check_imports(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mambamia_hf"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def expected_output(statement: ast.stmt, comments: dict[int, tuple[int, str]]) -> list[str]:
    """The lines that a statement prints, as comments say; none where no comment does."""
    prints = [node for node in ast.walk(statement) if isinstance(node, ast.Call) and is_print(node)]
    beside = [comments[node.end_lineno][1] for node in prints if node.end_lineno in comments]
    below = []
    while prints and comments.get(statement.end_lineno + 1 + len(below), (1, ""))[0] == 0:
        below.append(comments[statement.end_lineno + 1 + len(below)][1])
    return beside or below


def comments_by_line(block: Block) -> dict[int, tuple[int, str]]:
    """Column and text of every comment, by its line in the page."""
    tokens = tokenize.generate_tokens(io.StringIO(block.code).readline)
    found = [token for token in tokens if token.type == tokenize.COMMENT]
    return {token.start[0] + block.line - 1: (token.start[1], token.string.removeprefix("# ")) for token in found}


def is_print(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "print"


# Bash.


@pytest.mark.parametrize("page", pages_with("bash"), ids=name)
def test_bash_lines(page, folder):
    for block in blocks(page, "bash"):
        output = ""
        for command in commands(block.code):
            if block.skip or not command.removeprefix("PYTHONPATH=examples ").startswith(RUN):
                check_arguments(command)
            else:
                output += run(command, folder)
        if block.text and not block.skip:
            assert output.strip() == block.text.strip(), f"{name(page)}, line {block.line}"


def commands(code: str) -> list[str]:
    lines = code.replace("\\\n", " ").splitlines()
    return [
        command.strip() for line in lines for command in line.split(" && ") if command and not command.startswith("#")
    ]


@functools.cache
def run(command: str, folder: Path) -> str:
    """Stdout of a line of bash in a real process, with the programs of this environment."""
    programs = folder / "programs"
    if not programs.is_dir():
        programs.mkdir()
        path = f'{shlex.quote(str(ROOT / "src"))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
        source = f"PYTHONPATH={path} exec {shlex.quote(sys.executable)}"
        for program, start in {"python": source, "mambamia": f"{source} -m mambamia_hf"}.items():
            (programs / program).write_text(f'#!/bin/sh\n{start} "$@"\n')
            (programs / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def check_arguments(command: str) -> None:
    """Checks a command that does not run: its program and files exist, and its options are options of the program."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"\w+=", words[0]):
        words.pop(0)
    if words[0] in ("export", "find", "hf", "pytest", "transformers", "unzip"):
        return
    if {"lmms_eval", "vllm.entrypoints.openai.api_server"} & set(words):
        return
    if words[:2] == ["pip", "install"]:
        for extra in re.findall(r"\[(\w+)\]", command):
            assert extra in extras(), command
    elif words[0] == "bash" or (words[0] == "python" and words[1] != "-m"):
        assert (ROOT / words[1]).is_file(), command
    else:
        if words[:2] == ["accelerate", "launch"]:
            assert words[2] == "--config_file" and (ROOT / words[3]).is_file(), command
            words = ["python", *words[4:]]
        assert words[0] in ("python", "mambamia"), f"{command}: run, skip or check it"
        if "--" in words:  # the rest is for another program
            words = words[: words.index("--")]
        module, arguments = (words[2], words[3:]) if words[0] == "python" else ("mambamia_hf", words[1:])
        command_name = arguments[0] if words[0] == "mambamia" else "ask"
        for argument in arguments:
            if argument.endswith(".yaml"):
                check_settings(ROOT / argument, module)
        options = {argument for argument in arguments if argument.startswith("--")}
        known = options_of(module, command_name)
        assert options <= known, f"{command}: {options - known}"


def check_settings(file: Path, module: str) -> None:
    settings = {f"--{setting}" for setting in yaml.safe_load(file.read_text(encoding="utf-8"))}
    assert settings <= options_of(module), f"{file.name}: {settings - options_of(module)}"


@functools.cache
def options_of(module: str, command: str = "ask") -> set[str]:
    """The options that `python -m MODULE --help` lists, for `mambamia` those of a command."""
    printed, arguments = io.StringIO(), sys.argv
    sys.argv = [module, *([command] if module == "mambamia_hf" else []), "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = arguments
    return set(re.findall(r"--[\w-]+", printed.getvalue()))


@functools.cache
def extras() -> set[str]:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return set(parser["options.extras_require"])


# Links, files, numbers.


@pytest.mark.parametrize("page", LINKING_PAGES, ids=name)
def test_links_and_files(page):
    text = without_code_blocks(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name(page)} links to {target}"
    if page.name == "CHANGELOG.md":
        return  # names what was there once
    for path in re.findall(r"`(?:python |bash )?((?:src|tests|docs|examples|benchmarks)/[\w./-]+)", text):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"


def without_code_blocks(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_code_blocks(page), re.M):
        kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LNM"]
        found.add("".join(kept).replace(" ", "-"))
    return found


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_seconds_of_an_hour():
    lines = (ROOT / "examples/results/hour.jsonl").read_text(encoding="utf-8").splitlines()
    stages = [json.loads(line)["seconds"] for line in lines]
    once = sum(stages[0][stage] for stage in ("decode", "vision", "compress"))
    seconds = once + sum(stage["generate"] for stage in stages)
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    assert f"take {seconds:.1f} seconds of computing" in " ".join(words)


def test_ablation_tables_are_those_of_the_results():
    """Every row of percentages of docs/results.md stands in what `ablation.report` wrote."""

    def rows(file: str) -> set[tuple[str, ...]]:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        return {tuple(re.findall(r"\d+\.\d ± \d+\.\d", line)) for line in lines if line.count("±") == 4}

    assert rows("docs/results.md") == rows("examples/results/ablation.md")


OPTIONS = {
    "MambaMiaConfig": MambaMiaConfig,
    "MambaMiaCompressorConfig": MambaMiaCompressorConfig,
    "Processor": None,
    "Calls of the model": None,
}


@pytest.mark.parametrize("section", OPTIONS)
def test_options(section):
    """Every option of docs/options.md exists and has the default that stands there."""
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"^## `?{section}`?\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.M)
    assert rows
    for option, default in rows:
        if section == "Calls of the model":
            for method in (MambaMiaModel.forward, MambaMiaModel.get_video_features):
                assert option in inspect.signature(method).parameters
            continue
        if section == "Processor":
            parameters = inspect.signature(MambaMiaProcessor.__init__).parameters
            assert option in parameters or option in MambaMiaVideoProcessor.valid_kwargs.__annotations__
            value = parameters[option].default if option in parameters else getattr(MambaMiaVideoProcessor, option, 0)
        else:
            value = getattr(config_of(OPTIONS[section]), option)
        with contextlib.suppress(SyntaxError, ValueError):  # a default in words
            assert value == ast.literal_eval(default.strip("`")), option


@functools.cache
def config_of(config_class):
    return config_class()


# The model card.

# The file of results of every data set of the card.
CARD_RESULTS = {
    "Needle benchmark, one hour, 384 frames": "needle_hour.json",
    "Needle benchmark, one hour, 384 frames, real backgrounds": "needle_background.json",
}


def test_model_card():
    card = ModelCard.load(ROOT / "MODEL_CARD.md")
    assert card.data.model_name == "MambaMia needle"
    assert {result.dataset_name for result in card.data.eval_results} == set(CARD_RESULTS)
    for result in card.data.eval_results:
        file = ROOT / "examples/results" / CARD_RESULTS[result.dataset_name]
        accuracy = json.loads(file.read_text())["accuracy"]["1.0"][result.metric_name]
        assert result.metric_value == pytest.approx(100 * accuracy, abs=0.05)
    for target in re.findall(r"\]\(([^)\s]+)\)", card.text):
        assert target.startswith("https://"), f"{target} leads nowhere on the Hub"
