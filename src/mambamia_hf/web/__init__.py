"""A page to open a video, see when it matters and ask about it: `mambamia web`. Needs the extra `web`."""
