"""What has to outlive the process of the Salad Job Queue's one job: the job, then its answer until the queue has it.

The service does not send a job again to a worker that still has it (PROTOCOLS 1), so its input is kept here. Two
files in the state folder, each replaced at once and with a checksum. They are not synced to the disk: a power cut
takes the whole machine away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread

_MAGIC = b"heeler-salad-1\n"
_DIGEST_BYTES = 16
_LENGTH_BYTES = 4
_THREAD_BYTES = 64 << 10
"""Larger records are written in a thread: the heartbeats must not wait for them."""

T = TypeVar("T")


class DamagedRecordError(Exception):
    """A file is not, or not all, of what was written."""


@dataclass(frozen=True)
class JobRecord:
    """The job that this machine has.

    Attributes:
        job_id: The service's id.
        port: Where the program listens.
        path: What to POST the input to, as the service sent it.
        input: The job's body.
        attempt: Which start of it on this machine this is, from 1.
        barren: How many starts in a row, this one included, made nothing durable.
    """

    job_id: str
    port: int
    path: str
    input: bytes = field(repr=False)
    attempt: int = 1
    barren: int = 1


@dataclass(frozen=True)
class Answer:
    """What the service is to be told of a job.

    Attributes:
        job_id: The service's id.
        output: Of `CompleteJob`; None for `RejectJob`.
    """

    job_id: str
    output: bytes | None = field(repr=False)


class Records:
    """The two files. `on_fault` is told of what can't be read or written: the job goes on without them."""

    def __init__(self, folder: Path, on_fault: Callable[..., None]) -> None:
        self._job = folder / "salad.job"
        self._answer = folder / "salad.answer"
        self._on_fault = on_fault
        self._kept: Answer | None = None

    def load_job(self) -> JobRecord | None:
        """The job that an earlier process had; None without one, or if the file is damaged."""
        return self._load(self._job, lambda fields, body: JobRecord(**fields, input=body))

    def load_answer(self) -> Answer | None:
        """The answer that an earlier process could not deliver; None without one, or if the file is damaged."""
        self._kept = self._load(
            self._answer, lambda fields, body: Answer(fields["job_id"], body if fields["complete"] else None)
        )
        return self._kept

    async def save_job(self, record: JobRecord) -> None:
        """Keep the job, before it is given out."""
        fields = {
            "job_id": record.job_id,
            "port": record.port,
            "path": record.path,
            "attempt": record.attempt,
            "barren": record.barren,
        }
        await self._save(self._job, fields, record.input)

    async def save_answer(self, answer: Answer) -> None:
        """Keep the answer, before the service is told."""
        fields = {"job_id": answer.job_id, "complete": answer.output is not None}
        self._kept = answer
        await self._save(self._answer, fields, answer.output or b"")

    def drop_job(self) -> None:
        """The job is no longer ours."""
        self._drop(self._job)

    def drop_answer(self, answer: Answer) -> None:
        """The service has it. Nothing happens if another is kept by now."""
        if answer is self._kept:
            self._drop(self._answer)

    def _load(self, path: Path, make: Callable[[dict[str, Any], bytes], T]) -> T | None:
        try:
            return make(*decode(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (DamagedRecordError, KeyError, TypeError) as error:
            self._on_fault("record_damaged", path=str(path), error=str(error))
        except OSError as error:
            self._on_fault("record_failed", path=str(path), error=error.strerror or str(error))
        return None

    async def _save(self, path: Path, fields: dict[str, Any], body: bytes) -> None:
        try:
            if len(body) > _THREAD_BYTES:
                await anyio.to_thread.run_sync(replace_file, path, fields, body)
            else:
                replace_file(path, fields, body)
        except OSError as error:
            self._on_fault("record_failed", path=str(path), error=error.strerror or str(error))

    def _drop(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._on_fault("record_failed", path=str(path), error=error.strerror or str(error))


def encode(fields: dict[str, Any], body: bytes) -> bytes:
    """A record as it stands in a file."""
    head = json.dumps(fields).encode()
    content = b"".join((_MAGIC, len(head).to_bytes(_LENGTH_BYTES, "big"), head, body))
    return content + blake2b(content, digest_size=_DIGEST_BYTES).digest()


def decode(data: bytes) -> tuple[dict[str, Any], bytes]:
    """What `encode` was given.

    Raises:
        DamagedRecordError: It gave nothing of the kind.
    """
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if not content.startswith(_MAGIC) or blake2b(content, digest_size=_DIGEST_BYTES).digest() != digest:
        raise DamagedRecordError("it is cut short, or not a record of ours")
    start = len(_MAGIC) + _LENGTH_BYTES
    end = start + int.from_bytes(content[len(_MAGIC) : start], "big")
    return json.loads(content[start:end]), content[end:]


def replace_file(path: Path, fields: dict[str, Any], body: bytes) -> None:
    """Put a record in the place of the one that a file holds: never half of it. Blocks."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb", buffering=0, opener=_private) as file:
        left = memoryview(encode(fields, body))
        while left:
            left = left[file.write(left) :]
    os.replace(temporary, path)  # noqa: PTH105 - pathlib's takes twice as long


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
