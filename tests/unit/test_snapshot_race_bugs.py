"""What the races brought to light, each as short as it can be said."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from heeler_sync.errors import TransientStoreError
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.snapshot.holder import Claim, acquire
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Tree
from heeler_sync.store.base import Condition, ObjectInfo, Sink
from heeler_sync.store.memory import MemoryStore
from tests.support.lives import PREFIX
from tests.support.stores import IMPATIENT, Events, ScriptedStore, transient
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


def claim(attempt: int = 1) -> Claim:
    return Claim("j", "r", attempt, f"attempt {attempt}")


async def test_two_workers_that_start_on_a_fresh_prefix_at_once_do_not_take_each_other_for_damage() -> None:
    store = MemoryStore()

    async def first_worker() -> None:
        """Acquires and commits, after the second one found no head and before it lists."""
        holder = await acquire(Layout(store, PREFIX, IMPATIENT), claim(1), AlwaysPermitted(), Events())
        await holder.commit(Tree({}, {"folder": 0o755}, {}))

    slow = ScriptedStore(store, list=[first_worker])
    second = await acquire(Layout(slow, PREFIX, IMPATIENT), claim(2), AlwaysPermitted(), Events())
    assert (second.epoch, second.head.generation) == (2, 1)


class CutLine(ScriptedStore):
    """A store whose line is cut once the first conditional write has arrived, until `mended`."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.cut = False
        self.mended = False

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        self._check()
        etag = await super().put(key, data, metadata=metadata, condition=condition)
        self.cut = condition is not None
        self._check()
        return etag

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        self._check()
        return await super().download(key, sink, offset=offset, if_match=if_match)

    def _check(self) -> None:
        if self.cut and not self.mended:
            raise transient()


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_holder_whose_swap_took_effect_right_before_a_long_outage_goes_on_after_it(ordered: bool) -> None:
    line = CutLine(MemoryStore())
    mine = Claim("j", "r", 1, "me", ordered=ordered)
    layout = Layout(line.inner, PREFIX, IMPATIENT)
    holder = await acquire(layout, mine, AlwaysPermitted(), Events())
    layout.store = line
    with pytest.raises(TransientStoreError):
        await holder.commit(Tree({}, {"one": 0o755}, {}))  # it is in storage, and we don't know
    line.mended = True
    kept = await holder.commit(Tree({}, {"two": 0o755}, {}))  # nobody else ever held the prefix
    assert kept.generation in (1, 2)
    await holder.complete({"exit_code": 0})
