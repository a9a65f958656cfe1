from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.sources.salad_record import Answer, DamagedRecordError, JobRecord, Records, decode, encode

fields = st.dictionaries(st.text(max_size=20), st.integers() | st.text(max_size=50) | st.booleans(), max_size=5)


class Kept:
    """Records in a folder, and what was said of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []
        self.records = Records(folder, self._fault)

    def _fault(self, event: str, **_fields: object) -> None:
        self.faults.append(event)

    def again(self) -> Records:
        return Records(self.folder, self._fault)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


@given(fields, st.binary(max_size=300))
def test_a_record_is_read_as_it_was_written(head: dict[str, Any], body: bytes) -> None:
    assert decode(encode(head, body)) == (head, body)


@given(fields, st.binary(max_size=300), st.data())
def test_a_record_with_a_changed_byte_is_damaged(head: dict[str, Any], body: bytes, data: st.DataObject) -> None:
    written = bytearray(encode(head, body))
    place = data.draw(st.integers(0, len(written) - 1))
    written[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedRecordError):
        decode(bytes(written))


def test_a_record_that_is_cut_anywhere_or_longer_is_damaged() -> None:
    written = encode({"job_id": "a"}, b"body\n\0")
    for length in range(len(written)):
        with pytest.raises(DamagedRecordError):
            decode(written[:length])
    with pytest.raises(DamagedRecordError):
        decode(written + b"\0")


def test_a_job_outlives_its_process(kept: Kept) -> None:
    record = JobRecord("job-1", 8080, "run", bytes(range(256)), attempt=3, barren=2)
    anyio.run(kept.records.save_job, record)
    assert kept.again().load_job() == record
    assert kept.again().load_answer() is None
    kept.records.drop_job()
    assert kept.again().load_job() is None
    kept.records.drop_job()
    assert kept.faults == []


@pytest.mark.parametrize("output", [None, b"", b"\xff" * 1_000_000])
def test_an_answer_outlives_its_process(kept: Kept, output: bytes | None) -> None:
    anyio.run(kept.records.save_answer, Answer("job-1", output))
    again = kept.again()
    found = again.load_answer()
    assert found == Answer("job-1", output)
    again.drop_answer(found)
    assert [*kept.folder.iterdir()] == []


def test_an_answer_that_was_replaced_is_not_dropped_with_the_one_before(kept: Kept) -> None:
    first, second = Answer("job-1", b"1"), Answer("job-2", None)
    anyio.run(kept.records.save_answer, first)
    anyio.run(kept.records.save_answer, second)
    kept.records.drop_answer(first)
    assert kept.again().load_answer() == second


@pytest.mark.parametrize("damage", [b"", b"heeler-salad-1\n", b"\0" * 100])
def test_damaged_files_are_told_and_ignored(kept: Kept, damage: bytes) -> None:
    for name in ("salad.job", "salad.answer"):
        (kept.folder / name).write_bytes(damage)
    assert (kept.records.load_job(), kept.records.load_answer()) == (None, None)
    assert kept.faults == ["record_damaged"] * 2


def test_a_record_of_another_kind_is_damaged(kept: Kept) -> None:
    for name in ("salad.job", "salad.answer"):
        (kept.folder / name).write_bytes(encode({"other": 1}, b""))
    assert (kept.records.load_job(), kept.records.load_answer()) == (None, None)
    assert kept.faults == ["record_damaged"] * 2


def test_a_folder_that_can_not_be_written_is_told_and_ends_nothing(kept: Kept) -> None:
    lost = Kept(kept.folder / "none")
    anyio.run(lost.records.save_job, JobRecord("job-1", 1, "/", b""))
    anyio.run(lost.records.save_answer, Answer("job-1", b"x" * 100_000))
    assert lost.faults == ["record_failed"] * 2


def test_only_we_can_read_the_files(kept: Kept) -> None:
    anyio.run(kept.records.save_job, JobRecord("job-1", 1, "/", b""))
    assert (kept.folder / "salad.job").stat().st_mode & 0o777 == 0o600


def test_neither_input_nor_output_is_shown() -> None:
    shown = repr(JobRecord("job-1", 1, "/", b"secret")) + repr(Answer("job-1", b"secret"))
    assert "secret" not in shown
