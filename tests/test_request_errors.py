"""Errors about the input, where Starlette is loaded and where it is not."""

import subprocess
import sys

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from mambamia_hf.request_errors import errors_for_servers


ERRORS = [
    ValueError("a sentence."),
    FileNotFoundError("no file."),
    OSError(2, "No such file", "name"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
    StrictDataclassFieldValidationError("keep_frames", TypeError("no int")),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_status_beside_type_and_message(error):
    exceptions = pytest.importorskip("starlette.exceptions")
    with pytest.raises(type(error)) as raised, errors_for_servers():
        raise error
    assert isinstance(raised.value, exceptions.HTTPException)
    assert (raised.value.status_code, raised.value.detail, raised.value.headers) == (400, str(error), None)
    assert str(raised.value) == str(error) and raised.value.__cause__ is error and raised.value.args == error.args
    with pytest.raises(type(error)) as again, errors_for_servers():
        raise raised.value
    assert again.value is raised.value


def test_faults_of_the_program_stay_as_they_are():
    error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError) as raised, errors_for_servers():
        raise error
    assert raised.value is error


def test_nothing_changes_without_a_server():
    code = """
import sys
from mambamia_hf.request_errors import errors_for_servers
assert "starlette.exceptions" not in sys.modules
error = ValueError("a sentence.")
try:
    with errors_for_servers():
        raise error
except ValueError as raised:
    assert raised is error
"""
    subprocess.run([sys.executable, "-c", code], check=True)
