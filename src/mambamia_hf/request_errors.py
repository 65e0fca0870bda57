"""Bad input to a server: errors that FastAPI and Starlette answer with HTTP status 400 and their message."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError


@contextmanager
def errors_for_servers() -> Iterator[None]:
    """Errors about the input, raised within, are `HTTPException`s, too, where Starlette is loaded.

    A server that is not ours, such as `transformers serve`, would answer any other error with status 500 and no
    message. Type and message stay the same for everyone else.
    """
    try:
        yield
    except (ValueError, OSError, StrictDataclassError) as error:
        answered = _with_status(error)
        if answered is error:
            raise
        raise answered from error


def _with_status(error: Exception) -> Exception:
    """An error of the same type and message that is an `HTTPException` of Starlette as well, if that is loaded."""
    starlette: Any = sys.modules.get("starlette.exceptions")
    if starlette is None or isinstance(error, starlette.HTTPException):
        return error
    kind = type(error)
    both = type(kind.__name__, (kind, starlette.HTTPException), {"__str__": _detail, "__module__": kind.__module__})
    answered: Any = both.__new__(both, *error.args)  # not by its constructor: arguments of errors differ
    answered.__dict__.update(error.__dict__)
    answered.status_code, answered.detail, answered.headers = 400, str(error), None
    return answered


def _detail(error: Any) -> str:
    return error.detail


__all__ = ["errors_for_servers"]
