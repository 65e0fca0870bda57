"""`mambamia web`: a page to open a video, see when it matters and ask about it."""

from argparse import Namespace
from importlib.util import find_spec

from .console import say
from .opening import checkpoint_of, say_loading


def run(arguments: Namespace) -> None:
    """Serve the page until Ctrl-C."""
    checkpoint = checkpoint_of(arguments)
    if find_spec("gradio") is None:
        raise ValueError("the page needs Gradio, which is not installed; install mambamia_hf with its extra 'web'.")
    say_loading()
    from ..web.server import LOOPBACK, serve

    if arguments.host not in LOOPBACK:
        say(f"warning: whoever reaches {arguments.host} can use the page; it takes uploads only.")
    serve(
        checkpoint,
        arguments.host,
        arguments.port,
        arguments.device,
        arguments.dtype,
        started=lambda address: say(f"open {address} (Ctrl-C ends it)"),
    )
