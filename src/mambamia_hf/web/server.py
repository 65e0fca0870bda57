"""The server of the page: on this machine unless told otherwise, and nothing in the page leads off it."""

import mimetypes
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI, HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import FileResponse, PlainTextResponse

from .. import BUNDLED_CHECKPOINT
from ..auto import MambaMiaForConditionalGeneration, MambaMiaProcessor
from ..inference import load_checkpoint
from .page import Page
from .render import asset
from .session import Host


# The browser itself refuses whatever a page, a file or an answer might want from elsewhere.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXAMPLE = str(Path(__file__).parents[1] / "demo" / "needle.mp4")
EXAMPLE_QUESTIONS = (
    "What shape appears in the video?",
    "What colour is the shape?",
    "How often does the star appear?",
    "When does the star appear?",
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def serve(
    checkpoint: str | os.PathLike[str] = BUNDLED_CHECKPOINT,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
    dtype: str | None = None,
    started: Callable[[str], None] = print,
) -> None:
    """Serve the page of a model until Ctrl-C.

    Args:
        checkpoint: folder or Hub id of a MambaMia checkpoint.
        host: address to listen at. Where others can reach it, the page takes uploads only: no paths, no URLs.
        port: to listen at; 0 takes a free one.
        device, dtype: see [`mambamia_hf.inference.encode_video`].
        started: called with the address of the page once it is there.

    Raises:
        OSError, ValueError: for an address that is taken or not of this machine, or a checkpoint that cannot be used.
    """
    with _listen(host, port) as listener, tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # for uploads; what is left of them goes with the folder
        model, processor = load_checkpoint(checkpoint, device, dtype)
        app = build_app(model, processor, str(checkpoint), opens_paths=host in LOOPBACK)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        shown = f"[{host}]" if ":" in host else host
        app.router.on_startup.append(lambda: started(f"http://{shown}:{listener.getsockname()[1]}"))
        uvicorn.Server(config).run(sockets=[listener])


def build_app(
    model: MambaMiaForConditionalGeneration, processor: MambaMiaProcessor, checkpoint: str, opens_paths: bool
) -> FastAPI:
    """The page of a model, and the files that it shows, as an ASGI application.

    Args:
        model, processor: of one checkpoint.
        checkpoint: folder or Hub id of it; the bundled one comes with an example video.
        opens_paths: whether visitors may name files of this machine, and addresses that it can reach.
    """
    host = Host(model, processor, opens_paths)
    is_bundled = checkpoint == BUNDLED_CHECKPOINT
    name = "the small bundled model: shapes, digits and colours" if is_bundled else Path(checkpoint).name
    page = Page(host, name, *((EXAMPLE, EXAMPLE_QUESTIONS) if is_bundled else ()))
    app = FastAPI(openapi_url=None)
    app.add_middleware(_Guard, hosts=LOOPBACK if opens_paths else None)

    @app.get("/media/{key}")
    def media(key: str) -> FileResponse:
        if key not in host.files:
            raise HTTPException(404)
        path = host.files[key]()
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        return FileResponse(path, media_type=kind, filename=Path(path).name, content_disposition_type="inline")

    return gr.mount_gradio_app(
        app,
        page.blocks,
        "/",
        max_file_size=host.limits.copied_bytes,
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=asset("page.css"),
        head=f"<script>{asset('page.js')}</script>",
    )


class _Guard:
    """Tells the browser that this page needs nothing from elsewhere, and other sites that they are not served.

    A site that names itself after this machine (DNS rebinding) could otherwise have a browser on it open its files.

    Args:
        app: what is guarded.
        hosts: names by which it may be asked for; None for any.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname
        if self.hosts is not None and asked not in self.hosts:
            await PlainTextResponse("This page is served to this machine only.", 403)(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address, before anything heavy is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"cannot listen at port {port} of {host} ({error.strerror}); name another --port.") from error


__all__ = ["build_app", "serve"]
