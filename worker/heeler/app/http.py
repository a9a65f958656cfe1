"""App mode: each job is one POST to the user's app, its body byte for byte, its answer the job's result."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from functools import partial
from urllib.parse import quote

import anyio

from heeler.app.base import Assignment, GivenUp
from heeler.app.program import Life, Program, grace_of
from heeler.app.readiness import Address, Readiness
from heeler.drain import Drain
from heeler.http import Answer, NoAnswerError, SilentError, TooLargeError
from heeler.job import Ending, Job, Outcome, Result
from heeler.scopes import Signal
from heeler.tasks import background

_TRANSIENT = {429, 502, 503, 504}
"""What an app, or a proxy in front of it, answers when the same request may succeed in a moment (RFC 9110, 6585)."""
_FATE_SECONDS = 0.5
_LONGEST_RETRY_AFTER = 3600.0
_IN_TARGET = "/?%:@!$&'()*+,;=[]~"
"""What stands in a path and query besides letters and digits (RFC 3986); all else of a queue's path is quoted."""
_OUT_OF_HEADER = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class HttpSettings:
    """What app mode has to know.

    Attributes:
        path: Where to POST jobs of queues that name no path.
        start_timeout: Seconds that the app may take to be ready for a job that is there.
        silence: Seconds without a byte after which the app counts as hanging.
        timeout: Seconds that one job may take in all.
        answer_bytes: The largest answer.
    """

    path: str
    start_timeout: float
    silence: float
    timeout: float
    answer_bytes: int


class HttpDelivery:
    """POSTs jobs to the app. Any number at a time."""

    def __init__(
        self, settings: HttpSettings, program: Program | None, readiness: Readiness, wall: Callable[[], float]
    ) -> None:
        """Args: the settings, the app's process if it is ours, what knows its health, and seconds since 1970."""
        self._settings = settings
        self._program = program
        self._readiness = readiness
        self._wall = wall
        self._calls = 0
        self._spoiled: Life | None = None

    async def run(self) -> None:
        """As `Delivery.run`: keeps the program running, and looks after its health."""
        async with background(self._readiness.run):
            if self._program is not None:
                await self._program.run()
            await anyio.sleep_forever()

    @property
    def available(self) -> bool:
        """As `Delivery.available`."""
        return self._readiness.available

    async def ready(self) -> bool:
        """As `Delivery.ready`."""
        program = self._program
        if program is None:
            await self._readiness.ready()
            return True
        with anyio.CancelScope() as scope:
            async with background(partial(_cancel_when_given_up, program, scope)):
                await self._readiness.ready()
        return program.given_up is None

    @property
    def unready(self) -> Signal:
        """As `Delivery.unready`."""
        return self._readiness.unready

    def given_up(self) -> GivenUp | None:
        """As `Delivery.given_up`."""
        return self._program.given_up if self._program is not None else None

    async def deliver(self, assignment: Assignment, drain: Drain) -> Ending:
        """As `Delivery.deliver`."""
        if (ending := await self._reached(assignment.job, drain)) is not None:
            return ending
        watch = _Watch(self._program, drain, self._settings.timeout, lambda: self._calls == 1, self._readiness.spoiled)
        self._readiness.enter()
        self._calls += 1
        try:
            ending = await self._call(assignment, watch)
        finally:
            self._calls -= 1
            self._readiness.leave()
            with anyio.CancelScope(shield=True):
                await self._leave_behind(drain, watch)
        if ending.outcome is Outcome.DONE and self._program is not None:
            self._program.proved()
        return ending

    async def _reached(self, job: Job, drain: Drain) -> Ending | None:
        """Wait until the app can take the job; why it could not, if so."""
        if job.target is not None and job.target.port is not None and self._readiness.learn(job.target.port):
            await self._readiness.look()
        if self.available:
            return None
        with anyio.move_on_after(self._settings.start_timeout), drain.requested.ends():
            if await self.ready():
                return None
        if drain.requested.is_set():
            return Ending(Outcome.RELEASE, drain.words)
        given_up = self.given_up()
        if given_up is not None:
            return Ending(Outcome.RELEASE, given_up.reason, fruitless=True)
        where = self._readiness.address or "it listens on no port"
        return Ending(Outcome.RETRY, f"the app was not ready within {self._settings.start_timeout:g} s ({where})")

    async def _call(self, assignment: Assignment, watch: _Watch) -> Ending:
        address = self._readiness.address
        if address is None:
            watch.abandoned = False
            return Ending(Outcome.RETRY, "nobody says where the app answers: set --app-url")
        answer = await watch.answer(partial(self._post, address, assignment), assignment)
        if isinstance(answer, Answer) and 200 <= answer.status < 300:
            assignment.ended()
            return self._judge(answer)
        if watch.drained:
            whole = await watch.farewell(assignment)
            assignment.ended()
            return Ending(Outcome.RELEASE, watch.drain.words, whole=whole)
        assignment.ended()
        if watch.timed_out:
            return Ending(Outcome.RETRY, f"the app took longer than {self._settings.timeout:g} s")
        return self._judge(answer) if isinstance(answer, Answer) else await self._no_answer(answer, watch.life)

    async def _post(self, address: Address, assignment: Assignment) -> Answer | Exception:
        job, settings = assignment.job, self._settings
        path = address.base + quote(job.target.path if job.target is not None else settings.path, safe=_IN_TARGET)
        try:
            return await self._readiness.client(address).call(
                "POST",
                path,
                headers=headers_of(assignment),
                body=job.body,
                silence=settings.silence,
                limit=settings.answer_bytes,
            )
        except (NoAnswerError, TooLargeError) as error:
            return error

    async def _no_answer(self, error: Exception | None, life: Life | None) -> Ending:
        if isinstance(error, TooLargeError):
            outcome = Outcome.RETRY if _may_pass(error.status) else Outcome.FAIL
            return Ending(outcome, f"{error}: raise --app-answer-bytes if the queue takes more, or store outputs")
        if isinstance(error, SilentError):
            return Ending(Outcome.RETRY, f"the app hangs: {error}")
        fate = await _fate(life)
        await self._readiness.look()
        reason = f"the app gave no answer: {error}" + (f"; it ended with {fate}" if fate else "")
        return Ending(Outcome.RETRY, reason, transient=True)

    def _judge(self, answer: Answer) -> Ending:
        """The table of outcomes (DESIGN 4)."""
        result = Result(status=answer.status, body=answer.body)
        if 200 <= answer.status < 300:
            return Ending(Outcome.DONE, "", result, whole=True)
        reason = f"the app answered {answer.status}"
        if _may_pass(answer.status):
            delay = retry_after(answer.headers, self._wall())
            return Ending(Outcome.RETRY, reason, result, delay=delay, transient=answer.status in _TRANSIENT)
        return Ending(Outcome.FAIL, reason, result)

    async def _leave_behind(self, drain: Drain, watch: _Watch) -> None:
        """An abandoned call leaves an app that may still compute for a job that is not ours any more.

        It is started anew, once no other job is with it, and in a drain only ended; one that is not our process is
        left alone, and that is said.
        """
        if self._program is None:
            if watch.abandoned:
                self._readiness.left_alone()
            return
        if watch.abandoned and watch.life is not None:
            self._spoiled = watch.life
            self._readiness.spoiled(watch.life)
        if self._spoiled is None or self._calls > 0:
            return
        spoiled, self._spoiled = self._spoiled, None
        if spoiled is not self._program.life:
            return
        if drain.everything:
            await self._program.stop(grace=0.0)
        else:
            await self._program.restart()


class _Watch:
    """Ends a call when its time or ours is over.

    Attributes:
        life: The program's, when the call began.
        abandoned: Whether the app may still work for the call.
        timed_out: Whether it took longer than it may.
        drained: Whether we were told to stop meanwhile.
    """

    def __init__(
        self,
        program: Program | None,
        drain: Drain,
        timeout: float,
        alone: Callable[[], bool],
        spoil: Callable[[Life], None],
    ) -> None:
        self.life = program.life if program is not None else None
        self.drain = drain
        self._alone = alone
        self._spoil = spoil
        self._timeout = timeout
        self._until = math.inf
        self.abandoned = True
        self.timed_out = False
        self.drained = False

    async def answer(
        self, post: Callable[[], Awaitable[Answer | Exception]], assignment: Assignment
    ) -> Answer | Exception | None:
        """What the call gives; None if it was ended."""
        with anyio.move_on_after(self._timeout) as scope:
            async with self.drain.requested.starts(partial(self._stop_in_drain, assignment, scope)):
                answer = await post()
                self.abandoned = isinstance(answer, SilentError)
                return answer
        self.timed_out = not self.drained
        return None

    async def farewell(self, assignment: Assignment) -> bool:
        """In a drain: wait for the program's end and end it after its grace; whether it ended by itself."""
        life = self.life
        if life is None or not life.told:
            return False
        with anyio.CancelScope(deadline=await self._grace_end(assignment)):
            await self._over_or_hurried(life)
        killed = life.how is None
        if killed:
            await life.child.kill()
        await life.over.wait()
        self.abandoned = False
        return not killed and life.how is not None and life.how.code is not None and not life.child.stuck

    async def _stop_in_drain(self, assignment: Assignment, scope: anyio.CancelScope) -> None:
        """Tell the program to stop: it may answer yet, or its end closes the connection."""
        self.drained = True
        if not self.drain.everything and not self._alone():
            scope.cancel()  # the others' jobs go on; the program is started anew after the last of them
            return
        if not self.drain.everything and self.life is not None:
            self._spoil(self.life)  # no other lane is to give a job to a program that ends
        scope.deadline = math.inf
        if self.life is not None:
            self.life.terminate()
        with anyio.CancelScope(deadline=await self._grace_end(assignment)):
            await self._over_or_hurried(self.life)
            await anyio.sleep(_FATE_SECONDS)  # its last answer is perhaps still being read
        scope.cancel()

    async def _grace_end(self, assignment: Assignment) -> float:
        """Until when the program may take to end by itself."""
        if math.isinf(self._until):
            reserve = await assignment.reserve()
            self._until = anyio.current_time() + grace_of(self.drain, reserve)
        return self._until

    async def _over_or_hurried(self, life: Life | None) -> None:
        with self.drain.hurried.ends():
            await (life.over.wait() if life is not None else anyio.sleep_forever())


def headers_of(assignment: Assignment) -> dict[str, str]:
    """What the app is told with a job (DESIGN 4): the queue's own convention, and our names."""
    job = assignment.job
    folders = {
        f"Heeler-{name}-Dir": assignment.environment.get(f"HEELER_{name.upper()}_DIR")
        for name in ("Input", "Checkpoint", "Output")
    }
    said = {
        "Content-Type": "application/json",
        **job.headers,
        "Heeler-Job-Id": job.id,
        "Heeler-Attempt": str(assignment.attempt),
        **({"Heeler-Job-Index": str(job.index)} if job.index is not None else {}),
        **{name: path for name, path in folders.items() if path is not None},
    }
    return {name: _utf8(value) for name, value in said.items() if not _OUT_OF_HEADER.search(value)}


def _utf8(value: str) -> str:
    """What goes over the wire, byte by byte, as the value's UTF-8; of file names, the bytes that they have."""
    return value.encode("utf-8", "surrogateescape").decode("latin-1")


def retry_after(headers: Mapping[str, str], now: float) -> float:
    """The seconds that a `Retry-After` asks for, an hour at the most; 0 without one (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return min(_LONGEST_RETRY_AFTER, float(value[:9]))
    try:
        when = parsedate_to_datetime(value)
        utc = when if when.tzinfo is not None else when.replace(tzinfo=timezone.utc)
        return min(_LONGEST_RETRY_AFTER, max(0.0, utc.timestamp() - now))
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _may_pass(status: int) -> bool:
    """Whether another attempt may be answered otherwise."""
    return status in (408, 429) or status >= 500


async def _fate(life: Life | None) -> str:
    """How the program ended, if a closed connection was its end."""
    if life is None:
        return ""
    with anyio.move_on_after(_FATE_SECONDS):
        await life.over.wait()
    return str(life.how or "")


async def _cancel_when_given_up(program: Program, scope: anyio.CancelScope) -> None:
    while program.given_up is None:
        await program.changed.wait()
    scope.cancel()
