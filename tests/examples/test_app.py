"""The Space in `examples/app`: its card, its requirements, and what it serves where."""

import runpy
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from mambamia_hf import BUNDLED_CHECKPOINT


ROOT = Path(__file__).parents[2]
APP = ROOT / "examples" / "app"


def requirements(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture
def setup_cfg():
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_requirements_are_those_of_the_package_and_its_page(setup_cfg):
    needed = setup_cfg["options"]["install_requires"] + setup_cfg["options.extras_require"]["web"]
    assert requirements((APP / "requirements.txt").read_text(encoding="utf-8")) == requirements(needed)


def test_the_card_says_how_to_run_it(setup_cfg):
    card = yaml.safe_load((APP / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (card["sdk"], card["app_file"], card["license"]) == ("gradio", "app.py", "apache-2.0")
    (gradio,) = requirements(setup_cfg["options.extras_require"]["web"])
    assert Requirement(gradio).specifier.contains(card["sdk_version"])
    assert f"Programming Language :: Python :: {card['python_version']}" in setup_cfg["metadata"]["classifiers"]
    assert len(card["short_description"]) <= 60


@pytest.mark.parametrize(
    ("variables", "checkpoint", "host"),
    [
        ({}, BUNDLED_CHECKPOINT, "127.0.0.1"),
        ({"SPACE_ID": "someone/mambamia"}, BUNDLED_CHECKPOINT, "0.0.0.0"),
        ({"SPACE_ID": "someone/mambamia", "MAMBAMIA_MODEL": "someone/model"}, "someone/model", "0.0.0.0"),
    ],
)
def test_what_is_served_where(monkeypatch, variables, checkpoint, host):
    server = pytest.importorskip("mambamia_hf.web.server", reason="needs the extra 'web'", exc_type=ImportError)
    served = []
    monkeypatch.setattr(server, "serve", lambda *args, **kwargs: served.append((args, kwargs)))
    for name in ("SPACE_ID", "MAMBAMIA_MODEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(APP / "app.py"), run_name="__main__")
    assert served == [((checkpoint,), {"host": host})]
