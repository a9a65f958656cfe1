"""What the commands for people do: submit, list, show, cancel, status, config. Plain lines, tables, or JSON."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heeler import documents
from heeler.config import Configuration
from heeler.control import client
from heeler.desks import opened_desk
from heeler.errors import HeelerError, UnavailableError, UsageError
from heeler.job import InvalidJobError
from heeler.job_lines import readable
from heeler.settings import Settings
from heeler.sources.base import (
    FRESH_RUN,
    Desk,
    JobRecord,
    PartlySubmittedError,
    SourceUnavailableError,
    SubmitOptions,
)

_SLOWER = 1.2
"""Each pause of somebody who waits is so much longer than the one before."""
_WAIT_PATIENCE = 600.0
"""Seconds without an answer after which who waits is told; jobs take longer than most faults."""
_GOING_ON = {"pending", "running"}


@dataclass(frozen=True)
class Submission:
    """How `heeler submit` was called.

    Attributes:
        file: Where the documents are; "-" is standard input.
        wait: Return when all have ended: 1 if a job did not end done.
        fresh: Give each a new run id, so that checkpoints and results of earlier runs don't count.
        array: Each document so often, with an index; None for once, without.
        group: The message group of a FIFO queue.
    """

    file: str
    wait: bool = False
    fresh: bool = False
    array: int | None = None
    group: str | None = None


class NoResultError(HeelerError):
    """There is a job of that id, and it has left nothing (yet)."""

    exit_code = 1


def submit(settings: Settings, how: Submission) -> int:
    """Submit what a file holds and print the ids.

    Raises:
        HeelerError: Nothing was submitted, or the message says how much; it names what to mend.
    """
    found = documents_of(how)
    options = SubmitOptions(how.group, how.fresh)
    return _submit(settings, how, lambda desk: desk.submit(found, options))


def submit_message(settings: Settings, how: Submission) -> int:
    """Submit the bytes of a file as one message for an app; as `submit` otherwise."""
    message = documents.read_bytes(how.file)
    return _submit(settings, how, lambda desk: [desk.submit_message(message, SubmitOptions(how.group))])


def documents_of(how: Submission) -> list[bytes]:
    """The documents of a file, as they are to be submitted.

    Raises:
        UsageError: It holds none.
    """
    found = documents.split_documents(documents.read_text(how.file))
    if how.array is not None:
        try:
            found = documents.numbered(found, how.array, lambda: secrets.token_hex(8))
        except InvalidJobError as error:
            raise _refused(how, error) from None
    if how.fresh:
        run_id = FRESH_RUN + secrets.token_hex(8)
        found = [documents.with_run_id(document, run_id) for document in found]
    return found


def _submit(settings: Settings, how: Submission, send: Callable[[Desk], list[str]]) -> int:
    with opened_desk(settings) as desk:
        if how.wait:
            _check_wait(desk)
        try:
            ids = send(desk)
        except InvalidJobError as error:
            raise _refused(how, error) from None
        except PartlySubmittedError as error:
            _print_ids(error.sent)
            raise
        _print_ids(ids)
        _print_notes(desk)
        return _wait(desk, ids) if how.wait else 0


def _check_wait(desk: Desk) -> None:
    """Whoever can't be told how jobs end is to know it before they are sent."""
    try:
        desk.look([])
    except UsageError as error:
        raise UsageError(f"--wait: {error}") from None


def _refused(how: Submission, error: InvalidJobError) -> UsageError:
    return UsageError(f"{documents.name_of(how.file)}: the job is refused: {error}")


def _print_ids(ids: Sequence[str]) -> None:
    for job_id in ids:
        print(job_id)
    sys.stdout.flush()


def _print_notes(desk: Desk) -> None:
    for note in desk.notes():
        print(f"note: {note}", file=sys.stderr, flush=True)


def _wait(desk: Desk, ids: Sequence[str]) -> int:
    left = [*ids]
    failed = False
    pause, longest = desk.pace
    heard = time.monotonic()
    while left:
        time.sleep(pause)
        pause = min(longest, pause * _SLOWER)
        try:
            found = desk.look(left)
        except (UnavailableError, SourceUnavailableError):
            if time.monotonic() - heard > _WAIT_PATIENCE:
                raise
            continue
        heard = time.monotonic()
        states = {job_id: found[job_id].state if job_id in found else "gone" for job_id in left}
        left = [job_id for job_id in left if states[job_id] in _GOING_ON]
        for job_id, state in states.items():
            if state not in _GOING_ON:
                failed = failed or state != "done"
                print(f"{job_id} {state}", file=sys.stderr, flush=True)
    return int(failed)


def print_jobs(settings: Settings, *, as_json: bool) -> None:
    """All jobs of the queue."""
    with opened_desk(settings) as desk:
        records = desk.jobs()
        if as_json:
            _print_json([asdict(record) for record in records])
        else:
            head = ("ID", "STATE", "ATTEMPTS", "FAILURES", "REASON")
            rows = [(job.id, job.state, str(job.attempts), str(job.failures), job.reason) for job in records]
            _print_table(head, rows)
        _print_notes(desk)


def print_job(settings: Settings, job_id: str, *, as_json: bool) -> None:
    """One job.

    Raises:
        UsageError: There is none of that id.
    """
    with opened_desk(settings) as desk:
        record = _job(desk, job_id)
    if as_json:
        _print_json(asdict(record))
        return
    for name, value in readable(record, time.time()):
        print(f"{name:14} {value}")


def _job(desk: Desk, job_id: str) -> JobRecord:
    record = desk.show(job_id)
    if record is None:
        raise UsageError(f"no job {job_id!r} in {desk.name}")
    return record


def print_result(settings: Settings, job_id: str, output: Path | None) -> None:
    """What a job left, byte for byte, to a file or to standard output.

    Raises:
        UsageError: There is no job of that id, or the file can't be written.
        NoResultError: It has left nothing.
    """
    with opened_desk(settings) as desk:
        record = _job(desk, job_id)
        ended = record.state not in _GOING_ON
        body = desk.result(job_id) if ended else None
    if not ended:
        raise NoResultError(f"job {job_id} is {record.state}: it has no result yet")
    if body is None:
        raise NoResultError(f"job {job_id} is {record.state}, without a result{_because(record)}")
    if output is None:
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()
        return
    try:
        output.write_bytes(body)
    except OSError as error:
        raise UsageError(f"--output {output} can't be written: {error.strerror}") from None


def _because(record: JobRecord) -> str:
    return "" if record.reason in ("", record.state) else f": {' '.join(record.reason.split())}"


def cancel(settings: Settings, job_id: str) -> None:
    """Cancel a job.

    Raises:
        UsageError: There is none of that id, or it has ended.
    """
    with opened_desk(settings) as desk:
        before = _job(desk, job_id)
        if not desk.cancel(job_id):
            now = desk.show(job_id) or before
            raise UsageError(f"job {job_id} is {now.state} already")
    running = before.state == "running"
    print(f"{job_id} cancelled" + ("; its worker stops it at its next heartbeat" if running else ""))


def print_status(settings: Settings, *, as_json: bool) -> None:
    """What the runtime of our state folder says, and how many jobs the queue has in each state."""
    runtime = client.ask(settings)
    queue: dict[str, int] | None = None
    if settings.source is not None and settings.source.startswith("local:"):
        with opened_desk(settings) as desk:
            queue = dict(Counter(record.state for record in desk.jobs()))
    if runtime is None and queue is None:
        raise UsageError(f"no runtime answers for the state folder {settings.state_dir}; is HEELER_STATE_DIR right?")
    if as_json:
        _print_json({"runtime": runtime, "queue": queue})
        return
    _print_runtime(runtime)
    if queue is not None:
        print("queue     " + (", ".join(f"{count} {state}" for state, count in sorted(queue.items())) or "empty"))


def _print_runtime(runtime: dict[str, Any] | None) -> None:
    if runtime is None:
        print("runtime   none answers")
        return
    jobs = [f", job {job['job_id']} attempt {job['attempt']}" for job in runtime["jobs"]]
    job = "".join(jobs)
    since = time.strftime("%H:%M:%S", time.localtime(runtime["since"]))
    print(f"runtime   {runtime['worker']} on {runtime['source']}")
    print(f"phase     {runtime['phase']} since {since}{job}{', draining' if runtime['draining'] else ''}")
    if kept := runtime["checkpoint"]:
        when = time.strftime("%H:%M:%S", time.localtime(kept["time"]))
        print(f"kept      generation {kept['generation']} at {when}: {kept['files']} files, {kept['bytes']} bytes")
    if runtime["unfenced"]:
        print("unfenced  this storage can't keep a superseded worker from overwriting newer checkpoints")
    ended = ", ".join(f"{count} {name}" for name, count in sorted(runtime["outcomes"].items()))
    print(f"attempts  {ended or 'none ended yet'}")
    for fault in runtime["faults"][-5:]:
        when = time.strftime("%H:%M:%S", time.localtime(fault["time"]))
        what = fault.get("error") or fault.get("reason") or ""
        print(f"fault     {when} {fault['event']} {what}".rstrip())


def take_checkpoint(settings: Settings, *, as_json: bool) -> None:
    """Have the runtime make the running job's checkpoints durable; print them when they are."""
    found = client.take_checkpoint(settings)
    if as_json:
        _print_json({"generations": found})
        return
    for generation in found:
        print(f"generation {generation['number']}: {generation['files']} files, {generation['bytes']} bytes")
    if not found:
        print("nothing to keep: the job has no snapshot folders, or they are empty")


def print_config(configuration: Configuration, *, as_json: bool) -> None:
    """Every setting, its value with secrets masked, and where it came from."""
    rows = list(configuration.table())
    if as_json:
        _print_json({name: {"value": value, "origin": origin} for name, value, origin in rows})
        return
    _print_table(("SETTING", "VALUE", "ORIGIN"), rows)


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=2))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 - a pipe never needs it
        from rich.table import Table  # noqa: PLC0415

        table = Table(*head, box=None, header_style="bold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
