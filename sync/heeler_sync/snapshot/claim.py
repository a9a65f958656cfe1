"""Who wants to hold a prefix, and what that makes of its head. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from heeler_sync.errors import FinishedError, PrefixTakenError
from heeler_sync.snapshot.head import Head
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.swap import fenced_by


@dataclass(frozen=True)
class Claim:
    """Who wants to hold a prefix.

    Attributes:
        job_id: The job that the prefix is to belong to; empty for nobody's.
        run_id: Which run of it.
        attempt: Which delivery of it, from 1.
        holder: Who we are, for people.
        ordered: Whether a higher attempt is always the newer one. Where not, a holder that the queue still calls the
            holder may take the prefix back.
    """

    job_id: str = ""
    run_id: str = ""
    attempt: int = 1
    holder: str = ""
    ordered: bool = True

    def refuse(self, layout: Layout, head: Head) -> None:
        """Refuse a prefix that, by the head that was found, is not to be had.

        Raises:
            FinishedError: The job is done.
            PrefixTakenError: The prefix belongs to another job.
            FencedError: A newer attempt of the job holds it.
        """
        if head.job_id not in ("", self.job_id):
            raise PrefixTakenError(str(layout.location), head.job_id)
        if not head.is_of(self.job_id, self.run_id):
            return
        if head.complete:
            raise FinishedError(dict(head.result or {}))
        if self.ordered and head.attempt > self.attempt:
            raise fenced_by(layout, head)

    def head(self, before: Head | None, adopted: tuple[str, ...], now: float) -> Head:
        """The head that takes the prefix from `before`; `adopted` are packs that must stay."""
        head = before or Head(self.job_id, self.run_id, self.attempt, 0, "", 0.0)
        same = head.is_of(self.job_id, self.run_id)
        return replace(
            head,
            job_id=self.job_id,
            run_id=self.run_id,
            attempt=self.attempt,
            epoch=head.epoch + 1,
            holder=self.holder,
            acquired=now,
            adopted=adopted,
            status="open",
            result=None,
            failures=head.failures if same else 0,
            interruptions=head.interruptions if same else 0,
        )
