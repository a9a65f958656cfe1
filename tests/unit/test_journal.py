"""The journal on a disk that is full: told, and never the end of a runtime."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from heeler.app import processes
from heeler.app.process import RegisterError, Started
from heeler.app.processes import TAG_VARIABLE, UndyingError
from heeler.journal import Journal


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no byte free."""
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


@pytest.fixture
def faults() -> list[tuple[str, dict[str, object]]]:
    return []


def told(journal: Journal, faults: list[tuple[str, dict[str, object]]]) -> Journal:
    journal.on_fault = lambda event, **fields: faults.append((event, fields))
    return journal


def start_many(journal: Journal) -> None:
    for number in range(1, 1000):
        journal.started(process(number))


def process(number: int) -> Started:
    return Started(1 << 21, number, f"{number:016}")


def test_on_a_full_disk_a_start_is_refused_by_the_folders_name_and_an_end_is_a_fault(
    tmp_path: Path, faults: list[tuple[str, dict[str, object]]]
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        journal = told(Journal(disk / "state"), faults)
        journal.started(process(0))
        fill(disk)
        with pytest.raises(RegisterError, match=f"the state folder {disk}/state can't be written .*full"):
            start_many(journal)
        assert [event for event, _ in faults] == ["journal_failed"]
        for number in range(1000):
            journal.ended(process(number))
        assert len(faults) > 1
        assert journal.end_leftovers() == 0
        assert {event for event, _ in faults} == {"journal_failed"}
        assert f"{disk}/state" in str(faults[0][1]["error"])
        (disk / "filler").unlink()
        journal.started(process(5000))
        journal.close()


def test_a_journal_that_can_not_be_read_is_a_fault(tmp_path: Path, faults: list[tuple[str, dict[str, object]]]) -> None:
    journal = told(Journal(tmp_path), faults)
    with sqlite3.connect(tmp_path / "journal.db") as table:
        table.execute("DROP TABLE processes")
    table.close()
    assert journal.end_leftovers() == 0
    assert [event for event, _ in faults] == ["journal_failed"]
    journal.close()


def test_what_does_not_die_is_told_and_stays_recorded_for_the_next_runtime(
    tmp_path: Path, faults: list[tuple[str, dict[str, object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = told(Journal(tmp_path), faults)
    left = subprocess.Popen(["sleep", "60"], env={**os.environ, TAG_VARIABLE: "t" * 16}, start_new_session=True)
    journal.started(Started(left.pid, processes.start_time(left.pid) or 0, "t" * 16))
    journal.started(process(7))

    def undying(tag: str, _group: int | None) -> int:
        if tag == "t" * 16:
            raise UndyingError([left.pid])
        return 0

    with monkeypatch.context() as patched:
        patched.setattr("heeler.journal.kill_all", undying)
        assert journal.end_leftovers() == 0
    assert faults == [("process_does_not_die", {"group": left.pid, "pids": [left.pid]})]
    assert journal.end_leftovers() >= 1
    assert left.wait(5) == -9
    assert journal.end_leftovers() == 0
    journal.close()


@pytest.mark.parametrize("own_group", [False, True])
def test_what_dropped_its_environment_is_found_in_the_session_of_a_dead_program(
    tmp_path: Path, own_group: bool
) -> None:
    """Its pid can't have become another's: the session still has members."""
    mode = "set -m; " if own_group else ""
    script = f"{mode}env -i sleep 1000 & echo $!"
    leader = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    started = processes.start_time(leader.pid)
    assert started is not None
    assert leader.stdout is not None
    with leader.stdout:
        child = int(leader.stdout.readline())
    leader.wait()
    journal = Journal(tmp_path)
    journal.started(Started(leader.pid, started, "a tag that it dropped"))
    assert journal.end_leftovers() == 1
    assert not processes.in_session(leader.pid) or processes.start_time(child) is None or _is_dead(child)
    journal.close()


def _is_dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in ("Z", "X")
