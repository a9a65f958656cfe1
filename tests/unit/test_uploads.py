"""The journal of uploads: what an interrupted commit had sent is not sent again, and never believed too long."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from heeler_sync.paths import Location
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.session import Capture, Plan, Session, SnapshotSettings, SyncFolder
from heeler_sync.snapshot.chunks import digest_of
from heeler_sync.snapshot.head import Head, decode_head
from heeler_sync.snapshot.holder import Claim
from heeler_sync.snapshot.ids import new_id
from heeler_sync.snapshot.packs import Pack
from heeler_sync.snapshot.uploads import NoUploads, SqliteUploads
from heeler_sync.store.base import Condition
from heeler_sync.store.memory import MemoryStore
from tests.support.stores import Events, ScriptedStore
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

HERE = "s3://b/p/"
HEAD = Head("job", "", 1, 3, "worker-1", 0.0, writes=("w",))


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


def journal(folder: Path, boot: str = "boot-1") -> SqliteUploads:
    def refuse(words: str) -> None:
        raise AssertionError(words)

    return SqliteUploads(folder / "uploads.db", boot, refuse)


def pack(epoch: int = 3, *chunks: bytes) -> Pack:
    made = Pack(new_id(epoch))
    for chunk in chunks or (b"one", b"two" * 1000):
        made.add(digest_of(chunk), chunk)
    return made


def test_what_was_noted_is_there_after_a_restart_with_every_place(tmp_path: Path) -> None:
    sent = pack()
    before = journal(tmp_path)
    before.note(HERE, HEAD, sent)
    before.close()

    found = journal(tmp_path).load(HERE, HEAD)

    assert {name: (dict(entry.places), entry.size) for name, entry in found.items()} == {
        sent.id: (sent.places, sent.size)
    }


@pytest.mark.parametrize(
    ("location", "holder", "epoch", "boot"),
    [
        ("s3://b/other/", "worker-1", 3, "boot-1"),
        (HERE, "worker-2", 3, "boot-1"),
        (HERE, "worker-1", 4, "boot-1"),
        (HERE, "worker-1", 3, "boot-2"),
    ],
    ids=["another prefix", "another holder", "another epoch", "another boot"],
)
def test_nothing_is_believed_of(tmp_path: Path, location: str, holder: str, epoch: int, boot: str) -> None:
    journal(tmp_path).note(HERE, HEAD, pack())
    assert journal(tmp_path, boot).load(location, Head("job", "", 1, epoch, holder, 0.0)) == {}


def test_what_was_cleared_is_gone_and_other_prefixes_stay(tmp_path: Path) -> None:
    kept = journal(tmp_path)
    kept.note(HERE, HEAD, pack())
    kept.note("s3://b/other/", HEAD, pack())
    assert kept.clear(HERE)
    assert kept.load(HERE, HEAD) == {}
    assert len(kept.load("s3://b/other/", HEAD)) == 1


def test_a_journal_that_can_not_be_used_is_told_and_nothing_is_certain(tmp_path: Path) -> None:
    told: list[str] = []
    broken = SqliteUploads(tmp_path / "uploads.db", "boot", told.append)
    with sqlite3.connect(tmp_path / "uploads.db") as connection:
        connection.execute("DROP TABLE uploads")
    broken.note(HERE, HEAD, pack())
    assert not broken.clear(HERE)
    assert broken.load(HERE, HEAD) == {}
    assert len(told) == 3


def test_without_a_journal_nothing_is_adopted() -> None:
    NoUploads().note(HERE, HEAD, pack())
    assert NoUploads().clear(HERE)
    assert NoUploads().load(HERE, HEAD) == {}


class Killed(BaseException):
    """The process is gone."""


class DyingStore(ScriptedStore):
    """Dies at the first head that lists a generation."""

    dying = True

    async def put(self, key: str, data: bytes, *, metadata: object = None, condition: Condition | None = None) -> str:
        if self.dying and key.endswith("head.json") and decode_head(data).kept:
            raise Killed
        return await self.inner.put(key, data, condition=condition)


def a_session(root: Path, store: ScriptedStore, uploads: SqliteUploads, name: str) -> Session:
    folder = SyncFolder(Location("b", "p/"), root, snapshot=True)
    settings = SnapshotSettings(claim=Claim("job", "", 1, name), uploads=uploads)
    plan = Plan(before=(folder,), during=(folder,))
    return Session(plan, lambda _: store, permit=AlwaysPermitted(), on_event=Events(), snapshots=settings)


async def save(session: Session, root: Path, content: bytes) -> None:
    async with session.watching():
        (root / "model").write_bytes(content)
        await session.flush(Capture(whole=True))


async def test_packs_of_a_commit_that_our_own_death_cut_are_not_sent_again(tmp_path: Path) -> None:
    store = DyingStore(MemoryStore("b"))
    content = os.urandom(3 << 20)
    first = a_session(tmp_path / "data", store, journal(tmp_path), "worker-1")
    await first.restore()
    with pytest.raises(Killed):
        await save(first, tmp_path / "data", content)
    first.close()
    sent = {key for key in store.objects() if "/packs/" in key}
    assert sent

    store.dying = False
    second = a_session(tmp_path / "data", store, journal(tmp_path), "worker-2")
    await second.restore()
    head = decode_head(store.objects()["p/.heeler/head.json"])
    assert {f"p/.heeler/packs/{name}" for name in head.adopted} == sent, "named by the acquire's own write"
    await save(second, tmp_path / "data", content)
    second.close()

    assert {key for key in store.objects() if "/packs/" in key} == sent, "and nothing was sent twice"
    head = decode_head(store.objects()["p/.heeler/head.json"])
    assert head.adopted == ()
    assert head.generation == 1
    assert journal(tmp_path).load(HERE, HEAD) == {}


async def test_packs_are_not_adopted_once_somebody_else_held_the_prefix(tmp_path: Path) -> None:
    store = DyingStore(MemoryStore("b"))
    first = a_session(tmp_path / "data", store, journal(tmp_path), "worker-1")
    await first.restore()
    with pytest.raises(Killed):
        await save(first, tmp_path / "data", b"model" * 1000)
    first.close()
    store.dying = False
    other = a_session(tmp_path / "elsewhere", store, journal(tmp_path / "data"), "worker-elsewhere")
    await other.restore()
    other.close()

    again = a_session(tmp_path / "data", store, journal(tmp_path), "worker-2")
    await again.restore()
    again.close()

    assert decode_head(store.objects()["p/.heeler/head.json"]).adopted == ()
