"""Names in messages: without what moves a terminal's cursor, and without secrets."""


def printable(text: str) -> str:
    """`text` with escapes for what could move the cursor or change colours on a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def without_secrets(location: str) -> str:
    """A path as it is; an address without user name, password and query, which may hold a token."""
    scheme, mark, rest = location.partition("://")
    if not mark:
        return location
    host, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return printable(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


__all__ = ["printable", "without_secrets"]
