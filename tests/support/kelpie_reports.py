"""How jobs of Kelpie's are ended in tests, and how tests wait for it in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from heeler.job import Result
from heeler.sources.base import (
    Lease,
    SourceUnavailableError,
)
from tests.support.kelpie_script import INTERVAL, Called, Room, Weather

OK, BAD = Result(exit_code=0), Result(exit_code=3)
LAPSE = 2 * INTERVAL + 1.0

Report = Callable[[Lease], Awaitable[None]]
REPORTS: dict[str, Report] = {
    "completed": lambda lease: lease.complete(OK),
    "failed": lambda lease: lease.retry("exit code 3", result=BAD, delay=1.0),
}
SETTLES: dict[str, Report] = {
    **REPORTS,
    "given up": lambda lease: lease.fail("never", result=BAD),
    "released": lambda lease: lease.release(),
}


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - in virtual time
        await anyio.sleep(0.1)


async def settled(call: Callable[[], Awaitable[None]]) -> None:
    """As the forwarder does it: again and again."""
    while True:
        try:
            return await call()
        except SourceUnavailableError:
            await anyio.sleep(0.2)


def once(kind: str, how: Weather) -> Callable[[Called], Weather]:
    """The next call of a kind fails so."""
    left = [how]
    return lambda call: left.pop() if call.kind == kind and left else ""


def words(room: Room) -> list[Path]:
    """What siblings have left for who has a lock."""
    return [path for path in (room.folder / "shared").rglob("*") if "~" in path.name]
