import os
import signal
import subprocess
import sys

import pytest

from mambamia_hf.files import atomic_folder


def test_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "new" / "folder") as folder:
        (folder / "file").write_text("content")
        assert folder.name == "folder" and not (tmp_path / "new" / "folder").exists()
    assert (tmp_path / "new" / "folder" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("content")
        raise error
    assert not list(tmp_path.iterdir())


def test_only_new_and_empty_folders_are_written(tmp_path):
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "file").touch()
    for path in (tmp_path / "empty", tmp_path / "empty" / "file"):
        with pytest.raises(ValueError, match="exists and is not an empty folder"), atomic_folder(path):
            pass


WRITER = """
import sys, time
from mambamia_hf.files import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "half").touch()
    print("writing", flush=True)
    time.sleep(600)
"""


def test_second_writer_is_refused_and_the_rest_of_a_killed_one_removed(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "folder")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(ValueError, match="Another process is writing"), atomic_folder(tmp_path / "folder"):
            pass
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "folder").exists()
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "whole"]
