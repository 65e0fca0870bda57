"""`mambamia web`: a page to open a video, see when it matters and ask about it. Needs the extra `web`."""

from .server import build_app, serve


__all__ = ["build_app", "serve"]
