"""Errors that end a command, each with the exit code that it ends with."""

from __future__ import annotations

EXIT_USAGE = 64
EXIT_UNAVAILABLE = 69
EXIT_BUG = 70


class HeelerError(Exception):
    """A fault with a one-line message for the person who started us.

    Attributes:
        exit_code: What the process exits with.
    """

    exit_code = EXIT_BUG


class UsageError(HeelerError):
    """A flag, a setting, a file or a job document is wrong: changing it helps, waiting does not."""

    exit_code = EXIT_USAGE


class UnavailableError(HeelerError):
    """The queue or the storage could not be reached within the start-up limit."""

    exit_code = EXIT_UNAVAILABLE
