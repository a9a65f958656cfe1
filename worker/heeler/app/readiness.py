"""Where the app answers, and whether it can take a job: by its port, or by a path of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from heeler.app.ports import listening
from heeler.app.processes import in_session, tagged
from heeler.app.program import Life, Program
from heeler.errors import UsageError
from heeler.http import HttpClient, NoAnswerError, TooLargeError
from heeler.scopes import Signal

_HEALTH_SECONDS = 5.0
_LOOK_SECONDS = 5.0
_PATIENCE_SECONDS = 10.0
"""So long an app may take to be ready before people are told what is still amiss."""
_FIRST_LOOK, _LONGEST_LOOK = 0.05, 1.0


_SPOILED = "it may still work on a job that ended"


@dataclass(frozen=True)
class Address:
    """Where the app answers: a host, a port, and what comes before every path."""

    host: str
    port: int
    base: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.base}"


def parse_app_url(url: str) -> Address:
    """The address in a setting.

    Raises:
        UsageError: It is none.
    """
    try:
        parts = urlsplit(url)
        port = 80 if parts.port is None else parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    odd = not url.isascii() or not url.isprintable() or " " in url or "?" in url or "#" in url
    if odd or parts.scheme != "http" or not parts.hostname or parts.username is not None or not port:
        shown = "" if "@" in url else f" is {url!r}, but"  # it may hold a password
        raise UsageError(f"--app-url{shown} must be like http://127.0.0.1:8080")
    return Address(parts.hostname, port, parts.path.rstrip("/"))


@dataclass
class _Open:
    """Whether jobs may come: two signals, of which one is set."""

    ready: Signal = field(default_factory=Signal)
    unready: Signal = field(default_factory=Signal)


class Readiness:
    """Owns what we know of the app's address and health. `run` keeps it up to date."""

    def __init__(
        self,
        program: Program | None,
        address: Address | None,
        health_path: str | None,
        on_event: Callable[..., None],
        on_fault: Callable[..., None],
    ) -> None:
        """Args.

        program: The app, if it is a process of ours.
        address: Where it answers, if somebody said so.
        health_path: Answered with 2xx while it can take a job; None: its port answers.
        on_event: Told when it gets ready.
        on_fault: Told when it no longer is.
        """
        self._program = program
        self._given = address
        self._learnt: Address | None = None
        self._found: Address | None = None
        self._found_in: Life | None = None
        self._spoiled: Life | None = None
        self._health_path = health_path
        self._on_event = on_event
        self._on_fault = on_fault
        self._open = _Open()
        self._open.unready.set()
        self._unready_since: float | None = None
        self._told_why = ""
        self._busy = 0
        self._clients: dict[Address, HttpClient] = {}
        if program is None and address is None:
            self._note(ready=True, why="")  # the first job says where it answers

    @property
    def address(self) -> Address | None:
        """Where the app answers, as far as we know: as the settings say, else the queue, else the program's port."""
        return self._given or self._learnt or self._found

    @property
    def available(self) -> bool:
        """Whether it can take a job now."""
        return self._open.ready.is_set()

    async def ready(self) -> None:
        """Return when it can."""
        await self._open.ready.wait()

    @property
    def unready(self) -> Signal:
        """Set when it can't; another one each time that it can again."""
        return self._open.unready

    def learn(self, port: int) -> bool:
        """The queue says on which port it answers; whether that is new to us, and counts."""
        known, self._learnt = self._learnt, Address("localhost", port)
        return self._given is None and known != self._learnt

    def client(self, address: Address) -> HttpClient:
        """The connections to an address."""
        if address not in self._clients:
            self._clients[address] = HttpClient(address.host, address.port)
        return self._clients[address]

    def enter(self) -> None:
        """A job is with the app: it is not asked meanwhile, since many apps do one thing at a time."""
        self._busy += 1

    def leave(self) -> None:
        """The job is not with it any more."""
        self._busy -= 1

    def spoiled(self, life: Life) -> None:
        """It can't take a job until it was started anew."""
        self._spoiled = life
        if self._program is not None and self._program.life is life:
            self._note(ready=False, why=_SPOILED)

    def left_alone(self) -> None:
        """A call was abandoned, and the app is not ours to start anew: all that we can do is to say so."""
        words = "it may still work on a job that ended: give it a --app-health-path that tells when it is idle"
        self._on_fault("app_left_alone", error=words)

    async def run(self) -> None:
        """Look again and again."""
        pause = _FIRST_LOOK
        try:
            while True:
                changed = self._program.changed if self._program is not None else anyio.Event()
                if self._busy == 0 or not self.available or self._dead():
                    await self.look()
                if self.available:
                    pause = _FIRST_LOOK
                    with anyio.move_on_after(_LOOK_SECONDS), self.unready.ends():
                        await changed.wait()
                    continue
                pause = min(_LONGEST_LOOK, pause * 2)
                with anyio.move_on_after(pause):
                    await changed.wait()
                    pause = _FIRST_LOOK
        finally:
            for client in self._clients.values():
                client.close()

    async def look(self) -> None:
        """Find out whether it can take a job now."""
        why = await self._why_not() or self._amiss()  # which may have come to be meanwhile
        self._note(ready=why is None, why=why or "")

    def _amiss(self) -> str | None:
        """What is wrong with the process, whatever it answers."""
        if self._program is None:
            return None
        if self._program.life is None:
            return "it is not running"
        return _SPOILED if self._program.life is self._spoiled else None

    def _dead(self) -> bool:
        return self._program is not None and self._program.life is None

    async def _why_not(self) -> str | None:
        if (why := self._amiss()) is not None:
            return why
        if self._program is not None and self._program.life is not self._found_in:
            self._found, self._found_in = None, self._program.life  # each life may listen elsewhere
        if self.address is None and self._program is not None:
            ports = await self._ports(self._program)
            if len(ports) > 1:
                return f"it listens on several ports {ports}: say which with --app-url http://127.0.0.1:PORT"
            for port in ports:
                self._found = Address("localhost", port)
        if self.address is None:
            return "it does not listen on a port yet" if self._program is not None else None
        return await self._ask(self.address)

    async def _ports(self, program: Program) -> list[int]:
        life = program.life
        if life is None:
            return []
        start = life.child.started
        return sorted(await anyio.to_thread.run_sync(lambda: listening({*tagged(start.tag), *in_session(start.group)})))

    async def _ask(self, address: Address) -> str | None:
        if self._health_path is None:
            return await _connects(address)
        path = address.base + self._health_path
        try:
            with anyio.fail_after(_HEALTH_SECONDS):
                answer = await self.client(address).call("GET", path, headers={})
        except TimeoutError:
            return f"{address}{self._health_path} does not answer within {_HEALTH_SECONDS:g} s"
        except (NoAnswerError, TooLargeError) as error:
            return f"{address}{self._health_path}: {error}"
        return None if 200 <= answer.status < 300 else f"{address}{self._health_path} answers {answer.status}"

    def _note(self, *, ready: bool, why: str) -> None:
        if ready == self.available:
            if not ready:
                self._still_not(why)
            return
        before, self._open = self._open, _Open()
        self._unready_since, self._told_why = None, ""
        if ready:
            before.ready.set()
            self._open.ready.set()
            self._on_event("app_ready", address=str(self.address or ""))
        else:
            before.unready.set()
            self._open.unready.set()
            self._tell(why)

    def _still_not(self, why: str) -> None:
        """Say why, once it has taken long; and again when it is another reason."""
        if self._unready_since is None:
            self._unready_since = anyio.current_time()
        if why != self._told_why and anyio.current_time() - self._unready_since >= _PATIENCE_SECONDS:
            self._tell(why)

    def _tell(self, why: str) -> None:
        self._told_why = why
        self._on_fault("app_not_ready", error=why)


async def _connects(address: Address) -> str | None:
    try:
        with anyio.fail_after(_HEALTH_SECONDS):
            stream = await anyio.connect_tcp(address.host, address.port)
    except (OSError, TimeoutError):
        return f"nothing answers on port {address.port}"
    await stream.aclose()
    return None
