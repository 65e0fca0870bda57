"""Sources that are still coming: a file and a pipe that are written bit by bit, a web server, an RTSP server."""

import itertools
import os
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def pieces(content: bytes, number: int = 8) -> list[bytes]:
    """The content in so many parts."""
    size = -(-len(content) // number)
    return [content[start : start + size] for start in range(0, len(content), size)]


@contextmanager
def being_written(path: Path, content: bytes, pause: float = 0.2) -> Iterator[Path]:
    """A file (or a pipe, where there is one) to which the content is written in pieces, the first of them at once."""
    started = threading.Event()

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            for piece in pieces(content):
                file.write(piece)
                started.set()
                time.sleep(pause)

    thread = threading.Thread(target=write)
    thread.start()
    if not path.exists() or path.is_file():
        started.wait()
    try:
        yield path
    finally:
        thread.join()


@contextmanager
def quiet_pipe(path: Path, content: bytes = b"") -> Iterator[Path]:
    """A pipe that gives some content and then nothing, but stays open."""
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)
    writer = threading.Thread(target=os.write, args=(descriptor, content))
    writer.start()
    try:
        yield path
    finally:
        writer.join()
        os.close(descriptor)


class WebServer:
    """Serves pages on 127.0.0.1; in `requests` is what was asked for.

    Args:
        pages: of each path the content, in pieces of which each is sent `pause` seconds after the one before; or
            an address to which to redirect.
        hangs: whether connections stay open after the last piece.
    """

    def __init__(self, pages: dict[str, list[bytes] | str], pause: float = 0.1, hangs: bool = False):
        self.requests: list[str] = []
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                page = pages.get(self.path.partition("?")[0])
                if isinstance(page, str):
                    self.send_response(302)
                    self.send_header("Location", page)
                    self.end_headers()
                elif page is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.end_headers()
                    self._drip(page)

            def _drip(self, page: list[bytes]) -> None:
                try:
                    for piece in page:
                        self.wfile.write(piece)
                        outer.released.wait(pause)
                    if hangs:
                        outer.released.wait()
                except OSError:
                    pass  # the client has left

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "WebServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


class _RtspHandler(socketserver.StreamRequestHandler):
    """Answers one client, as its server's `transport_stream`, `user`, `hangs` and `released` say."""

    def handle(self) -> None:
        while request := b"".join(itertools.takewhile(bytes.strip, self.rfile)).decode():
            sequence = next(line for line in request.splitlines() if line.lower().startswith("cseq"))
            if f"Basic {self.server.user}" not in request and self.server.user:
                self._answer("401 Unauthorized", sequence, 'WWW-Authenticate: Basic realm="here"')
                continue
            method = request.split()[0]
            sdp = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\n"
            headers = {
                "OPTIONS": ["Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN"],
                "DESCRIBE": ["Content-Type: application/sdp"],
                "SETUP": ["Transport: RTP/AVP/TCP;unicast;interleaved=0-1", "Session: 1"],
                "PLAY": ["Session: 1"],
            }[method]
            self._answer("200 OK", sequence, *headers, body=sdp if method == "DESCRIBE" else "")
            if method == "PLAY":
                self._play(self.server.transport_stream)
                return

    def _answer(self, status: str, *headers: str, body: str = "") -> None:
        lines = [f"RTSP/1.0 {status}", *headers, f"Content-Length: {len(body)}", "", body]
        self.wfile.write("\r\n".join(lines).encode())

    def _play(self, content: bytes) -> None:
        parts = [content[start : start + 7 * 188] for start in range(0, len(content), 7 * 188)]
        try:
            for number, part in enumerate(parts[: len(parts) // 2] if self.server.hangs else parts):
                packet = struct.pack(">BBHII", 0x80, 33, number, 900 * number, 1) + part
                self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
            if self.server.hangs:
                self.server.released.wait()
        except OSError:
            pass  # the client has left


@contextmanager
def rtsp_server(transport_stream: bytes, user: str = "", hangs: bool = False) -> Iterator[str]:
    """Plays an MPEG transport stream by RTSP, in RTP packets within the connection (RFC 2326, 10.12).

    Args:
        transport_stream: what to play.
        user: the base64 of user name and password that are asked for.
        hangs: whether the server falls silent after the first half, in place of an end.

    Yields:
        Host and port.
    """
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _RtspHandler) as server:
        server.daemon_threads = True
        server.transport_stream, server.user, server.hangs = transport_stream, user, hangs
        server.released = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.released.set()
            server.shutdown()
