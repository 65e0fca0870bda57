"""Fetches Transformers' own common tests, of the installed version, from its source distribution.

`use_transformers_tests()` makes `from tests.test_modeling_common import ModelTesterMixin` and the like work. The files
go into a cache folder beside this one (or `MAMBAMIA_TRANSFORMERS_TESTS`); they are no part of the project.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import transformers
from filelock import FileLock


CACHE = Path(os.environ.get("MAMBAMIA_TRANSFORMERS_TESTS", Path(__file__).parents[1] / ".transformers"))

# What the tests import and the archive lacks. The mixins that stand in add no test; the files that the tests would
# take from the Hub are looked up in `LOCAL_FILES` by name.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "fetch_hub_objects_for_ci.py": """LOCAL_FILES = {}


def url_to_local_path(url):
    return LOCAL_FILES[url.rsplit("/", 1)[1]]
""",
}


def use_transformers_tests():
    """Puts Transformers' tests on the import path, downloaded where they are not there yet.

    Skips the module that asks for them where they cannot be had; with `CI=true` in the environment that is an error.
    """
    folder = CACHE / transformers.__version__
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not folder.is_dir():
            try:
                _fetch(folder)
            except subprocess.CalledProcessError as error:
                reason = f"Transformers' tests could not be downloaded: {error.stderr.strip()}"
                if os.environ.get("CI") == "true":
                    raise RuntimeError(reason) from error
                pytest.skip(reason, allow_module_level=True)
    sys.path.insert(0, str(folder))


def _fetch(folder: Path):
    with tempfile.TemporaryDirectory(dir=folder.parent) as download:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            + ["--no-binary", "transformers", "--dest", download, f"transformers=={transformers.__version__}"],
            check=True,
            capture_output=True,
            text=True,
        )
        (archive,) = Path(download).glob("transformers-*.tar.gz")
        unpacked = Path(download) / "unpacked"
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.isfile() and member.name.split("/")[1] == "tests"]
            for member in members:
                member.name = member.name.partition("/")[2]
            tar.extractall(unpacked, members, filter="data")
        for name, text in STAND_INS.items():
            (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
            if not (unpacked / name).exists():
                (unpacked / name).write_text(text)
        unpacked.rename(folder)
