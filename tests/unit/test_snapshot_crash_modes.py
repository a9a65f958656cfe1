"""Restores by an ordinary user, for whom modes are in force: what a program made read-only must not stop them.

As root these run in a child process without the capability to overlook modes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from heeler_sync.store.memory import MemoryStore
from tests.support.crashing import CrashError, Fuse, When
from tests.support.lives import Disk, Life, Record, picture, small_pieces
from tests.support.stores import KIB
from tests.support.virtual_time import run_virtual

_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


def _as_a_user(case: Callable[[Path], None], folder: Path) -> None:
    """Run `case` where modes are in force."""
    if os.geteuid() != 0:
        case(folder)
        return

    def lose_capabilities() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "prctl")

    module = Path(__file__).relative_to(Path(__file__).parents[2]).with_suffix("").as_posix().replace("/", ".")
    script = f"import sys, pathlib; sys.path[:] = {sys.path!r}; import {module} as m; m.{case.__name__}"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}(pathlib.Path({str(folder)!r}))"],
        cwd=Path(__file__).parents[2],
        preexec_fn=lose_capabilities,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


async def _committed(root: Path, fill: Callable[[Path], None]) -> tuple[MemoryStore, Record]:
    """A bucket with one generation of a folder that `fill` filled."""
    store, record = MemoryStore(), Record()
    life = Life(store, Disk(root), record)
    await life.acquire()
    await life.restore()
    fill(root)
    await life.commit()
    return store, record


async def _restored(store: MemoryStore, record: Record, disk: Disk, fuse: Fuse | None = None) -> None:
    life = Life(store, disk, record, fuse)
    await life.acquire()
    await life.restore()
    assert picture(disk.root) == record.tried[1]


def _read_only_file(root: Path) -> None:
    (root / "file").write_bytes(os.urandom(3 * KIB))
    (root / "file").chmod(0o444)


def case_dying_before_a_rename(folder: Path) -> None:
    (folder / "root").mkdir()

    async def case() -> None:
        store, record = await _committed(folder / "root", _read_only_file)
        disk = Disk(folder / "other")
        name = blake3(b"file").hexdigest()[:32]
        with pytest.raises(CrashError):
            await _restored(store, record, disk, Fuse(("restore", f"replace {name}"), When.BEFORE))
        await _restored(store, record, disk)

    with small_pieces(1):
        run_virtual(case)


def test_a_restore_that_died_right_before_it_renamed_a_read_only_file_can_be_repeated(tmp_path: Path) -> None:
    _as_a_user(case_dying_before_a_rename, tmp_path)


def _restore_into_changed(folder: Path, fill: Callable[[Path], None], change: Callable[[Path], None]) -> None:
    (folder / "root").mkdir()

    async def case() -> None:
        store, record = await _committed(folder / "root", fill)
        change(folder / "root")
        await _restored(store, record, Disk(folder / "root"))

    with small_pieces(1):
        run_virtual(case)


def _read_only_folder(root: Path) -> None:
    (root / "folder").mkdir()
    (root / "folder" / "file").write_bytes(b"content")
    (root / "folder").chmod(0o555)


def _read_only_folder_with_a_link(root: Path) -> None:
    (root / "folder").mkdir()
    (root / "folder" / "link").symlink_to("file")
    (root / "folder").chmod(0o555)


def case_a_link_in_a_read_only_folder(folder: Path) -> None:
    _restore_into_changed(folder, _read_only_folder_with_a_link, lambda _root: None)


def case_an_extra_file_in_a_read_only_folder(folder: Path) -> None:
    def change(root: Path) -> None:
        (root / "folder").chmod(0o755)
        (root / "folder" / "extra").write_bytes(b"made later")
        (root / "folder").chmod(0o555)

    _restore_into_changed(folder, _read_only_folder, change)


def case_an_extra_read_only_folder(folder: Path) -> None:
    def change(root: Path) -> None:
        (root / "extra").mkdir()
        (root / "extra" / "file").write_bytes(b"made later")
        (root / "extra").chmod(0o555)

    _restore_into_changed(folder, _read_only_file, change)


_CASES = [case_a_link_in_a_read_only_folder, case_an_extra_file_in_a_read_only_folder, case_an_extra_read_only_folder]


@pytest.mark.parametrize("case", _CASES)
def test_a_folder_with_read_only_folders_in_it_can_be_restored_into(
    tmp_path: Path, case: Callable[[Path], None]
) -> None:
    _as_a_user(case, tmp_path)
