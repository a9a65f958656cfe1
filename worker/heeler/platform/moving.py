"""To leave a machine that is no good, or a container that is used up: nothing is done until SaladCloud has acted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import anyio

from heeler.drain import Drain
from heeler.errors import UnavailableError
from heeler.platform.imds import Imds
from heeler.sources.base import SourceUnavailableError
from heeler.status import Status

_FIRST_RETRY = 1.0
_LONGEST_RETRY = 60.0
_AGAIN = 600.0
"""Seconds after which we ask again for what was granted but has not happened."""


async def leave_unfit(imds: Imds | None, reason: str, drain: Drain, status: Status) -> None:
    """Leave a machine that is no good, if somebody can move us.

    Args:
        imds: Who can.
        reason: What is wrong with it.
        drain: Tells when to stop.
        status: Told of it.

    Raises:
        UnavailableError: Nobody can.
    """
    status.fault("machine_unfit", error=reason)
    if imds is None:
        raise UnavailableError(f"this machine is unfit: {reason}")
    await leave_machine(imds, reason, drain, status)


async def leave_machine(imds: Imds, reason: str, drain: Drain, status: Status) -> None:
    """Ask for another machine until we are told to stop, which the move does; take no job meanwhile."""
    await _ask(partial(imds.reallocate, reason), "reallocation", drain, status, reason=reason)


async def make_anew(imds: Imds, drain: Drain, status: Status) -> None:
    """Ask for the container to be made anew until we are told to stop, which that does; take no job meanwhile."""
    await _ask(imds.recreate, "recreation", drain, status)


async def _ask(ask: Callable[[], Awaitable[None]], what: str, drain: Drain, status: Status, **fields: object) -> None:
    retry = _FIRST_RETRY
    while not drain.requested.is_set():
        try:
            await ask()
            status.event(f"{what}_asked", **fields)
            rest = _AGAIN
        except SourceUnavailableError as error:
            rest, retry = retry, min(_LONGEST_RETRY, retry * 2)
            status.fault(f"{what}_failed", error=str(error), retry_in=rest)
        with anyio.move_on_after(rest):
            await drain.requested.wait()
