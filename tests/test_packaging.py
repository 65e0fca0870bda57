"""What a user and a type checker see of the package before any of its classes is used."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import transformers

import mambamia_hf
from mambamia_hf import versions


ROOT = Path(__file__).parents[1]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_names_are_listed_and_others_are_errors():
    assert set(mambamia_hf.__all__) <= set(dir(mambamia_hf))
    assert all(getattr(mambamia_hf, name) is not None for name in mambamia_hf.__all__)
    with pytest.raises(ImportError):
        from mambamia_hf import typo  # noqa: F401


def test_the_version_stands_in_one_place():
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    assert parser["metadata"]["version"] == "attr: mambamia_hf.__version__"
    assert f"## {mambamia_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {mambamia_hf.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_tested_versions_are_those_that_pip_may_take():
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    first, last = versions.TESTED_TRANSFORMERS
    major, minor = last.split(".")
    assert f"transformers>={first},<{major}.{int(minor) + 1}" in parser["options"]["install_requires"]


def test_importing_the_package_is_cheap_and_registers_all_the_same():
    code = """
import sys
import mambamia_hf
assert not {"torch", "transformers", "matplotlib"} & set(sys.modules), "nothing heavy yet"
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
config = AutoConfig.from_pretrained(mambamia_hf.BUNDLED_CHECKPOINT)
assert type(config) is mambamia_hf.MambaMiaConfig, type(config)
assert mambamia_hf.MambaMiaForConditionalGeneration in AutoModelForImageTextToText._model_mapping.values()
import transformers
assert "_Registers" not in repr(transformers.__spec__.loader)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module",
    ["auto", "configuration_mambamia", "convert", "frame_selection", "inference", "modeling_compressor", "training"]
    + ["processing_mambamia", "training.records", "versions", "video_decoding", "cli", "files"],
)
def test_any_module_may_come_first(module):
    code = f"""
import sys
import mambamia_hf.{module}
from transformers import AutoConfig, AutoProcessor
import mambamia_hf
assert type(AutoConfig.from_pretrained(mambamia_hf.BUNDLED_CHECKPOINT)) is mambamia_hf.MambaMiaConfig
assert type(AutoProcessor.from_pretrained(mambamia_hf.BUNDLED_CHECKPOINT)) is mambamia_hf.MambaMiaProcessor
assert sys.modules["mambamia_hf.{module}"] is mambamia_hf.{module}, "no module is there twice"
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_looking_for_a_module_is_no_import():
    code = """
from importlib.util import find_spec
import mambamia_hf
assert find_spec("transformers") and find_spec("mambamia_hf.training")
from transformers import AutoConfig
assert type(AutoConfig.from_pretrained(mambamia_hf.BUNDLED_CHECKPOINT)) is mambamia_hf.MambaMiaConfig
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["training", "training.features", "convert"])
def test_modules_run_as_programs(module):
    result = subprocess.run([sys.executable, "-m", f"mambamia_hf.{module}", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr


def test_transformers_may_come_first():
    code = """
import transformers, mambamia_hf
assert type(transformers.AutoConfig.from_pretrained(mambamia_hf.BUNDLED_CHECKPOINT)).__name__ == "MambaMiaConfig"
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_a_script_of_any_name_gets_the_registration(tmp_path):
    script = tmp_path / "mambamia"
    script.write_text(
        "import mambamia_hf\nfrom transformers import AutoConfig\n"
        "print(type(AutoConfig.from_pretrained(mambamia_hf.BUNDLED_CHECKPOINT)).__name__)\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.stdout.strip() == "MambaMiaConfig", result.stderr


@pytest.mark.parametrize(
    ("installed", "warns"), [("5.19.0", True), ("5.20.2", False), ("5.24.9", False), ("5.25.0", True)]
)
def test_an_untested_transformers_is_named_once(monkeypatch, installed, warns):
    messages = []
    monkeypatch.setattr(versions.transformers, "__version__", installed)
    monkeypatch.setattr(versions.logger, "warning", lambda message, *args: messages.append(message % args))
    versions.warn_if_untested.cache_clear()
    for _ in range(2):
        versions.warn_if_untested()
    monkeypatch.undo()
    versions.warn_if_untested.cache_clear()
    assert len(messages) == warns
    if warns:
        assert installed in messages[0] and "5.20 to 5.24" in messages[0]


def test_the_installed_transformers_is_a_tested_one():
    first, last = (tuple(map(int, version.split("."))) for version in versions.TESTED_TRANSFORMERS)
    assert first <= tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2])) <= last


def test_no_path_of_a_machine_and_no_registry_is_in_the_repository():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("this is no checkout")
    forbidden = re.compile(r"/(?:root|home|work|tmp)/[\w.]+/|pypi\.org/simple|files\.pythonhosted")
    for name in filter(None, files.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".cfg", ".toml", ".json", ".yaml", ".sh", ".txt") and path != Path(__file__):
            found = forbidden.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found.group()}"
