"""`mambamia web` where it cannot run, and what the page does not offer to others than this machine."""

import socket
import subprocess
import sys

import pytest
from program import check_error, environment, run_program
from tiny_model import tiny_model, tiny_processor
from video_files import write_video


WITHOUT_GRADIO = """
import sys
sys.modules["gradio"] = None
from mambamia_hf.cli import main
sys.exit(main(["web"]))
"""


def test_without_gradio():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_GRADIO], env=environment(), capture_output=True, text=True, encoding="utf-8"
    )
    check_error(result.returncode, result.stdout, result.stderr, "extra 'web'")


def test_a_port_that_is_taken():
    pytest.importorskip("gradio", reason="needs the extra 'web'")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run_program("web", "--port", port)
    check_error(result.returncode, result.stdout, result.stderr, f"port {port} of 127.0.0.1", "--port")


@pytest.fixture
def host():
    pytest.importorskip("gradio", reason="needs the extra 'web'")
    from mambamia_hf.web.session import Host

    return Host(tiny_model(), tiny_processor(), opens_paths=False)


@pytest.mark.parametrize("opens_paths", [True, False])
def test_only_this_machine_may_name_paths(host, opens_paths):
    from mambamia_hf.web.page import Page

    host.opens_paths = opens_paths
    config = Page(host, "a model").blocks.get_config_file()
    elements = {component["props"].get("elem_id") for component in config["components"]}
    assert "mm-upload" in elements
    assert ("mm-path" in elements) == opens_paths
    assert all(endpoint["api_visibility"] == "private" for endpoint in config["dependencies"])


def test_a_film_takes_the_upload_and_removes_it(host, tmp_path):
    from mambamia_hf.web.session import Film

    upload = write_video(tmp_path / "clip.mp4", num_frames=8)
    content = upload.read_bytes()
    film = Film(host, str(upload), is_upload=True)
    assert not upload.exists()
    key = film.address.rpartition("/")[2]
    path = host.files[key]()
    with open(path, "rb") as file:
        assert file.read() == content
    film.close()
    assert host.files == {}
    with pytest.raises(FileNotFoundError):
        open(path, "rb")


def test_the_video_of_a_path_stays(host, tmp_path):
    from mambamia_hf.web.session import Film

    video = write_video(tmp_path / "clip.mp4", num_frames=8)
    Film(host, str(video), is_upload=False).close()
    assert video.exists() and host.files == {}
