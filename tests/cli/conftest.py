"""An untrained checkpoint, a video, and the program run in this process."""

import logging

import pytest
from huggingface_hub.utils import logging as hub_logging
from tiny_model import tiny_checkpoint
from transformers.utils import logging as transformers_logging
from video_files import write_video

from mambamia_hf.cli import main


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of an untrained checkpoint, its model and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, *tiny_checkpoint(folder)


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """16 frames, 2 per second, that show their numbers; every 4th is a key frame."""
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", num_frames=16, fps=2, key_every=4)


@pytest.fixture
def restore_logging():
    """The program quietens the libraries for its own process, which here is that of the other tests as well."""
    libav = logging.getLogger("libav")
    levels = transformers_logging.get_verbosity(), hub_logging.get_verbosity(), libav.level
    yield
    transformers_logging.set_verbosity(levels[0])
    hub_logging.set_verbosity(levels[1])
    libav.setLevel(levels[2])
    transformers_logging.enable_progress_bar()


@pytest.fixture
def program(capsys, restore_logging):
    """Runs `mambamia` with some arguments; gives exit code, stdout and stderr."""

    def run(*arguments):
        capsys.readouterr()  # what making the input has printed
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def ask(program, checkpoint):
    """Runs `mambamia ask` with the untrained checkpoint."""
    return lambda *arguments, model=checkpoint[0]: program("ask", *arguments, "--model", model)
