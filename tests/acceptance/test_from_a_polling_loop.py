"""The code of docs/from-a-polling-loop.md as it stands there: the old worker, the program in two ways, and a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

from heeler.local.storage import ACCESS_KEY, SECRET_KEY, LocalStorage, local_storage
from tests.acceptance.world import eventually
from tests.support.worker import Worker, clean_environment

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "from-a-polling-loop.md").read_text(encoding="utf-8")
CODE: list[tuple[str, str]] = re.findall(r"^```python\n# (\S+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS: list[str] = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
BUCKET = "lab"
NUMBERS = [3, 1, 4, 1, 5, 9]
RESULT = b'{"total": 133}'
OLD_JOB = {"id": "one"}
NEW_JOB = json.loads(re.findall(r"`(\{\"id\": \"one\", .*?\})`", PAGE)[0])


def code(name: str, which: int = 0) -> str:
    """The block of that file on the page."""
    return [text for found, text in CODE if found == name][which]


@pytest.fixture(scope="module")
def service() -> Iterator[LocalStorage]:
    with local_storage() as found:
        yield found


class Lab:
    """A queue with its dead-letter queue, a bucket with the inputs of a job, and machines."""

    def __init__(self, service: LocalStorage, folder: Path) -> None:
        self.folder = folder
        self.sqs: Any = boto3.client(
            "sqs",
            endpoint_url=service.url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )
        self.s3 = service.client()
        self.bucket = f"{BUCKET}-{folder.name}".replace("_", "-")[:60].strip("-").lower()
        self.s3.create_bucket(Bucket=self.bucket)
        self.s3.put_object(Bucket=self.bucket, Key="inputs/one/numbers.txt", Body="\n".join(map(str, NUMBERS)).encode())
        name = folder.name[:60]
        self.queue: str = self.sqs.create_queue(QueueName=f"{name}-jobs")["QueueUrl"]
        self.dead: str = self.sqs.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
        self.environment = clean_environment(
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            SQS_QUEUE_URL=self.queue,
            SQS_DLQ_URL=self.dead,
            SQS_AWS_REGION="us-east-1",
            SQS_AWS_ACCESS_KEY_ID=ACCESS_KEY,
            SQS_AWS_SECRET_ACCESS_KEY=SECRET_KEY,
            AWS_ENDPOINT_URL_SQS=service.url,
            R2_S3_ENDPOINT_URL=service.url,
            R2_AWS_ACCESS_KEY_ID=ACCESS_KEY,
            R2_AWS_SECRET_ACCESS_KEY=SECRET_KEY,
            R2_BUCKET_NAME=self.bucket,
        )

    def submit(self, body: Mapping[str, Any], **attributes: str) -> None:
        said = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
        self.sqs.send_message(QueueUrl=self.queue, MessageBody=json.dumps(body), MessageAttributes=said)

    def left(self, queue: str) -> int:
        """Messages in a queue, hidden or not."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=names)["Attributes"]
        return sum(int(count) for count in found.values())

    def objects(self) -> dict[str, bytes]:
        listed = self.s3.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return {
            entry["Key"]: self.s3.get_object(Bucket=self.bucket, Key=entry["Key"])["Body"].read() for entry in listed
        }

    def wait_done(self) -> dict[str, bytes]:
        """All objects, once the queue is empty."""
        eventually(lambda: self.left(self.queue) == 0, "the queue is empty", 60)
        assert self.left(self.dead) == 0
        return self.objects()

    def results(self) -> dict[str, bytes]:
        return {key: body for key, body in self.objects().items() if key.startswith("results/")}

    def machine(self, name: str, *files: tuple[str, str]) -> Path:
        """A new machine with these files."""
        place = self.folder / name
        place.mkdir()
        for file, text in files:
            (place / file).write_text(text)
        return place

    @contextmanager
    def old_worker(self, name: str, **environment: str) -> Iterator[OldWorker]:
        """The page's worker on a new machine."""
        place = self.machine(name, ("worker.py", code("worker.py")), ("program.py", code("program.py")))
        with OldWorker(place, {**self.environment, **environment}) as worker:
            yield worker

    @contextmanager
    def heeler(self, name: str, command: str, *files: tuple[str, str]) -> Iterator[Worker]:
        """A command line of the page, with the folders of this test."""
        place = self.machine(name, *files)
        told = COMMANDS[0].replace("$R2_BUCKET_NAME", self.bucket)
        exported = dict(re.findall(r'^export (\w+)="?(.*?)"?$', told, re.MULTILINE))
        assert set(exported) == {"HEELER_INPUTS", "HEELER_OUTPUTS", "HEELER_CHECKPOINTS", "HEELER_CHECKPOINT_READY"}
        folders = {f"HEELER_{part}_DIR": f"work/{part.lower()}" for part in ("INPUT", "CHECKPOINT", "OUTPUT")}
        quick = {"HEELER_COMMIT_INTERVAL": "0.5", "HEELER_SQS_VISIBILITY": "5", "HEELER_STOP_GRACE": "10"}
        with Worker(
            *command.split()[2:],
            state_dir=place / "state",
            env={**self.environment, **exported, **folders, **quick},
            cwd=place,
        ) as worker:
            yield worker


class OldWorker:
    """The hand-written one as a process, and what it and its program print."""

    def __init__(self, place: Path, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "worker.py"],
            cwd=place,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def __enter__(self) -> OldWorker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._thread.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_for(self, line: str) -> None:
        eventually(lambda: line in self.lines, f"{line!r} is printed: {self.lines}", 60)


@pytest.fixture
def lab(service: LocalStorage, tmp_path: Path) -> Lab:
    return Lab(service, tmp_path)


def test_the_page_has_the_code_that_is_run_here() -> None:
    assert [name for name, _ in CODE] == ["worker.py", "program.py", "program.py", "app.py"]
    assert COMMANDS[0].splitlines()[-1] == "heeler run"
    assert len(COMMANDS) == 2
    for name, text in CODE:
        compile(text, name, "exec")


def test_the_old_worker_does_the_job(lab: Lab) -> None:
    lab.submit(OLD_JOB)
    with lab.old_worker("machine") as worker:
        lab.wait_done()
        assert lab.results() == {"results/one/total.json": RESULT}
        worker.process.send_signal(signal.SIGTERM)
    assert "6 of 6" in worker.lines


def test_the_program_as_a_command_leaves_the_same_output(lab: Lab) -> None:
    lab.submit(NEW_JOB)
    program = ("program.py", code("program.py", 1))
    with lab.heeler("machine", COMMANDS[0].splitlines()[-1], program) as worker:
        worker.wait_for("job_settled", outcome="done", timeout=60)
        assert worker.find("job_settled", job_id="one")
    lab.wait_done()
    assert lab.results() == {"results/one/total.json": RESULT}


def test_the_old_program_runs_as_it_is(lab: Lab) -> None:
    lab.submit(NEW_JOB)
    with lab.heeler("machine", "heeler run", ("program.py", code("program.py"))) as worker:
        worker.wait_for("job_settled", outcome="done", timeout=60)
    assert lab.results() == {"results/one/total.json": RESULT}


def test_the_program_as_an_app_takes_the_old_message_and_leaves_the_same_output(lab: Lab) -> None:
    lab.submit(OLD_JOB, **{"heeler-job-id": "one"})
    command = COMMANDS[1].strip().replace("--port 8080", "--port 0")
    with lab.heeler("machine", command, ("app.py", code("app.py"))) as worker:
        worker.wait_for("job_settled", outcome="done", timeout=60)
    objects = lab.wait_done()
    assert lab.results() == {"results/one/total.json": RESULT}
    (answer,) = [body for key, body in objects.items() if key.endswith("/results/one/1")]
    assert json.loads(answer) == json.loads(RESULT)


def test_an_old_message_in_command_mode_is_a_dead_letter_with_its_reason(lab: Lab) -> None:
    lab.submit(OLD_JOB)
    with lab.heeler("machine", "heeler run", ("program.py", code("program.py", 1))):
        eventually(lambda: lab.left(lab.dead) == 1 and lab.left(lab.queue) == 0, "a dead letter", 60)
    (letter,) = lab.sqs.receive_message(QueueUrl=lab.dead, MessageAttributeNames=["All"])["Messages"]
    assert json.loads(letter["Body"]) == OLD_JOB
    assert "command: is missing" in letter["MessageAttributes"]["heeler-reason"]["StringValue"]


def test_a_kill_loses_the_work_of_the_old_worker(lab: Lab) -> None:
    lab.submit(OLD_JOB)
    with lab.old_worker("machine-1", VISIBILITY="3") as killed:
        killed.wait_for("4 of 6")
    with lab.old_worker("machine-2", VISIBILITY="3") as second:
        lab.wait_done()
    assert second.lines[0] == "1 of 6"
    assert lab.results() == {"results/one/total.json": RESULT}


def test_a_kill_costs_heeler_the_work_since_the_last_checkpoint(lab: Lab) -> None:
    lab.submit(NEW_JOB)
    program = ("program.py", code("program.py", 1))
    with lab.heeler("machine-1", "heeler run", program) as killed:
        killed.wait_for("committed", count=2, timeout=60)
    with lab.heeler("machine-2", "heeler run", program) as second:
        second.wait_for("job_settled", outcome="done", timeout=60)
        first_step = second.stdout.decode().splitlines()[0]
    assert re.fullmatch("[2-6] of 6", first_step)
    assert lab.results() == {"results/one/total.json": RESULT}
    lab.wait_done()


def test_messages_that_the_old_worker_received_at_once_lapse_while_they_wait(lab: Lab) -> None:
    """And another worker does them, too; in heeler a free slot gets one message."""
    for _ in range(3):
        lab.submit(OLD_JOB)
    with lab.old_worker("machine-1", VISIBILITY="2") as first:
        first.wait_for("1 of 6")
        with lab.old_worker("machine-2", VISIBILITY="2") as second:
            lab.wait_done()
    assert first.lines.count("1 of 6") + second.lines.count("1 of 6") > 3
