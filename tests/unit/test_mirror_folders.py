"""Mirror mode when the folder itself goes, comes or is another one: nothing is deleted, nothing new is missed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest

from heeler_sync import mirror as mirror_module
from heeler_sync.settle import SettleTimes
from tests.support.stores import until
from tests.unit.test_mirror import mirrored
from tests.unit.test_mirror_attacks import LARGE, RecordingStore

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("gap", ["at once", "when it was missed", "renamed away"])
async def test_a_folder_that_stands_anew_is_watched_anew(tmp_path: Path, gap: str) -> None:
    root = tmp_path / "root"
    async with mirrored(root) as folder:
        (root / "a").write_bytes(b"1")
        await folder.equal()
        if gap == "renamed away":
            root.rename(tmp_path / "away")
        else:
            shutil.rmtree(root)
        if gap == "when it was missed":
            await until(lambda: "folder_replaced" in folder.events.names(), 2)
        root.mkdir()
        for name in ("b", "c", "d"):
            (root / name).write_bytes(b"2")
            await until(lambda name=name: name in folder.bucket(), 4)  # type: ignore[misc]


@pytest.mark.parametrize("what", ["written before", "written after"])
async def test_a_folder_that_is_renamed_away_deletes_nothing(tmp_path: Path, what: str) -> None:
    root, away = tmp_path / "root", tmp_path / "away"
    async with mirrored(root) as folder:
        (root / "a").write_bytes(b"1")
        await folder.equal()
        if what == "written before":
            (root / "a").write_bytes(b"newer")
        root.rename(away)
        if what == "written after":
            (away / "a").write_bytes(b"elsewhere")
        await anyio.sleep(0.3)
        assert await folder.end(whole=True) is None
    assert folder.bucket()["a"] in (b"1", b"newer")


async def test_a_rotation_by_rename_is_safe_where_only_scans_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_watch(*_: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(mirror_module, "TreeWatch", no_watch)
    monkeypatch.setattr(mirror_module, "_SCAN_SECONDS_UNWATCHED", 0.01)
    store = RecordingStore()
    async with mirrored(tmp_path, store, times=SettleTimes(debounce=0.2)) as folder:
        (tmp_path / "old").write_bytes(b"1")
        await folder.equal()
        (tmp_path / "x.part").write_bytes(b"2" * LARGE)
        (tmp_path / "old").unlink()
        await until(lambda: folder.mirror._settler._gone)
        (tmp_path / "x.part").rename(tmp_path / "new")
        await folder.equal()
    assert store.always_held(b"1", b"2" * LARGE), [sorted(state) for state in store.states]


async def test_a_folder_lost_during_an_upload_keeps_what_storage_had(tmp_path: Path) -> None:
    root = tmp_path / "root"
    release = anyio.Event()
    store = RecordingStore()
    async with mirrored(root, store) as folder:
        (root / "a").write_bytes(b"1" * LARGE)
        await folder.equal()
        store.scripts["upload"] = [release.wait]
        sent = store.count("upload")
        (root / "a").write_bytes(b"2" * LARGE)
        await until(lambda: store.count("upload") > sent)
        shutil.rmtree(root)
        root.mkdir()
        await until(lambda: "folder_replaced" in folder.events.names(), 4)
        release.set()
        assert await folder.end(whole=True) is None
    assert folder.bucket()["a"][:1] in (b"1", b"2")


@pytest.mark.parametrize("why", ["no inotify", "no folder"])
async def test_a_mirror_without_a_watch_does_not_spin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def no_watch(*_: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(mirror_module, "TreeWatch", no_watch)
    monkeypatch.setattr(mirror_module, "_SCAN_SECONDS_UNWATCHED", 0.1)
    steps = 0
    step = mirror_module.Mirror._step

    async def counted(*arguments: Any) -> bool:
        nonlocal steps
        steps += 1
        return await step(*arguments)

    monkeypatch.setattr(mirror_module.Mirror, "_step", counted)
    root = tmp_path / "root"
    async with mirrored(root):
        if why == "no folder":
            shutil.rmtree(root)
        await anyio.sleep(1.0)
    assert steps < 30
