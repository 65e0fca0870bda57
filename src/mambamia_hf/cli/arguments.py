"""Values on the command line: from text to what is meant, or an error that says what is."""

import math
import re
from argparse import ArgumentTypeError


def text(value: str) -> str:
    if not value.strip():
        raise ArgumentTypeError("is empty")
    return value


def whole_number(value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value) >= 1):
        raise ArgumentTypeError(f"must be a whole number of at least 1, not '{value}'")
    return int(value)


def port(value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value) <= 65535):
        raise ArgumentTypeError(f"must be a number from 0 to 65535, not '{value}'")
    return int(value)


def share(value: str) -> float:
    if not 0 < (number := _number(value)) <= 1:
        raise ArgumentTypeError(f"must lie above 0 and at most at 1, not '{value}'")
    return number


def threshold(value: str) -> float:
    if not 0 <= (number := _number(value)) < math.inf:
        raise ArgumentTypeError(f"must be a number from 0 on, not '{value}'")
    return number


def rate(value: str) -> float:
    if not 0 < (number := _number(value)) < math.inf:
        raise ArgumentTypeError(f"must be a number above 0, not '{value}'")
    return number


def seconds(value: str) -> float:
    """Seconds from `90`, `1:30` or `0:01:30.5`."""
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", value, re.ASCII)
    hours, minutes, rest = (float(part) for part in match.groups(default="0")) if match else (0.0, 0.0, 0.0)
    # 90 seconds and 90:00 minutes are right, 0:90 and 1:90:00 are not.
    if match is None or (":" in value and rest >= 60) or (value.count(":") == 2 and minutes >= 60):
        raise ArgumentTypeError(f"must be seconds or h:mm:ss, as 90, 1:30 or 0:01:30.5, not '{value}'")
    return 3600 * hours + 60 * minutes + rest


def interval(value: str) -> float:
    """Seconds above 0, written as for `seconds`."""
    if (length := seconds(value)) <= 0:
        raise ArgumentTypeError(f"must be longer than 0 seconds, not '{value}'")
    return length


def device(value: str) -> str:
    if not re.fullmatch(r"cpu|(cuda|mps|xpu)(:\d+)?", value, re.ASCII):
        raise ArgumentTypeError(f"must be cpu, cuda, mps or xpu, or one of several as cuda:1, not '{value}'")
    return value


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ArgumentTypeError(f"must be a number, not '{value}'") from None
