"""`mambamia serve`: Transformers' own server, which knows MambaMia without remote code."""

import argparse
import sys
from importlib.metadata import entry_points

from .. import BUNDLED_CHECKPOINT
from ..inputs import check_checkpoint


def run(given: argparse.Namespace) -> None:
    """Run `transformers serve` for one checkpoint, until it is interrupted.

    Raises:
        ValueError: if there is no such checkpoint, or what the server needs is not installed.
    """
    model = given.model or BUNDLED_CHECKPOINT
    check_checkpoint(model)
    from transformers.utils.import_utils import is_serve_available  # registers the classes of this package, too

    if not is_serve_available():
        raise ValueError("the server needs FastAPI, Uvicorn and openai; install them: pip install mambamia_hf[serve].")
    (command,) = entry_points(group="console_scripts", name="transformers")
    sys.argv = ["transformers", "serve", model, "--host", given.host, "--port", str(given.port), *given.options]
    command.load()()
