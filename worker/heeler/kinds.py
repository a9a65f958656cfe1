"""What values of settings may be. Each kind reads one from text, or raises `ValueError` or `KeyError`.

Its documentation is what a person is told that the value must be.
"""

from __future__ import annotations

from collections.abc import Callable

from heeler.urls import check_webhook

_LONGEST = 1e9
"""Seconds; a socket's time-out can't be much longer."""


def text(value: str) -> str:
    """A text."""
    return value


def seconds(value: str) -> float:
    """A number of seconds, 0 or more."""
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def limit(value: str) -> float:
    """A number of seconds above 0, up to 1e+09."""
    number = float(value)
    if not 0 < number <= _LONGEST:
        raise ValueError
    return number


def milliseconds(value: str) -> float:
    """A number of milliseconds, 0 or more."""
    return seconds(value) / 1000


def four_times_milliseconds(value: str) -> float:
    """A number of milliseconds, 0 or more."""
    # Kelpie's worker looks four times; a second at the least, or what is being written would be taken for whole.
    return max(1.0, 4 * milliseconds(value))


def count(value: str) -> int:
    """A whole number, 1 or more."""
    number = int(value)
    if number < 1:
        raise ValueError
    return number


def number(value: str) -> int:
    """A whole number, 0 or more."""
    number = int(value)
    if number < 0:
        raise ValueError
    return number


def path(value: str) -> str:
    """A path that starts with /."""
    if not value.startswith("/") or not value.isprintable() or " " in value or not value.isascii():
        raise ValueError
    return value


def flag(value: str) -> bool:
    """True or false."""
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]


def codes(value: str) -> frozenset[int]:
    """Exit codes from 1 to 255, separated by commas."""
    codes = frozenset(int(part) for part in value.split(",") if part.strip())
    if not all(1 <= code <= 255 for code in codes):
        raise ValueError
    return codes


def choice(*choices: str) -> Callable[[str], str]:
    """One of these words."""

    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError
        return value

    parse.__doc__ = " or ".join(choices)
    return parse


def kelpie_log_level(value: str) -> str:
    """One of trace, debug, info, warn, error, fatal or silent."""
    levels = {"trace": "debug", "fatal": "error", "silent": "error"}
    return {level: level for level in ("debug", "info", "warn", "error")}.get(value) or levels[value]


def visibility(value: str) -> int:
    """A whole number of seconds from 1 to 3600."""
    number = int(value)
    if not 1 <= number <= 3600:
        raise ValueError
    return number


def records_of_bucket(value: str) -> str:
    """A bucket's name."""
    return f"s3://{value}/heeler/"


def webhook(value: str) -> str:
    """An http or https URL without a user."""
    return check_webhook(value)
