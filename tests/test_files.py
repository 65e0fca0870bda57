import os
import signal
import subprocess
import sys

import pytest

from mambamia_hf.files import atomic_folder, atomic_write, locked_folder


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


class TestFile:
    def test_it_appears_whole(self, tmp_path):
        (tmp_path / "a.txt").write_text("old")
        with atomic_write(tmp_path / "a.txt") as file:
            assert file.suffix == ".txt"
            file.write_text("new")
            assert (tmp_path / "a.txt").read_text() == "old"
        assert (tmp_path / "a.txt").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_nothing_is_left_after_an_error(self, tmp_path, error):
        with pytest.raises(error), atomic_write(tmp_path / "a.txt") as file:
            file.write_text("half")
            raise error
        assert not list(tmp_path.iterdir())

    def test_the_rest_of_a_killed_writer_is_removed(self, tmp_path):
        program = WRITER.replace("atomic_folder", "atomic_write").replace(
            '(folder / "half").touch()', "folder.touch()"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "a.txt")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "writing\n"
            (left,) = tmp_path.iterdir()
            os.utime(left, (0, 0))
            with atomic_write(tmp_path / "a.txt") as file:  # a writer that is alive is left alone
                file.write_text("mine")
            assert left in list(tmp_path.iterdir())
            os.kill(process.pid, signal.SIGKILL)
        assert (tmp_path / "a.txt").read_text() == "mine"
        os.utime(left, (0, 0))
        with atomic_write(tmp_path / "a.txt") as file:
            file.write_text("mine again")
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_forked_child_leaves_the_folder_to_its_parent(tmp_path):
    folders = locked_folder(tmp_path, "it-")
    folder = folders.__enter__()
    if not (child := os.fork()):
        folders.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()
    folders.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


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
