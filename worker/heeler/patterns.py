"""Which regular expressions a job may name: ECMAScript's, as Kelpie's users write them, run by Python's engine.

That one backtracks and holds the interpreter's lock meanwhile, so a pattern whose time doubles with each character of
a name, such as `(a+)+$`, would stop heartbeats and signals. What can do that is refused: a repetition of something
whose length may vary, and repetitions one after another where each multiplies the time of those before, as `.*` does
by the name's length and `a?` by two. One that can end in one place only, as `[^/]*` before a slash, multiplies nothing.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser  # type: ignore[attr-defined]
else:
    import sre_parse as _parser

from heeler.ecmascript import translate

_LONGEST = 200
_MOST_REPEATS = 10_000
_NAME = 1024
"""Characters of the longest name that a key in storage has."""
_MOST_STEPS = 3e8
"""Of the engine, on the worst such name: two or three seconds, and on names that people give nothing."""
_SLOW = 4.0
"""As many steps is one that is no search for a letter."""
_LEADING = re.compile(r"(?:\.\*\??)*")
_TOP = sys.maxunicode
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
        translated = _without_leading(text, translated)
        if _Steps.of(_parser.parse(translated, re.ASCII)) > _MOST_STEPS:
            raise ValueError(
                f"{text!r} has repetitions that multiply one another's time, as two .* or many a? do: on long names"
                " that takes for ever; begin it with ^, write [^/]* for .*, or leave some out"
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


def _without_leading(text: str, translated: str) -> str:
    """The pattern without `.*` at its start: that may match nothing, so `search` finds the same, and sooner."""
    try:
        return translate(text[_LEADING.match(text).end() :])  # type: ignore[union-attr]
    except ValueError:  # what comes next can't stand at a start
        return translated


_Chars = list[tuple[int, int]]
"""A set of characters: the first and the last of each range, in order, none touching the next."""


def _union(*sets: _Chars) -> _Chars:
    found: _Chars = []
    for first, last in sorted(one for chars in sets for one in chars):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _others(chars: _Chars) -> _Chars:
    ends = [-1, *(last for _, last in chars)]
    starts = [*(first for first, _ in chars), _TOP + 1]
    return [(end + 1, start - 1) for end, start in zip(ends, starts, strict=True) if end + 1 <= start - 1]


def _are_apart(one: _Chars, other: _Chars) -> bool:
    return not any(first <= end and start <= last for first, last in one for start, end in other)


_CATEGORIES: dict[str, _Chars] = {
    "DIGIT": [(48, 57)],
    "SPACE": [(9, 13), (32, 32)],
    "WORD": [(48, 57), (65, 90), (95, 95), (97, 122)],
}


def _characters(name: str, argument: Any) -> _Chars | None:
    """What an operation of exactly one character matches; None for every other."""
    if name == "LITERAL":
        return [(argument, argument)]
    if name == "NOT_LITERAL":
        return _others([(argument, argument)])
    if name == "RANGE":
        return [argument]
    if name == "CATEGORY":
        word = str(argument).removeprefix("CATEGORY_")
        found = _CATEGORIES[word.removeprefix("NOT_")]
        return _others(found) if word.startswith("NOT_") else found
    if name == "IN":
        negated = str(argument[0][0]) == "NEGATE"
        listed = _union(*(_characters(str(kind), value) or [] for kind, value in argument[negated:]))
        return _others(listed) if negated else listed
    return None


def _firsts(parsed: Sequence[Any], after: _Chars) -> _Chars:
    """With which characters a match can go on (or more), if `after` are those of what follows it."""
    for operation, argument in reversed(parsed):
        name = str(operation)
        one = _characters(name, argument)
        if one is not None:
            after = one
        elif name in _REPEATS:
            inside = _firsts(argument[2], after)
            after = _union(inside, after) if argument[0] == 0 else inside
        elif name == "SUBPATTERN":
            after = _firsts(argument[3], after)
        elif name == "BRANCH":
            after = _union(*(_firsts(part, after) for part in argument[1]))
        elif str(argument).startswith("AT_END"):
            after = []
        elif name.startswith("ASSERT"):
            after = [(0, _TOP)]  # it may look on for long before anything is known
    return after


def _distance(parsed: Sequence[Any]) -> int:
    """How far apart two places are at the least where the literal at its start can be found."""
    literal: list[int] = []
    for operation, argument in parsed:
        if str(operation) != "LITERAL":
            break
        literal.append(argument)
    return next((shift for shift in range(1, len(literal)) if literal[shift:] == literal[:-shift]), len(literal) or 1)


@dataclass(frozen=True)
class _Paths:
    """In how many ways a place in the pattern is reached at the most: `factor` for each choice of `choices` places."""

    choices: int
    factor: float

    @property
    def count(self) -> float:
        return self.factor * float(_NAME) ** self.choices / math.factorial(self.choices)

    def times(self, factor: float) -> _Paths:
        return _Paths(self.choices, self.factor * factor)

    def anywhere(self) -> _Paths:
        """With one choice more."""
        return _Paths(self.choices + 1, self.factor)


class _Steps:
    """Bounds how many steps a search takes on the worst name."""

    def __init__(self) -> None:
        self._most = 0.0

    @classmethod
    def of(cls, parsed: Any) -> float:
        """The bound for a pattern."""
        steps, start = cls(), _Paths(0, 1.0)
        if not (parsed and str(parsed[0][1]) == "AT_BEGINNING"):
            start = start.anywhere().times(1 / _distance(parsed))
        items = list(parsed)
        while items and str(items[-1][0]) in _REPEATS and items[-1][1][0] == 0:
            items.pop()  # it always matches, so nothing before it is tried again
        steps._walk(items, [], start)
        return steps._most

    def _see(self, paths: _Paths) -> _Paths:
        self._most = max(self._most, paths.count)
        return paths

    def _walk(self, parsed: Any, after: _Chars, paths: _Paths) -> _Paths:
        """The ways to its end; `after` is what can follow."""
        items = list(parsed)
        for index, (operation, argument) in enumerate(items):
            name, rest = str(operation), items[index + 1 :]
            follows = _firsts(rest, after)
            self._see(paths)
            if name in _REPEATS:
                paths = self._repeat(argument, follows, rest, paths)
            elif name == "SUBPATTERN":
                paths = self._walk(argument[3], follows, paths)
            elif name == "BRANCH":
                paths = self._branch(argument[1], follows, paths)
            elif name.startswith("ASSERT"):
                self._walk(argument[1], [], paths)  # it is entered anew each time, never again from its end
        return paths

    def _repeat(self, argument: Any, follows: _Chars, rest: Sequence[Any], paths: _Paths) -> _Paths:
        least, most, body = int(argument[0]), int(argument[1]), argument[2]
        begins = _firsts(body, follows)
        paths = self._walk(body, _union(begins, follows) if most > 1 else follows, paths)
        if least == most:
            return paths
        lengths = most - least + 1
        tried = paths.anywhere() if lengths > _NAME else paths.times(lengths)
        quick = lengths > _NAME and rest and str(rest[0][0]) == "LITERAL"
        self._see(tried if quick else tried.times(_SLOW))
        if _are_apart(begins, follows):
            return paths
        return tried.times(1 / _distance(rest)) if lengths > _NAME else tried

    def _branch(self, parts: Sequence[Any], follows: _Chars, paths: _Paths) -> _Paths:
        begins = [_firsts(part, follows) for part in parts]
        apart = all(_are_apart(one, other) for index, one in enumerate(begins) for other in begins[:index])
        longest = max((self._walk(part, follows, paths) for part in parts), key=lambda end: end.count)
        if apart:
            return longest
        self._see(longest.times(len(parts) * _SLOW))
        return longest.times(len(parts))


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
