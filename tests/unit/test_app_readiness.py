"""Where an app answers and whether it can take a job; with real servers on loopback and a scripted program."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from heeler.app import readiness as readiness_module
from heeler.app.process import Exit
from heeler.app.readiness import Address, Readiness, parse_app_url
from heeler.errors import UsageError
from heeler.local.processes import free_port
from tests.support.apps import FakeProgram, Told
from tests.support.virtual_time import run_virtual


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness_module, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(readiness_module, "_LONGEST_LOOK", 0.02)
    monkeypatch.setattr(readiness_module, "_FIRST_LOOK", 0.005)


class Server:
    """Answers each request with a status; None does not answer."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.requests: list[str] = []
        self.connections = 0
        self.port = 0

    async def handle(self, stream: SocketStream) -> None:
        self.connections += 1
        async with stream:
            try:
                while True:
                    request = await stream.receive()
                    self.requests.append(request.decode().split("\r\n")[0])
                    if self.status is None:
                        await anyio.sleep_forever()
                    await stream.send(f"HTTP/1.1 {self.status} X\r\nContent-Length: 2\r\n\r\nok".encode())
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return


@asynccontextmanager
async def serving(port: int = 0) -> AsyncIterator[Server]:
    server = Server()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=port)
    server.port = listener.extra(SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, server.handle)
        yield server
        group.cancel_scope.cancel()


class World:
    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch | None = None,
        *,
        ports: set[int] | None = None,
        address: Address | None = None,
        health: str | None = None,
    ) -> None:
        self.told = Told()
        self.program = FakeProgram() if monkeypatch is not None else None
        self.ports = ports if ports is not None else set()
        if monkeypatch is not None:
            monkeypatch.setattr(readiness_module, "listening", lambda _pids: self.ports)
        self.readiness = Readiness(self.program, address, health, self.told, self.told)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Readiness]:
        async with anyio.create_task_group() as group:
            group.start_soon(self.readiness.run)
            with anyio.fail_after(10):
                yield self.readiness
            group.cancel_scope.cancel()

    def die(self) -> None:
        assert self.program is not None
        self.program.child.end(Exit(1, None))
        self.program.life = None
        self.program._tell()

    def live(self) -> None:
        assert self.program is not None
        self.program.begin()
        self.program._tell()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await anyio.sleep(0.002)


def at(server: Server) -> Address:
    return Address("127.0.0.1", server.port)


pytestmark = pytest.mark.anyio


async def test_an_app_is_ready_when_its_port_answers() -> None:
    port = free_port()
    world = World(address=Address("127.0.0.1", port))
    async with world.running() as readiness:
        await anyio.sleep(0.1)
        assert not readiness.available
        async with serving(port):
            await readiness.ready()
            assert readiness.available
        await readiness.unready.wait()
        assert not readiness.available
        async with serving(port):
            await readiness.ready()
    assert world.told.names() == ["app_ready", "app_not_ready", "app_ready"]
    assert str(port) in str(world.told.of("app_not_ready"))


@pytest.mark.parametrize("status", [503, 500, 404, 302])
async def test_with_a_health_path_its_answer_counts(status: int) -> None:
    async with serving() as server:
        world = World(address=Address("127.0.0.1", server.port, "/base"), health="/health?deep=1")
        server.status = status
        async with world.running() as readiness:
            await until(lambda: len(server.requests) > 2)
            assert not readiness.available
            server.status = 201
            await readiness.ready()
            server.status = status
            await readiness.unready.wait()
    assert set(server.requests) == {"GET /base/health?deep=1 HTTP/1.1"}
    assert f"answers {status}" in str(world.told.of("app_not_ready"))
    assert server.connections == 1, "the connection is kept"


async def test_a_health_path_that_hangs_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness_module, "_HEALTH_SECONDS", 0.05)
    async with serving() as server:
        world = World(address=at(server), health="/health")
        async with world.running() as readiness:
            await readiness.ready()
            server.status = None
            await readiness.unready.wait()
            server.status = 200
            await readiness.ready()
    assert "within 0.05 s" in str(world.told.of("app_not_ready"))


async def test_the_port_that_the_program_listens_on_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        world = World(monkeypatch)
        async with world.running() as readiness:
            await anyio.sleep(0.1)
            assert not readiness.available
            world.ports.add(server.port)
            await readiness.ready()
            assert readiness.address == Address("localhost", server.port)


async def test_several_ports_are_a_fault_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness_module, "_PATIENCE_SECONDS", 0.05)
    world = World(monkeypatch, ports={8081, 8080})
    async with world.running() as readiness:
        await until(lambda: world.told.all)
        assert not readiness.available
        await anyio.sleep(0.1)
    assert len(world.told.all) == 1, "said once"
    (fault,) = world.told.of("app_not_ready")
    assert "[8080, 8081]" in str(fault["error"])
    assert "--app-url http://127.0.0.1:PORT" in str(fault["error"])


def test_why_it_is_not_ready_is_said_after_a_while_and_again_when_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness_module, "_LOOK_SECONDS", 5.0)
    monkeypatch.setattr(readiness_module, "_LONGEST_LOOK", 1.0)

    async def run() -> list[tuple[float, object]]:
        said: list[tuple[float, object]] = []
        begun = anyio.current_time()
        why = ["it does not listen on a port yet"]
        readiness = Readiness(
            None,
            Address("x", 1),
            None,
            lambda name, **_: said.append((anyio.current_time() - begun, name)),
            lambda _name, error: said.append((anyio.current_time() - begun, error)),
        )

        async def ask(address: Address) -> str | None:
            return why[0] or None

        readiness._ask = ask  # type: ignore[method-assign]
        async with anyio.create_task_group() as group:
            group.start_soon(readiness.run)
            await anyio.sleep(60)
            why[0] = "another reason"
            await anyio.sleep(60)
            why[0] = ""
            await anyio.sleep(60)
            why[0] = "it broke"
            await anyio.sleep(60)
            group.cancel_scope.cancel()
        return said

    said = run_virtual(run)
    assert [what for _, what in said] == [
        "it does not listen on a port yet",
        "another reason",
        "app_ready",
        "it broke",
    ]
    times = [when for when, _ in said]
    assert 10 <= times[0] < 12
    assert 60 <= times[1] < 62
    assert 120 <= times[2] < 122
    assert 180 <= times[3] <= 186


async def test_an_app_that_dies_is_unready_at_once_and_its_next_life_may_listen_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as first, serving() as second:
        world = World(monkeypatch, ports={first.port})
        async with world.running() as readiness:
            await readiness.ready()
            monkeypatch.setattr(readiness_module, "_LOOK_SECONDS", 1000.0)
            await anyio.sleep(0.05)
            world.die()
            await readiness.unready.wait()
            world.ports = {second.port}
            world.live()
            await readiness.ready()
            assert readiness.address == Address("localhost", second.port)
    assert world.told.of("app_not_ready") == [{"error": "it is not running"}]


async def test_a_new_life_is_noticed_even_if_nobody_saw_the_old_one_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as second:
        async with serving() as first:
            world = World(monkeypatch, ports={first.port})
            await world.readiness.look()
            assert world.readiness.available
        world.ports = {second.port}
        world.live()
        await world.readiness.look()
        assert world.readiness.available
        assert world.readiness.address == Address("localhost", second.port)


async def test_a_death_is_seen_while_jobs_are_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        world = World(monkeypatch, ports={server.port})
        async with world.running() as readiness:
            await readiness.ready()
            readiness.enter()
            world.die()
            await readiness.unready.wait()


async def test_while_a_job_is_with_it_it_is_not_asked() -> None:
    async with serving() as server:
        world = World(address=at(server), health="/health")
        async with world.running() as readiness:
            await readiness.ready()
            readiness.enter()
            readiness.enter()
            readiness.leave()
            await anyio.sleep(0.05)
            asked = len(server.requests)
            await anyio.sleep(0.2)
            assert len(server.requests) == asked
            readiness.leave()
            await until(lambda: len(server.requests) > asked)


async def test_a_spoiled_life_can_take_no_job_and_the_next_one_can(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        world = World(monkeypatch, ports={server.port})
        async with world.running() as readiness:
            await readiness.ready()
            assert world.program is not None
            life = world.program.life
            assert life is not None
            readiness.spoiled(life)
            assert not readiness.available
            await anyio.sleep(0.1)
            assert not readiness.available
            world.live()
            await readiness.ready()
            readiness.spoiled(life)
            assert readiness.available, "that was an earlier life"


async def test_the_settings_win_over_the_queue_and_the_queue_over_what_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as server:
        world = World(monkeypatch, ports={server.port})
        await world.readiness.look()
        assert world.readiness.learn(1)
        assert not world.readiness.learn(1)
        assert world.readiness.learn(2)
        assert world.readiness.address == Address("localhost", 2)
        await world.readiness.look()
        assert not world.readiness.available
    given = World(address=Address("app", 7)).readiness
    assert not given.learn(2)
    assert given.address == Address("app", 7)


async def test_where_only_the_queue_knows_the_first_job_may_come() -> None:
    async with serving() as server:
        world = World()
        async with world.running() as readiness:
            assert readiness.available
            await anyio.sleep(0.05)
            assert readiness.available
            assert readiness.learn(server.port)
            await readiness.look()
            assert readiness.available
            assert readiness.learn(free_port())
            await readiness.look()
            assert not readiness.available


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8080", Address("127.0.0.1", 8080)),
        ("http://localhost", Address("localhost", 80)),
        ("http://localhost:8080/", Address("localhost", 8080)),
        ("http://app:8080/v1/x/", Address("app", 8080, "/v1/x")),
        ("http://[::1]:8080", Address("::1", 8080)),
        ("HTTP://App:1", Address("app", 1)),
    ],
)
def test_an_app_url(url: str, address: Address) -> None:
    assert parse_app_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8080",
        "https://localhost",
        "http://",
        "http:///path",
        "http://a:b",
        "http://a:99999",
        "http://[::1",
        "http://u:p@a",
        "http://a/?b",
        "http://a/#b",
        "http://a/b c",
        "http://a/\r\nEvil: 1",
        "http://a/ü",
    ],
)
def test_what_is_no_app_url(url: str) -> None:
    with pytest.raises(UsageError, match="--app-url"):
        parse_app_url(url)
