"""The file index: what was read of files is found again by the next process, and not believed where it may be wrong."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from heeler_sync.snapshot.index import FileIndex, Indexed, MemoryIndex, SqliteIndex
from heeler_sync.tree import Stamp

ROOT = Path("/data/checkpoints")


def entry(number: int, chunks: int = 2) -> Indexed:
    return Indexed(Stamp(number, 2, 3, 4), tuple(bytes([number, at % 256] * 16) for at in range(chunks)))


class Faults:
    def __init__(self) -> None:
        self.told: list[str] = []

    def __call__(self, reason: str) -> None:
        self.told.append(reason)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def sqlite(tmp_path: Path, faults: Faults) -> Iterator[SqliteIndex]:
    index = SqliteIndex(tmp_path / "index.db", "boot", faults)
    yield index
    index.close()
    assert faults.told == []


@pytest.fixture(params=["memory", "sqlite"])
def index(request: pytest.FixtureRequest) -> FileIndex:
    found: FileIndex = MemoryIndex() if request.param == "memory" else request.getfixturevalue("sqlite")
    return found


def test_what_is_kept_is_found_and_what_is_gone_is_not(index: FileIndex) -> None:
    assert index.load(ROOT) == {}
    index.update(ROOT, {"a": entry(1), "d/b": entry(2), "empty": entry(0, 0)}, [])
    index.update(ROOT, {"a": entry(5)}, ["d/b", "never was"])
    assert index.load(ROOT) == {"a": entry(5), "empty": entry(0, 0)}


def test_each_folder_has_entries_of_its_own(index: FileIndex) -> None:
    index.update(ROOT, {"a": entry(1)}, [])
    index.update(ROOT / "sub", {"a": entry(2)}, [])
    index.update(ROOT, {}, ["a"])
    assert index.load(ROOT) == {}
    assert index.load(ROOT / "sub") == {"a": entry(2)}


def test_a_path_that_is_gone_and_changed_at_once_is_gone_or_new_but_never_old(index: FileIndex) -> None:
    index.update(ROOT, {"a": entry(1)}, [])
    index.update(ROOT, {"a": entry(2)}, ["a"])
    assert index.load(ROOT) in ({}, {"a": entry(2)})


def test_what_was_loaded_is_the_callers_own(index: FileIndex) -> None:
    index.update(ROOT, {"a": entry(1)}, [])
    index.load(ROOT).clear()
    assert index.load(ROOT) == {"a": entry(1)}


def test_the_next_process_of_the_same_boot_finds_all(tmp_path: Path, faults: Faults) -> None:
    first = SqliteIndex(tmp_path / "db", "boot", faults)
    first.update(ROOT, {"a": entry(1)}, [])
    first.close()
    second = SqliteIndex(tmp_path / "db", "boot", faults)
    assert second.load(ROOT) == {"a": entry(1)}
    second.close()


def test_a_process_that_was_killed_leaves_what_it_had_kept(tmp_path: Path, faults: Faults) -> None:
    first = SqliteIndex(tmp_path / "db", "boot", faults)
    first.update(ROOT, {"a": entry(1)}, [])
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tmp_path.glob("db*"):
        (copy / file.name).write_bytes(file.read_bytes())
    second = SqliteIndex(copy / "db", "boot", faults)
    assert second.load(ROOT) == {"a": entry(1)}
    second.close()
    first.close()


def test_after_a_reboot_nothing_is_believed(tmp_path: Path, faults: Faults) -> None:
    first = SqliteIndex(tmp_path / "db", "boot", faults)
    first.update(ROOT, {"a": entry(1)}, [])
    first.close()
    second = SqliteIndex(tmp_path / "db", "another boot", faults)
    assert second.load(ROOT) == {}
    second.update(ROOT, {"b": entry(2)}, [])
    second.close()
    third = SqliteIndex(tmp_path / "db", "boot", faults)
    assert third.load(ROOT) == {}, "the first boot's id does not come back to life"
    third.close()


whole = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
names = st.one_of(whole, st.binary().map(os.fsdecode))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.integers(0, 255), max_size=5))
def test_any_name_is_found_again(found: dict[str, int]) -> None:
    index = SqliteIndex(Path(":memory:"), "boot", pytest.fail)
    wanted = {path: entry(number) for path, number in found.items()}
    index.update(ROOT, wanted, [])
    assert index.load(ROOT) == wanted
    index.update(ROOT, {}, wanted)
    assert index.load(ROOT) == {}
    index.close()


@pytest.mark.parametrize("inode", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_any_inode_is_found_again(sqlite: SqliteIndex, inode: int) -> None:
    stamp = Stamp(2**62, -5, 2**62, inode)
    sqlite.update(ROOT, {"a": Indexed(stamp, ())}, [])
    assert sqlite.load(ROOT)["a"].stamp == stamp


def test_a_root_with_an_odd_name_is_found_again(sqlite: SqliteIndex) -> None:
    root = Path(os.fsdecode(b"/odd\xff/\xe2\x82"))
    sqlite.update(root, {"a": entry(1)}, [])
    assert sqlite.load(root) == {"a": entry(1)}
    assert sqlite.load(ROOT) == {}


def test_a_database_that_fails_is_told_and_means_reading_once_more(tmp_path: Path, faults: Faults) -> None:
    index = SqliteIndex(tmp_path / "db", "boot", faults)
    index.close()
    index.update(ROOT, {"a": entry(1)}, [])
    assert index.load(ROOT) == {}
    assert len(faults.told) == 2


def test_a_disk_that_is_full_costs_no_more_than_the_entry(
    tmp_path: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = SqliteIndex(tmp_path / "db", "boot", faults)
    index.update(ROOT, {"a": entry(1)}, [])
    index._open.execute("PRAGMA max_page_count = 4")
    index.update(ROOT, {"big": entry(2, 100_000)}, ["a"])
    assert len(faults.told) == 1
    assert index.load(ROOT) == {"a": entry(1)}, "all of an update or nothing of it"
    index.close()


@pytest.mark.parametrize("make", [lambda file: file.write_bytes(b"no database" * 999), lambda file: file.mkdir()])
def test_a_file_that_is_no_database_is_an_error_at_once(
    tmp_path: Path, faults: Faults, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "db")
    with pytest.raises(sqlite3.Error):
        SqliteIndex(tmp_path / "db", "boot", faults)


def test_many_threads_may_call_at_once(sqlite: SqliteIndex) -> None:
    def work(number: int) -> None:
        for turn in range(20):
            sqlite.update(ROOT / str(number), {f"f{turn}": entry(number)}, [f"f{turn - 1}"])
            sqlite.load(ROOT / str(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(sqlite.load(ROOT / str(number)) == {"f19": entry(number)} for number in range(6))
