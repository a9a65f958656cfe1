"""Which regular expressions a job may name: ECMAScript's, as Kelpie's users write them, run by Python's engine.

That one backtracks and holds the interpreter's lock meanwhile, so a pattern whose time doubles with each character of
a name, such as `(a+)+$`, would stop heartbeats and signals: what can do that, a repetition of something whose length
may vary, is refused, and more than a few of `.*`, each of which multiplies it by the name's length.
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

from heeler.ecmascript import translate

_LONGEST = 200
_MOST_REPEATS = 10_000
_MOST_WIDE = 3
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT"}


def compile_pattern(text: str) -> re.Pattern[str]:
    """A pattern whose `search` finds what ECMAScript's `new RegExp(text).test` does.

    Raises:
        ValueError: It is no regular expression there, or may take for ever, or can't be had here; the construct is
            named.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"is longer than {_LONGEST} characters")
    translated = translate(text)
    try:
        parsed = _parser.parse(translated, re.ASCII)
        if _is_explosive(parsed, repeated=False):
            raise ValueError(
                f"{text!r} repeats a group that itself holds a repetition or alternatives, as (a+)+ does: on some names"
                " that takes for ever; write it without the outer or the inner one"
            )
        if _wide(parsed) > _MOST_WIDE:
            raise ValueError(
                f"{text!r} has more than {_MOST_WIDE} repetitions of anything, such as .*: on long names that takes for"
                " ever; leave out those at its ends, which change nothing, or write [^/]* for the others"
            )
        if _repeats(parsed) > _MOST_REPEATS:
            raise ValueError(f"{text!r} repeats something more than {_MOST_REPEATS} times; no path is that long")
        return re.compile(translated, re.ASCII)
    except re.error as error:
        if "look-behind" in str(error):
            words = "has a lookbehind, (?<=...) or (?<!...), whose length varies; write one of a fixed length"
            raise ValueError(f"{text!r} {words}") from None
        raise ValueError(f"is no regular expression: {error}") from None
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from None


def check_pattern(text: str) -> None:
    """Raises `ValueError` as `compile_pattern` does."""
    compile_pattern(text)


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


def _wide(parsed: Any) -> int:
    """How many repetitions without end it has of something that also matches a slash, as `.` does."""
    count = 0
    for operation, argument in parsed:
        endless = str(operation) in _REPEATS and argument[1] == _parser.MAXREPEAT
        count += endless and _matches_slash(argument[2])
        count += sum(_wide(part) for part in _parts(argument))
    return count


def _matches_slash(parsed: Any) -> bool:
    """Whether it is one character that may be a slash, and a letter."""
    if len(parsed) != 1:
        return False
    name, argument = str(parsed[0][0]), parsed[0][1]
    if name == "NOT_LITERAL":
        return bool(argument != ord("/"))
    return name == "IN" and all(_has(argument, ord(one)) for one in "/a")


def _has(members: Any, code: int) -> bool:
    negated = str(members[0][0]) == "NEGATE"
    listed = any(
        (str(name) == "LITERAL" and value == code) or (str(name) == "RANGE" and value[0] <= code <= value[1])
        for name, value in members[negated:]
    )
    return listed is not negated


def _repeats(parsed: Any) -> int:
    """How often something in it is repeated at the most, nested counts multiplied; a path is shorter than that."""
    most = 1
    for operation, argument in parsed:
        times = 1
        if str(operation) in _REPEATS:
            least, top = int(argument[0]), int(argument[1])
            times = max(1, least if top == int(_parser.MAXREPEAT) else top)
        most = max(most, times * max((_repeats(part) for part in _parts(argument)), default=1))
    return most


def _parts(argument: Any) -> Iterator[Any]:
    """The patterns in an operation's argument, however deep."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _parts(part)
