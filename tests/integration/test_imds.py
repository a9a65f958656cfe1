"""`Imds` against the stand-in of `heeler local`, over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from heeler.local.imds import ImdsState, create_app
from heeler.local.tokens import Identity, TokenIssuer
from heeler.local.web import serving
from heeler.platform.deletion import FINAL_UPLOAD, DeletionCost
from heeler.platform.imds import Imds, InstanceGoneError
from heeler.sources.base import SourceUnavailableError
from heeler.status import Phase, Status
from heeler.tasks import background

pytestmark = pytest.mark.anyio

IDENTITY = Identity("machine", "org-id", "org", "group-id", "group")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Imds, ImdsState]]:
    state = ImdsState(IDENTITY, TokenIssuer())
    async with serving(create_app(state)) as url:
        imds = Imds(url)
        yield imds, state
        imds.close()


async def test_every_call() -> None:
    async with served() as (imds, state):
        assert await imds.ready()
        state.ready = False
        assert not await imds.ready()
        await imds.set_deletion_cost(5)
        assert await imds.deletion_cost() == 5
        await imds.reallocate("schön " * 1000)
        await imds.recreate()
        await imds.restart()
    assert len(state.reallocations) == len(state.recreations) == len(state.restarts) == 1
    assert {call.status for call in state.calls} <= {200, 204}


async def test_the_token_is_genuine_and_asked_for_once() -> None:
    async with served() as (imds, state):
        token = await imds.token()
        assert state.tokens.verify(token) == IDENTITY
        assert await imds.token() == token
        assert await imds.token(fresh=True) != token
        state.token_lifetime = 0.2
        short = await imds.token(fresh=True)
        assert await imds.token() == short
        await anyio.sleep(0.25)
        assert await imds.token() != short
    assert [call.path for call in state.calls] == ["/v1/token"] * 4


async def test_a_fault_passes_and_the_next_call_succeeds_at_once() -> None:
    async with served() as (imds, state):
        state.fail(500, 1)
        with pytest.raises(SourceUnavailableError, match="500: the metadata service fails"):
            await imds.ready()
        assert await imds.ready()


async def test_a_gone_instance() -> None:
    async with served() as (imds, state):
        state.gone = True
        for call in (imds.status, imds.token, imds.recreate):
            with pytest.raises(InstanceGoneError):
                await call()


async def test_the_service_is_away_and_comes_back_on_another_connection() -> None:
    async with served() as (imds, _):
        assert await imds.ready()
    with pytest.raises(SourceUnavailableError, match="out of reach"):
        await imds.ready()


async def test_the_deletion_cost_follows_a_job() -> None:
    async with served() as (imds, state):
        status = Status(lambda *_: None, worker="w", source="s")

        async def reaches(cost: int) -> None:
            with anyio.fail_after(5):
                while [cost] != [put for _, put in state.deletion_costs][-1:]:  # noqa: ASYNC110 - another's list
                    await anyio.sleep(0.01)

        async with background(DeletionCost(imds, status).run):
            status.enter(Phase.RECEIVE)
            await reaches(0)
            status.take("job", 1)
            status.enter(Phase.RUN)
            await reaches(1)
            status.enter(Phase.UPLOAD)
            await reaches(FINAL_UPLOAD)
            status.drop()
            await reaches(0)
    assert [cost for _, cost in state.deletion_costs] == [0, 1, FINAL_UPLOAD, 0]
