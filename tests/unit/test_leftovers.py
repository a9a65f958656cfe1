"""Folders that were set apart for an upload: moved, given back, removed, and never left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from heeler.leftovers import Leftovers
from heeler_sync.apart import move_apart
from heeler_sync.errors import AccessDeniedError
from heeler_sync.session import Capture
from tests.support.stores import ScriptedStore
from tests.unit.test_session import World

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def told() -> tuple[list[str], Callable[..., None]]:
    events: list[str] = []
    return events, lambda event, **_fields: events.append(event)


def test_folders_are_moved_beside_themselves_and_empty_ones_take_their_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir(mode=0o750)
        (tmp_path / name / "file").write_text(name)
    moved = move_apart([tmp_path / "a", tmp_path / "b"], "job")
    assert moved == {tmp_path / "a": tmp_path / "a-job", tmp_path / "b": tmp_path / "b-job"}
    assert [(tmp_path / f"{name}-job" / "file").read_text() for name in ("a", "b")] == ["a", "b"]
    assert not any((tmp_path / "a").iterdir())
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "a-job").stat().st_mode


def test_what_is_there_under_the_new_name_stays(tmp_path: Path) -> None:
    for name in ("a", "a-job"):
        (tmp_path / name).mkdir()
    (tmp_path / "a-job" / "mine").touch()
    moved = move_apart([tmp_path / "a"], "job")
    assert moved is not None
    assert moved[tmp_path / "a"].name.startswith("a-job-")
    assert (tmp_path / "a-job" / "mine").exists()


def test_where_one_can_not_be_moved_all_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    assert move_apart([tmp_path / "a", tmp_path / "missing"], "job") is None
    assert (tmp_path / "a" / "file").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


async def test_outputs_are_published_from_where_they_were_set_apart_while_others_use_the_folder(world: World) -> None:
    first = world.session(during=world.folder("ck/"), after=world.folder("out/", "out"))
    await first.restore()
    async with first.watching():
        world.write("data/step", b"1")
        world.write("out/result", b"first")
        await first.flush(Capture(whole=True))
    assert await first.set_apart("job-1")
    assert world.files() == world.files("out") == {}, "the next job finds nothing of it"
    world.last = None  # both are used at once
    second = world.session(during=world.folder("ck2/"), after=world.folder("out2/", "out"))
    await second.restore()
    async with second.watching():
        world.write("out/result", b"second")
        await first.publish()
        await first.discard()
        await second.flush(Capture(whole=True))
    await second.publish()
    first.close()
    assert world.bucket() == {"ck/step": b"1", "out/result": b"first", "out2/result": b"second"}
    assert sorted(path.name for path in world.work.iterdir()) == ["data", "out"]


async def test_outputs_that_can_not_be_stored_stay_where_they_were_set_apart(world: World) -> None:
    session = world.session(after=world.folder("out/", "out"))
    await session.restore()
    world.write("out/result", b"r")
    assert await session.set_apart("job-1")
    world.store = ScriptedStore(world.store.inner, put=[AccessDeniedError("PutObject", "bucket", "out/result", "403")])
    with pytest.raises(AccessDeniedError):
        await session.publish()
    session.close()
    assert (world.work / "out-job-1" / "result").read_bytes() == b"r"
    assert [path.name for path in session.apart] == ["out-job-1"]


async def test_nothing_is_set_apart_where_nothing_is_to_be_published(world: World) -> None:
    session = world.session(during=world.folder("ck/"))
    await session.restore()
    assert not await session.set_apart("job-1")


async def test_what_was_stored_while_the_program_ran_is_not_sent_again(world: World) -> None:
    folder = world.folder("out/", "out")
    session = world.session(during=folder, after=folder)
    await session.restore()
    async with session.watching():
        world.write("out/a", b"a")
        await session.flush(Capture(whole=True))
    sent = session.progress.files_up
    assert sent == 1
    await session.publish()
    assert session.progress.files_up == sent
    assert world.bucket() == {"out/a": b"a"}


def test_what_a_killed_runtime_had_set_apart_is_removed_by_the_next(tmp_path: Path) -> None:
    events, tell = told()
    left, kept = tmp_path / "out-job-1", tmp_path / "out-job-2"
    for folder in (left, kept):
        folder.mkdir()
        (folder / "file").touch()
    notes = Leftovers(tmp_path / "state", tell)
    notes.remove()
    notes.note("job-1", [left])
    notes.note("job-2", [kept])
    notes.drop("job-2")
    Leftovers(tmp_path / "state", tell).remove()
    assert (left.exists(), kept.exists(), events) == (False, True, [])
    assert not any((tmp_path / "state" / "apart").iterdir())
    notes.note("job-3", [tmp_path / "gone"])
    notes.remove()
    assert events == []


@pytest.mark.parametrize("text", ["", "no json", "7"])
def test_a_damaged_note_is_said_and_hinders_nobody(tmp_path: Path, text: str) -> None:
    events, tell = told()
    notes = Leftovers(tmp_path, tell)
    notes.note("a", [])
    (tmp_path / "apart" / "a").write_text(text)
    notes.note("b", [tmp_path / "left"])
    (tmp_path / "left").mkdir()
    notes.remove()
    assert events == ["leftover_not_removed"]
    assert not (tmp_path / "left").exists()
    assert os.listdir(tmp_path / "apart") == []
