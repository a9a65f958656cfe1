"""To leave a machine that is no good: nothing is done on it any more until SaladCloud has moved us."""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from heeler.drain import Drain
from heeler.errors import UnavailableError
from heeler.platform.imds import Imds
from heeler.sources.base import SourceUnavailableError
from heeler.status import Status

_FIRST_RETRY = 1.0
_LONGEST_RETRY = 60.0
_AGAIN = 600.0
"""Seconds after which we ask again for a move that was granted but has not happened."""


async def leave_if_unfit(reasons: Sequence[str], imds: Imds | None, drain: Drain, status: Status) -> None:
    """Return at once on a fit machine; leave any other, if somebody can move us.

    Args:
        reasons: What `check_machine` found.
        imds: Who can move us.
        drain: Tells when to stop.
        status: Told of it.

    Raises:
        UnavailableError: The machine is unfit, and nobody can move us.
    """
    if not reasons:
        return
    status.fault("machine_unfit", reasons=reasons)
    words = f"this machine is unfit: {'; '.join(reasons)}"
    if imds is None:
        raise UnavailableError(words)
    await leave_machine(imds, words, drain, status)


async def leave_machine(imds: Imds, reason: str, drain: Drain, status: Status) -> None:
    """Ask for another machine until we are told to stop, which the move does; take no job meanwhile."""
    retry = _FIRST_RETRY
    while not drain.requested.is_set():
        try:
            await imds.reallocate(reason)
            status.event("reallocation_asked", reason=reason)
            rest = _AGAIN
        except SourceUnavailableError as error:
            rest, retry = retry, min(_LONGEST_RETRY, retry * 2)
            status.fault("reallocation_failed", error=str(error), retry_in=rest)
        with anyio.move_on_after(rest):
            await drain.requested.wait()
