"""A world whose queue is one of SQS (moto's), with records in the bucket."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio

from heeler.config import load
from heeler.records.record import Record, decode_record
from heeler.records.store import RecordStore
from heeler.storage import stores
from tests.acceptance.world import BUCKET, JOB, World, eventually
from tests.support.s3 import Rules, S3Server
from tests.support.sqs_server import REGION, SECRET, WORKER_KEY, SqsServer
from tests.support.worker import Worker, storage_environment

PREFIX = "records/"
NO_RECORDS = {"HEELER_RECORDS": ""}
"""Settings of a worker without a bucket for records."""

_numbers = itertools.count()


class SqsWorld(World):
    """What a test plays with.

    Attributes:
        server: Of the queues.
        url: The queue.
        dead: Its dead-letter queue.
        name: Of the queue.
    """

    def __init__(self, folder: Path, storage: S3Server, server: SqsServer, suffix: str = "", redrive: int = 0) -> None:
        super().__init__(folder, storage)
        number = next(_numbers)
        fifo = {"FifoQueue": "true"} if suffix else {}
        self.server = server
        self.name = f"jobs-{number}{suffix}"
        self.dead = server.queue(f"dead-{number}{suffix}", **fifo)
        policy = {}
        if redrive:
            arn = f"arn:aws:sqs:{REGION}:123456789012:dead-{number}{suffix}"
            policy = {"RedrivePolicy": json.dumps({"maxReceiveCount": redrive, "deadLetterTargetArn": arn})}
        self.url = server.queue(self.name, **fifo, **policy)

    # The queue.

    def submit(self, program: Sequence[str], job_id: str = JOB, **fields: Any) -> str:
        """Put a job into the queue; the message's id."""
        return self.send({"id": job_id, "command": program[0], "arguments": list(program[1:]), **fields})

    def send(self, body: str | Mapping[str, Any], group: str = "", **attributes: str) -> str:
        """Put a message into the queue; its id."""
        text = body if isinstance(body, str) else json.dumps(body)
        more: dict[str, Any] = {}
        if group:
            more = {"MessageGroupId": group, "MessageDeduplicationId": str(next(_numbers))}
        given = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
        sent = self.server.client.send_message(QueueUrl=self.url, MessageBody=text, MessageAttributes=given, **more)
        return str(sent["MessageId"])

    def send_back(self) -> str:
        """Move the one message of the dead-letter queue to the queue, as a person does; its new id."""
        client = self.server.client
        found = client.receive_message(QueueUrl=self.dead, MessageAttributeNames=["All"])["Messages"]
        assert len(found) == 1
        sent = client.send_message(
            QueueUrl=self.url, MessageBody=found[0]["Body"], MessageAttributes=found[0].get("MessageAttributes", {})
        )
        client.delete_message(QueueUrl=self.dead, ReceiptHandle=found[0]["ReceiptHandle"])
        return str(sent["MessageId"])

    def left(self) -> list[dict[str, Any]]:
        """The messages of the queue."""
        return self.server.messages(self.url)

    def set_aside(self) -> list[dict[str, Any]]:
        """The messages of the dead-letter queue."""
        return self.server.messages(self.dead)

    def message(self) -> dict[str, Any]:
        """The one message of the queue."""
        (found,) = self.left()
        return found

    def wait_empty(self, timeout: float = 30.0) -> None:
        """Wait until the queue has no message."""
        self._eventually(lambda: not self.left(), "the queue is empty", timeout)

    def wait_dead(self, count: int = 1, timeout: float = 30.0) -> list[dict[str, Any]]:
        """Wait until the dead-letter queue has so many messages, and the queue none."""
        self._eventually(lambda: len(self.set_aside()) >= count and not self.left(), "a dead letter", timeout)
        found = self.set_aside()
        assert len(found) == count, found
        return found

    # Records and results.

    def records(self) -> RecordStore:
        """The records, as `heeler cancel` has them."""
        open_store = stores(load({}, storage_environment(self.storage)).settings)
        return RecordStore(lambda: open_store(BUCKET), f"{PREFIX}{self.name}/")

    def update(self, change: Callable[[Record], Record | None], job_id: str = JOB) -> None:
        """Change a record, whoever else writes it."""
        assert anyio.run(self.records().update, job_id, change) is not None

    def record_key(self, job_id: str = JOB) -> str:
        """The key of a job's record."""
        return f"{PREFIX}{self.name}/jobs/{job_id}.json"

    def record(self, job_id: str = JOB) -> Record | None:
        """A job's record."""
        versions = self.storage.history(BUCKET, self.record_key(job_id))
        return None if not versions or versions[-1] is None else decode_record(versions[-1])

    def record_versions(self, job_id: str = JOB) -> list[Record]:
        """All that a job's record ever was."""
        versions = self.storage.history(BUCKET, self.record_key(job_id))
        return [decode_record(version) for version in versions if version is not None]

    def results(self, job_id: str = JOB) -> dict[str, list[bytes | None]]:
        """All that each object with a result of a job ever was."""
        below = f"{PREFIX}{self.name}/results/{job_id}/"
        keys = [key for key in self.storage.objects(BUCKET) if key.startswith(below)]
        return {key: self.storage.history(BUCKET, key) for key in keys}

    def result(self, job_id: str = JOB) -> bytes:
        """The result that a job's record names."""
        record = self.record(job_id)
        assert record is not None
        return self.storage.objects(BUCKET)[record.result_key]

    def wait_record(self, state: str, job_id: str = JOB, timeout: float = 30.0) -> Record:
        """Wait until a record says so."""

        def there() -> Record | None:
            record = self.record(job_id)
            return record if record is not None and record.state == state else None

        record: Record = self._eventually(there, f"the record of {job_id} says {state}", timeout)
        return record

    def _eventually(self, condition: Callable[[], Any], what: str, timeout: float) -> Any:
        try:
            return eventually(condition, what, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.left()}\n{self.set_aside()}\n{self.logs()}") from None

    def logs(self) -> str:
        """The workers' last lines."""
        return "\n".join(line for worker in self.started for line in [f"worker {worker.pid}", *worker.lines[-40:]])

    # Workers.

    def environment(self, **extra: str) -> dict[str, str]:
        """Of a worker of this queue, with records."""
        ours = {
            "SQS_QUEUE_URL": self.url,
            "SQS_DLQ_URL": self.dead,
            "SQS_AWS_REGION": REGION,
            "SQS_AWS_ACCESS_KEY_ID": WORKER_KEY,
            "SQS_AWS_SECRET_ACCESS_KEY": SECRET,
            "HEELER_RECORDS": f"s3://{BUCKET}/{PREFIX}",
            "HEELER_RETRY_DELAY": "0.5",
        }
        return super().environment(**{**ours, **extra})

    @contextmanager
    def worker(
        self,
        *arguments: str,
        name: str = "a",
        machine: str = ".",
        wrapper: Sequence[str] = (),
        **environment: str,
    ) -> Iterator[Worker]:
        """As `World.worker`."""
        place = self.folder / machine
        place.mkdir(exist_ok=True)
        with Worker(
            *("--source", "sqs", *arguments),
            state_dir=self.folder / f"state-{name}",
            env=self.environment(**environment),
            cwd=place,
            wrapper=wrapper,
        ) as worker:
            self.started.append(worker)
            yield worker


@contextmanager
def sqs_world(folder: Path, server: SqsServer, suffix: str = "", redrive: int = 0) -> Iterator[SqsWorld]:
    """A world whose storage remembers every version."""
    with S3Server.start(rules=Rules(keep_history=True), buckets=[BUCKET]) as storage:
        world = SqsWorld(folder, storage, server, suffix, redrive)
        try:
            yield world
        finally:
            world.close()
