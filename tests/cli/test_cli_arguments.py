"""Values on the command line."""

from argparse import ArgumentTypeError

import pytest

from mambamia_hf.cli import arguments


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("12.5", 12.5),
        ("1:30", 90),
        ("01:05.25", 65.25),
        ("1:00:00", 3600),
        ("10:02:03.5", 36123.5),
        ("90:00", 5400),
    ],
)
def test_seconds(text, seconds):
    assert arguments.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1:75", "75:00:99", ":30", "1:60:00", "1:2:3:4", "1e3", "٣", "90s", "nan"])
def test_no_seconds(text):
    with pytest.raises(ArgumentTypeError, match="h:mm:ss"):
        arguments.seconds(text)


@pytest.mark.parametrize("text", ["cpu", "cuda", "cuda:1", "mps", "xpu:0"])
def test_devices(text):
    assert arguments.device(text) == text


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cpu:1", "meta"])
def test_no_devices(text):
    with pytest.raises(ArgumentTypeError, match="cuda"):
        arguments.device(text)
