"""What the commands for people do: submit, list, show, cancel, status, config. Plain lines, tables, or JSON."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heeler.config import Configuration, Settings
from heeler.control import client
from heeler.errors import UsageError
from heeler.job import InvalidJobError, Result
from heeler.sources import open_desk
from heeler.sources.base import Desk, JobRecord

_POLL_SECONDS = 0.2
_BODY_SHOWN = 200
_ENDED = {"done", "failed", "cancelled"}


def submit(source: str | None, file: str, *, wait: bool, fresh: bool) -> int:
    """Submit what `file` ("-" is standard input) holds and print the ids.

    Args:
        source: The queue.
        file: Where the documents are.
        wait: Return when all have ended: 1 if a job did not end done.
        fresh: Give each a new run id, so that checkpoints and results of earlier runs don't count.

    Raises:
        HeelerError: Nothing was submitted; the message names what to mend.
    """
    documents = split_documents(_read(file))
    if fresh:
        documents = [_with_run_id(document) for document in documents]
    desk = open_desk(source)
    try:
        ids = desk.submit(documents)
    except InvalidJobError as error:
        raise UsageError(f"{_name(file)}: the job is refused: {error}") from None
    for job_id in ids:
        print(job_id, flush=True)
    return _wait(desk, ids) if wait else 0


def submit_message(source: str | None, file: str, *, wait: bool) -> int:
    """Submit the bytes of `file` as one message for an app; as `submit` otherwise."""
    desk = open_desk(source)
    job_id = desk.submit_message(_read_bytes(file))
    print(job_id, flush=True)
    return _wait(desk, [job_id]) if wait else 0


def _wait(desk: Desk, ids: Sequence[str]) -> int:
    left = set(ids)
    failed = False
    while left:
        time.sleep(_POLL_SECONDS)
        for job_id in [*left]:
            record = desk.show(job_id)
            if record is None or record.state in _ENDED:
                left.discard(job_id)
                state = "gone" if record is None else record.state
                failed = failed or state != "done"
                print(f"{job_id} {state}", file=sys.stderr, flush=True)
    return int(failed)


def _name(file: str) -> str:
    return "standard input" if file == "-" else file


def _read(file: str) -> str:
    try:
        return _read_bytes(file).decode()
    except ValueError as error:
        raise UsageError(f"{_name(file)} can't be read: {error}") from None


def _read_bytes(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"{_name(file)} can't be read: {error.strerror}") from None


def split_documents(text: str) -> list[bytes]:
    """The job documents in a text: one object, a list of objects, or one object a line.

    Raises:
        UsageError: It is none of these.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or not lines[0].rstrip().endswith("}"):
            raise UsageError(f"the job document is not JSON: {error}") from None
        return [line.encode() for line in lines]
    documents = data if isinstance(data, list) else [data]
    if not documents:
        raise UsageError("the list of job documents is empty")
    return [json.dumps(document).encode() for document in documents]


def _with_run_id(document: bytes) -> bytes:
    data = json.loads(document)
    if not isinstance(data, dict):
        return document  # refused by name in a moment
    return json.dumps({**data, "run_id": secrets.token_hex(8)}).encode()


def print_jobs(source: str | None, *, as_json: bool) -> None:
    """All jobs of the queue."""
    records = open_desk(source).jobs()
    if as_json:
        _print_json([asdict(record) for record in records])
        return
    head = ("ID", "STATE", "ATTEMPTS", "FAILURES", "REASON")
    rows = [(job.id, job.state, str(job.attempts), str(job.failures), job.reason) for job in records]
    _print_table(head, rows)


def print_job(source: str | None, job_id: str, *, as_json: bool) -> None:
    """One job.

    Raises:
        UsageError: There is none of that id.
    """
    record = open_desk(source).show(job_id)
    if record is None:
        raise UsageError(f"no job {job_id!r} in {source}")
    if as_json:
        _print_json(asdict(record))
        return
    for name, value in _readable(record):
        print(f"{name:14} {value}")


def _readable(record: JobRecord) -> Iterable[tuple[str, str]]:
    for name, value in asdict(record).items():
        if name in ("created", "finished"):
            yield name, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value)) if value else ""
        elif name == "result":
            yield name, _result_words(value or {})
        else:
            yield name, str(value)


def _result_words(result: Mapping[str, Any]) -> str:
    """A result in one line; of an app's answer its beginning, if it is text."""
    shown = {name: part for name, part in result.items() if part is not None}
    if "body" in shown:
        body = Result.from_json(result).body
        text = body[:_BODY_SHOWN].decode("utf-8", "replace")
        whole = text.isprintable() and len(body) <= _BODY_SHOWN
        shown["body"] = text if whole else f"{len(body)} bytes (--json has them, in base64)"
    return " ".join(f"{name}={part}" for name, part in shown.items())


def cancel(source: str | None, job_id: str) -> None:
    """Cancel a job.

    Raises:
        UsageError: There is none of that id, or it has ended.
    """
    desk = open_desk(source)
    before = desk.show(job_id)
    if before is None:
        raise UsageError(f"no job {job_id!r} in {source}")
    if not desk.cancel(job_id):
        raise UsageError(f"job {job_id} is {before.state} already")
    running = before.state == "running"
    print(f"{job_id} cancelled" + ("; its worker stops it at its next heartbeat" if running else ""))


def print_status(settings: Settings, *, as_json: bool) -> None:
    """What the runtime of our state folder says, and how many jobs the queue has in each state."""
    runtime = client.ask(settings)
    queue: dict[str, int] | None = None
    if settings.source is not None and settings.source.startswith("local:"):
        queue = {}
        for record in open_desk(settings.source).jobs():
            queue[record.state] = queue.get(record.state, 0) + 1
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
