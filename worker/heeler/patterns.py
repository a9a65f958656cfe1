"""Which regular expressions a job may name. Python's engine backtracks and holds the interpreter's lock meanwhile.

So one whose time doubles with each character of a name, such as `(a+)+$`, would stop heartbeats and signals: what can
do that, a repetition of something whose length may vary, is refused.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser  # type: ignore[attr-defined]
else:
    import sre_parse as _parser

_LONGEST = 200
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT"}


def check_pattern(text: str) -> None:
    """Accept a pattern whose time is not exponential in the length of what it looks at.

    Raises:
        ValueError: It is none, or not a regular expression, or too long.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"is longer than {_LONGEST} characters")
    try:
        re.compile(text)
        parsed = _parser.parse(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from None
    if _is_explosive(parsed, repeated=False):
        raise ValueError(
            f"{text!r} repeats a group that itself holds a repetition or alternatives, as (a+)+ does: on some names"
            " that takes for ever; write it without the outer or the inner one"
        )


def _is_explosive(parsed: Any, *, repeated: bool) -> bool:
    for operation, argument in parsed:
        name = str(operation)
        varies = name == "BRANCH" or (name in _REPEATS and argument[0] != argument[1])
        if repeated and varies:
            return True
        inside = repeated or (name in _REPEATS and argument[1] > 1)
        if any(_is_explosive(part, repeated=inside) for part in _parts(argument)):
            return True
    return False


def _parts(argument: Any) -> Iterator[Any]:
    """The patterns in an operation's argument, however deep."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _parts(part)
