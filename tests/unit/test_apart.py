"""What is set apart, and what a running job uses, is safe from the next job, whatever lies in what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from heeler.leftovers import Leftovers
from heeler_sync import apart
from heeler_sync.apart import move_apart
from heeler_sync.aside import FolderLock, locked_folder
from heeler_sync.errors import FolderBusyError, LocalFileError
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.session import Capture, Plan, Session, SyncFolder
from heeler_sync.settle import SettleTimes
from tests.unit.test_session import World

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def session(
    world: World,
    *,
    before: tuple[SyncFolder, ...] = (),
    during: tuple[SyncFolder, ...] = (),
    after: tuple[SyncFolder, ...] = (),
    spare: tuple[str, ...] = (),
) -> Session:
    return Session(
        Plan(before, during, after, tuple(world.work / name for name in spare)),
        lambda _: world.store,
        permit=AlwaysPermitted(),
        on_event=world.events,
        times=SettleTimes(debounce=0.02, open_wait=0.3),
    )


async def ended(made: Session, program: Callable[[], object]) -> None:
    """Up to the end of its program, all else but the outputs in storage."""
    await made.restore()
    async with made.watching():
        program()
        await made.flush(Capture(whole=True))


Parts = dict[str, object]
NEXT: dict[str, Callable[[World], Parts]] = {
    "empties the folder around": lambda _world: {"spare": ("all",)},
    "restores the folder around": lambda world: {"before": (world.folder("in/", "all"),)},
    "empties the same folder": lambda _world: {"spare": ("all/deep/out",)},
    "publishes the folder around": lambda world: {"after": (world.folder("all/", "all"),)},
}


@pytest.mark.parametrize("how", NEXT)
@pytest.mark.parametrize("around", [True, False])
async def test_outputs_that_were_set_apart_are_all_published_whatever_the_next_job_prepares(
    world: World, how: str, around: bool
) -> None:
    before = (world.folder("in/", "all"),) if around else ()
    first = session(world, before=before, after=(world.folder("out/", "all/deep/out"),), spare=("all",))
    files = {f"{number}": b"x" * number for number in range(50)}
    await ended(first, lambda: [world.write(f"all/deep/out/{name}", data) for name, data in files.items()])
    assert await first.set_apart("job-1")
    second = session(world, **NEXT[how](world))  # type: ignore[arg-type]
    await second.restore()
    assert not (world.work / "all/deep/out/1").exists(), "the next job finds nothing of it"
    await first.publish()
    await first.discard()
    first.close()
    second.close()
    assert world.bucket() == {f"out/{name}": data for name, data in files.items()}
    assert not list(world.work.rglob("*job-1*"))


async def test_the_folders_of_a_running_job_are_not_emptied_by_another(world: World) -> None:
    inner = world.folder("ck/", "standard/own")
    first = session(world, during=(inner,), spare=("standard", "other"))
    await first.restore()
    for name in ("standard/state", "standard/own/step", "other/deep/state"):
        world.write(name)
    second = session(world, spare=("standard", "other"))
    await second.restore()
    assert world.files("standard") == {"state": b"x", "own/step": b"x"}
    assert world.files("other") == {"deep/state": b"x"}
    assert world.events.names().count("folder_not_emptied") == 2
    first.close()
    second.close()
    third = session(world, spare=("standard", "other"))
    await third.restore()
    assert world.files("standard") == world.files("other") == {}
    third.close()


async def test_a_folder_in_which_another_job_runs_is_prepared_around_it(world: World) -> None:
    first = session(world, during=(world.folder("ck/", "all/one/ck"),))
    await first.restore()
    world.write("all/one/ck/step")
    world.write("all/one/old")
    second = session(world, before=(world.folder("in/", "all"),))
    await second.restore()
    assert world.files("all") == {"one/ck/step": b"x"}
    first.close()
    second.close()


async def test_folders_in_one_another_are_not_set_apart(world: World) -> None:
    for order in (("all/models", "all"), ("all", "all/models")):
        folders = tuple(world.folder(f"{name}/", name) for name in order)
        made = session(world, after=folders)
        await ended(made, lambda: world.write("all/models/m"))
        assert not await made.set_apart("job-1")
        await made.publish()
        made.close()
    assert world.bucket().keys() == {"all/models/m"}


async def test_an_output_that_goes_before_it_is_sent_is_no_success(world: World) -> None:
    made = session(world, after=(world.folder("out/", "out"),))
    await ended(made, lambda: [world.write(f"out/{name:02}") for name in range(40)])

    original = world.store.put

    async def put(key: str, *arguments: object, **more: object) -> str:
        for path in (world.work / "out").glob("??"):  # more than are on their way at once
            path.unlink()
        return await original(key, *arguments, **more)  # type: ignore[arg-type]

    world.store.put = put  # type: ignore[method-assign]
    with pytest.raises(LocalFileError, match=r"out/\d\d.*is gone, and the job owes it"):
        await made.publish()
    made.close()


async def test_what_is_not_in_storage_stays_where_it_was_set_apart(world: World) -> None:
    made = session(world, after=(world.folder("out/", "out", r"\.bin$"),))
    world.write("out/mine")
    await ended(made, lambda: (world.write("out/a.bin"), world.write("out/b.log")))
    assert await made.set_apart("job-1")
    await made.publish()
    await made.discard()
    made.close()
    kept = {str(path.relative_to(made.apart[0])) for path in made.apart[0].rglob("*") if path.is_file()}
    assert kept == {"b.log", ".heeler/aside/mine"}


def test_what_can_only_be_undone_in_part_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/deep/file", "b/file"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    move = apart._move

    def refuse(folder: Path, target: Path) -> None:
        if folder.name == "b":
            (tmp_path / "a/deep").mkdir()
            (tmp_path / "a/deep/straggler").touch()
            raise PermissionError(1, "no")
        move(folder, target)

    monkeypatch.setattr(apart, "_move", refuse)
    with pytest.raises(LocalFileError, match="can't be brought back from"):
        move_apart([tmp_path / "a", tmp_path / "b"], "job")


def test_a_name_that_is_too_long_is_not_moved(tmp_path: Path) -> None:
    (tmp_path / ("f" * 100)).mkdir()
    assert move_apart([tmp_path / ("f" * 100)], "j" * 200) is None


def test_a_leftover_that_somebody_holds_by_now_is_left_to_them(tmp_path: Path) -> None:
    faults: list[str] = []
    notes = Leftovers(tmp_path / "state", lambda event, **_: faults.append(event))
    folder = tmp_path / "out-job"
    with locked_folder(folder):
        notes.note("job", [folder])
        notes.remove()
        assert folder.exists()
    assert faults == ["leftover_not_removed"]
    notes.note("job", [folder])
    notes.remove()
    assert not folder.exists()


def test_a_lock_goes_with_its_folder(tmp_path: Path) -> None:
    lock = locked_folder(tmp_path / "a")
    assert isinstance(lock, FolderLock)
    (tmp_path / "a").rename(tmp_path / "b")
    assert lock.is_of(tmp_path / "b")
    with pytest.raises(FolderBusyError):
        locked_folder(tmp_path / "b")
    with locked_folder(tmp_path / "a"):
        assert not lock.is_of(tmp_path / "a")
    lock.release()
    lock.release()
    locked_folder(tmp_path / "b").release()
