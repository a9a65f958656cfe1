"""Fault rules: which requests they hit, what is done to those, and the list of rules in force.

A rule is a `Match` and an action. Every matching rule acts on a request, in the order in which they were
added; the first that answers or cuts ends it. Thread-safe; a test can wait until a rule has hit.
"""

from __future__ import annotations

import asyncio
import fnmatch
import itertools
import random
import re
import threading
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .messages import Request

Stage = Literal["before", "request_body", "after", "response_body"]
"""`before` the effect (the request's body has come), in the middle of the `request_body`, `after` the effect
and before the answer, in the middle of the `response_body`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a status with an S3 code; `at="after"` does so although the request took effect."""

    status: int
    code: str | None = None
    message: str | None = None
    retry_after: int | None = None
    """Seconds, for the Retry-After header."""
    at: Literal["before", "after"] = "before"


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait, then go on."""

    seconds: float
    at: Literal["before", "after"] = "before"


@dataclass(frozen=True, slots=True)
class Stall:
    """Do nothing, the connection open: for some seconds, or until the rule is released or cleared.

    In the request's body the server stops reading once `after_bytes` of it have come; in the response's it
    stops writing. A body of no more than `after_bytes` bytes is not stalled.
    """

    seconds: float | None = None
    at: Stage = "before"
    after_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """Reset the connection (or close it in order, with `reset=False`).

    `at="before"`: nothing was done. `at="after"`: it was done and nobody is told (a lost answer).
    """

    at: Stage = "before"
    after_bytes: int = 0
    reset: bool = True


@dataclass(frozen=True, slots=True)
class Slow:
    """A slow link: bytes per second of the request's body (up) and of the response's (down)."""

    up: float | None = None
    down: float | None = None


@dataclass(frozen=True, slots=True)
class Truncate:
    """Send only the first bytes of the response's body.

    By default the length is announced in full and the connection closed in order; `hidden=True` announces the
    short length, so that HTTP alone does not show that bytes are missing.
    """

    after_bytes: int
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Corrupt:
    """Invert one byte of the response's body; `offset` counts from its start, negative ones from its end."""

    offset: int = 0


Action = Answer | Delay | Stall | Cut | Slow | Truncate | Corrupt
ACTIONS: dict[str, type[Action]] = {
    kind.__name__.lower(): kind for kind in (Answer, Delay, Stall, Cut, Slow, Truncate, Corrupt)
}


@dataclass(frozen=True, slots=True)
class Match:
    """Which requests a rule hits: those that fit every field that is given."""

    operation: str | None = None
    method: str | None = None
    bucket: str | None = None
    key: str | None = None
    """A glob, `*` matching slashes too."""
    key_regex: str | None = None
    """Searched for in the key."""
    part_number: int | None = None
    nth: int = 1
    """The first of the fitting requests to hit, counted from 1."""
    count: int | None = None
    """How many to hit at most; all of them unless given, or just the one if only `nth` is given."""
    probability: float = 1.0
    seed: int = 0
    """Of the rule's own random numbers, for `probability`."""

    def fits(self, request: Request) -> bool:
        """Whether the request is one of those."""
        return (
            self.operation in (None, request.operation)
            and self.method in (None, request.method)
            and self.bucket in (None, request.bucket)
            and self.part_number in (None, request.part_number)
            and (self.key is None or fnmatch.fnmatchcase(request.key, self.key))
            and (self.key_regex is None or re.search(self.key_regex, request.key) is not None)
        )

    @property
    def limit(self) -> int | None:
        """How many hits there can be."""
        return 1 if self.count is None and self.nth > 1 else self.count


class FaultRule:
    """One rule in force."""

    def __init__(self, rule_id: int, match: Match, action: Action) -> None:
        """Not hit yet."""
        self.rule_id = rule_id
        self.match = match
        self.action = action
        self._random = random.Random(match.seed)
        self._changed = threading.Condition()
        self._fitting = 0
        self._hits = 0
        self._released = False
        self._held: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()

    @property
    def hits(self) -> int:
        """Requests that this rule was applied to. It is chosen when their headers have come."""
        return self._hits

    @property
    def held(self) -> int:
        """Requests that this rule stalls now."""
        return len(self._held)

    def wait_hits(self, count: int = 1, timeout: float = 10.0) -> None:
        """Block until the rule has hit `count` requests, at most `timeout` seconds.

        Raises:
            TimeoutError: it has not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._hits >= count, timeout):
                raise TimeoutError(f"{self.action} hit {self._hits} requests, not {count}, in {timeout} s")

    def wait_held(self, count: int = 1, timeout: float = 10.0) -> None:
        """Block until the rule stalls `count` requests at once, at most `timeout` seconds.

        Raises:
            TimeoutError: it does not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._held) >= count, timeout):
                raise TimeoutError(f"{self.action} holds {self.held} requests, not {count}, after {timeout} s")

    def release(self) -> None:
        """Let every request go on that this rule stalls, and stall no more."""
        with self._changed:
            self._released = True
            for loop, future in self._held:
                loop.call_soon_threadsafe(_finish, future)
            self._held.clear()

    def takes(self, request: Request) -> bool:
        """Whether the rule hits this request; counts it."""
        if not self.match.fits(request):
            return False
        with self._changed:
            self._fitting += 1
            limit = self.match.limit
            if self._fitting < self.match.nth or (limit is not None and self._hits >= limit):
                return False
            if self.match.probability < 1 and self._random.random() >= self.match.probability:
                return False
            self._hits += 1
            self._changed.notify_all()
            return True

    async def hold(self, seconds: float | None) -> None:
        """Wait until the rule is released, or so many seconds."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        entry = (loop, future)
        with self._changed:
            if self._released:
                return
            self._held.add(entry)
            self._changed.notify_all()
        try:
            await asyncio.wait((future,), timeout=seconds)
        finally:
            with self._changed:
                self._held.discard(entry)

    def as_json(self) -> dict[str, Any]:
        """The rule for `GET /_control/faults`."""
        return {"id": self.rule_id, "hits": self.hits, "held": self.held, **rule_as_json(self.match, self.action)}


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Plan:
    """What the rules do to one request."""

    __slots__ = ("_rules",)

    def __init__(self, rules: list[FaultRule]) -> None:
        """Take the rules that hit it."""
        self._rules = rules

    def at(self, stage: Stage) -> list[FaultRule]:
        """The rules that act at a stage, in order."""
        return [rule for rule in self._rules if getattr(rule.action, "at", None) == stage]

    def of(self, kind: type[Action]) -> list[FaultRule]:
        """The rules with one kind of action, in order."""
        return [rule for rule in self._rules if isinstance(rule.action, kind)]

    def rate(self, way: Literal["up", "down"]) -> float | None:
        """The slowest rate asked for, in bytes per second."""
        rates = [getattr(rule.action, way) for rule in self.of(Slow)]
        return min((rate for rate in rates if rate), default=None)


class Faults:
    """The rules in force."""

    def __init__(self) -> None:
        """Start without any."""
        self._lock = threading.Lock()
        self._rules: tuple[FaultRule, ...] = ()
        self._ids = itertools.count(1)

    def add(self, action: Action, **match: str | float | None) -> FaultRule:
        """Do this to the requests that fit; the names of `match` are the fields of `Match`."""
        with self._lock:
            rule = FaultRule(next(self._ids), Match(**match), action)  # type: ignore[arg-type]
            self._rules = (*self._rules, rule)
            return rule

    def remove(self, rule: FaultRule) -> None:
        """Take one rule away and let its stalled requests go on."""
        with self._lock:
            self._rules = tuple(kept for kept in self._rules if kept is not rule)
        rule.release()

    def clear(self) -> None:
        """Take all rules away and let stalled requests go on."""
        with self._lock:
            rules, self._rules = self._rules, ()
        for rule in rules:
            rule.release()

    def rules(self) -> tuple[FaultRule, ...]:
        """The rules, in the order in which they act."""
        return self._rules

    def plan(self, request: Request) -> Plan | None:
        """What to do to a request: None for nothing."""
        if not self._rules:
            return None
        taken = [rule for rule in self._rules if rule.takes(request)]
        return Plan(taken) if taken else None


def rule_as_json(match: Match, action: Action) -> dict[str, Any]:
    """A rule as the body of `POST /_control/faults`."""
    given = {field.name: getattr(match, field.name) for field in fields(Match)}
    return {
        "match": {name: value for name, value in given.items() if value is not None},
        "action": {"kind": type(action).__name__.lower(), **asdict(action)},
    }


def rule_from_json(data: dict[str, Any]) -> tuple[Action, dict[str, Any]]:
    """Action and match of a rule in JSON.

    Raises:
        ValueError: the kind of action or a field is unknown.
    """
    action = dict(data.get("action", {}))
    kind = ACTIONS.get(str(action.pop("kind", "")))
    if kind is None:
        raise ValueError(f"action.kind is one of {', '.join(ACTIONS)}")
    match = dict(data.get("match", {}))
    try:
        Match(**match)
        return kind(**action), match
    except TypeError as error:
        raise ValueError(str(error)) from error
