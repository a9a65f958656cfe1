"""What is on disk of Kelpie's jobs: read as it was written, never half of it, and only what is still of use."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from heeler.sources import kelpie_record
from heeler.sources.kelpie_record import COMPLETED, JobRecord, Records

pytestmark = pytest.mark.anyio


class Kept:
    """Records in a folder, and what was said of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[tuple[str, dict[str, Any]]] = []
        self.records = self.again()
        self._age = 0

    def again(self) -> Records:
        return Records(self.folder / "kelpie", lambda event, **fields: self.faults.append((event, fields)))

    def events(self) -> list[str]:
        return [event for event, _ in self.faults]

    def save(self, record: JobRecord) -> None:
        """A little later than the one before."""
        anyio.run(self.records.save, record)
        self._age += 1
        os.utime(self.path(record.row.id), (self._age, self._age))

    def path(self, job_id: str) -> Path:
        return self.folder / "kelpie" / f"{job_id}.job"


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def record(job_id: str = "job-1", **fields: Any) -> JobRecord:
    data = {"id": job_id, "status": "running", "environment": {"KEY": "secret"}}
    return JobRecord(data, "machine-1", **{"started": "2024-04-19 18:53:31", **fields})


def test_a_job_outlives_its_process(kept: Kept) -> None:
    saved = record(restarts=2, barren=3, verdict=COMPLETED, released=True)
    kept.save(saved)
    assert kept.again().load("job-1") == saved
    assert kept.again().load_all() == [saved]
    assert kept.again().load("job-2") is None
    assert "secret" not in repr(saved)
    assert kept.path("job-1").stat().st_mode & 0o077 == 0, "a job's environment may hold secrets"


def test_the_newest_comes_first(kept: Kept) -> None:
    for job_id in ("b", "c", "a", "b"):
        kept.save(record(job_id))
    assert [found.row.id for found in kept.again().load_all()] == ["b", "a", "c"]


@pytest.mark.parametrize("job_id", ["x.job", "x.job.tmp", "machine-id", "a" * 200, "A:@=+-._"])
def test_every_id_that_a_job_may_have_names_a_file_of_its_own(kept: Kept, job_id: str) -> None:
    kept.save(record("x"))
    kept.save(record(job_id))
    assert [found.row.id for found in kept.again().load_all()] == [job_id, "x"]
    kept.records.drop(job_id)
    assert [found.row.id for found in kept.again().load_all()] == ["x"]
    assert kept.events() == []


def test_a_damaged_record_is_told_of_and_left_out(kept: Kept) -> None:
    kept.save(record("a"))
    kept.save(record("b"))
    for content in (b"", kept.path("b").read_bytes()[:-1], b"x" * 100, kept.path("a").read_bytes()):
        kept.faults.clear()
        kept.path("b").write_bytes(content)
        assert [found.row.id for found in kept.again().load_all()] == ["a"]
        assert kept.events() == ["record_damaged"]
        assert kept.faults[0][1]["path"] == str(kept.path("b"))


async def test_what_can_not_be_written_is_told_of_and_nothing_else_happens(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    (tmp_path / "kelpie").write_text("in the way")
    await kept.records.save(record())
    assert kept.events() == ["record_failed"]
    assert kept.records.load_all() == []


async def test_what_can_not_be_read_or_removed_is_told_of(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.path("a").mkdir(parents=True)
    assert kept.records.load_all() == []
    kept.records.drop("a")
    assert kept.events() == ["record_failed", "record_failed"]


def test_of_too_many_the_oldest_that_nobody_needs_are_forgotten(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kelpie_record, "_KEPT", 3)
    kept.save(record("verdict", verdict=COMPLETED))
    kept.save(record("held"))
    for number in range(5):
        kept.save(record(f"released-{number}", released=True))
    kept.records.prune()
    left = {found.row.id for found in kept.again().load_all()}
    assert left == {"verdict", "held", "released-2", "released-3", "released-4"}


def test_each_start_counts_and_one_that_never_began_does_not() -> None:
    first = record(released=True)
    assert first.again() == replace(first, released=False, restarts=1, barren=2)
    unbegun = record(started="", restarts=4, barren=5)
    assert unbegun.again() == unbegun
    fresh = record(started="")
    assert (fresh.after(first).restarts, fresh.after(first).barren) == (1, 2)
    assert (fresh.after(unbegun).restarts, fresh.after(unbegun).barren) == (4, 5)
    assert fresh.after(replace(first, verdict=COMPLETED)).verdict == ""
