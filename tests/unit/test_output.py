"""Where a program's output goes: copied on at once, kept in its job's log, and never a reason to fail."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest

from heeler.app.output import JobLog, passed_to, prune_logs


@pytest.fixture
def errors() -> list[OSError]:
    return []


def test_output_is_passed_on_at_once() -> None:
    stream = io.BufferedWriter(raw := io.BytesIO())
    passed_to(stream)(b"no line break")
    assert raw.getvalue() == b"no line break"


def test_a_reader_who_went_away_is_no_fault() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "wb")
    write = passed_to(stream)
    write(b"x")
    write(b"y")
    with pytest.raises(BrokenPipeError):
        stream.close()
    write(b"z")


def test_a_full_disk_below_our_output_is_no_fault_of_the_job() -> None:
    stream = open("/dev/full", "wb")  # noqa: SIM115
    passed_to(stream)(b"x" * 10)
    passed_to(stream)(b"x" * 100_000)
    with pytest.raises(OSError, match="No space"):
        stream.close()


def test_a_log_keeps_all_attempts(tmp_path: Path, errors: list[OSError]) -> None:
    for data in (b"first\n", b"second\n"):
        log = JobLog(tmp_path / "job/job.log", errors.append)
        log.write(data)
        assert (tmp_path / "job/job.log").read_bytes().endswith(data), "at once"
        log.close()
    assert (tmp_path / "job/job.log").read_bytes() == b"first\nsecond\n"
    assert errors == []


def test_a_log_keeps_the_newest_of_a_job_that_never_stops_talking(tmp_path: Path, errors: list[OSError]) -> None:
    log = JobLog(tmp_path / "job.log", errors.append, limit=1000)
    everything = b""
    for number in range(200):
        line = b"%0100d\n" % number
        everything += line
        log.write(line)
        kept = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert kept <= 2000
    log.close()
    older, newer = (tmp_path / "job.log.1").read_bytes(), (tmp_path / "job.log").read_bytes()
    assert everything.endswith(older + newer)
    assert len(older + newer) >= 1000
    assert errors == []


def test_an_old_log_is_rotated_by_what_it_holds_already(tmp_path: Path, errors: list[OSError]) -> None:
    (tmp_path / "job.log").write_bytes(b"o" * 999)
    log = JobLog(tmp_path / "job.log", errors.append, limit=1000)
    log.write(b"new")
    log.close()
    assert (tmp_path / "job.log").read_bytes() == b"new"
    assert (tmp_path / "job.log.1").read_bytes() == b"o" * 999


def test_one_chunk_larger_than_the_limit_is_kept(tmp_path: Path, errors: list[OSError]) -> None:
    log = JobLog(tmp_path / "job.log", errors.append, limit=10)
    log.write(b"x" * 50)
    log.write(b"y" * 50)
    log.close()
    assert (tmp_path / "job.log").read_bytes() == b"y" * 50


def test_a_log_that_can_not_be_kept_is_told_once_and_the_job_goes_on(tmp_path: Path, errors: list[OSError]) -> None:
    (tmp_path / "job").write_bytes(b"a file in the way")
    log = JobLog(tmp_path / "job/job.log", errors.append)
    for _ in range(3):
        log.write(b"x")
    log.close()
    assert len(errors) == 1


def test_a_disk_that_fills_up_is_told_once(errors: list[OSError]) -> None:
    log = JobLog(Path("/dev/full"), errors.append)
    for _ in range(3):
        log.write(b"x" * 10)
    log.close()
    assert [error.strerror for error in errors] == ["No space left on device"]


def test_both_streams_may_write_at_once(tmp_path: Path, errors: list[OSError]) -> None:
    log = JobLog(tmp_path / "job.log", errors.append, limit=1 << 20)
    line = b"x" * 99 + b"\n"

    def write() -> None:
        for _ in range(500):
            log.write(line)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert (tmp_path / "job.log").read_bytes() == line * 2000


def test_only_the_newest_jobs_keep_their_logs(tmp_path: Path) -> None:
    for number in range(6):
        folder = tmp_path / f"j{number}"
        folder.mkdir()
        (folder / "job.log").write_bytes(b"x")
        os.utime(folder, (1000 + number, 1000 + number))
    prune_logs(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j4", "j5"]
    prune_logs(tmp_path / "none")


def test_logs_that_can_not_be_listed_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    os.utime(file, (1000, 1000))
    prune_logs(file)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for number in range(3):
        (tmp_path / f"j{number}").mkdir()
    prune_logs(tmp_path, keep=3)
    assert {"j0", "j1", "j2"} <= {path.name for path in tmp_path.iterdir()}
    prune_logs(tmp_path / "circle/x")
