"""`heeler local` as a process: what it starts can be used as it says, and nothing of it is left when it ends."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import grpc
import httpx
import psutil
import pytest
from google.protobuf.empty_pb2 import Empty

from heeler.wire.salad_queue import ACCEPT_JOBS, COMPLETE_JOB, messages
from tests.acceptance.world import alive, eventually
from tests.support.worker import clean_environment, heeler

_START_SECONDS = 60.0


class Local:
    """A running `heeler local`, and the processes below it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.env_file = folder / "env"
        self.log = folder / "log"
        command = [sys.executable, "-m", "heeler", "local", "--env-file", str(self.env_file), *arguments]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def text(self) -> str:
        return self.log.read_text()

    def ready(self) -> dict[str, str]:
        """Wait until it serves; the environment of machine 1."""
        eventually(lambda: "; ready" in self.text() or self.process.poll() is not None, "ready", _START_SECONDS)
        assert self.process.poll() is None, self.text()
        return environment(self.env_file)

    def family(self) -> list[int]:
        """Its process id and those below it."""
        process = psutil.Process(self.process.pid)
        return [process.pid, *(child.pid for child in process.children(recursive=True))]

    def kill(self) -> None:
        """End it, come what may."""
        if self.process.poll() is None:
            for pid in reversed(self.family()):
                psutil.Process(pid).kill()
        self.process.wait()


def environment(file: Path) -> dict[str, str]:
    """What a shell has after reading the file."""
    lines = file.read_text().splitlines()
    assert all(line.startswith(("export ", "#")) for line in lines)
    pairs = [shlex.split(line)[1].partition("=") for line in lines if line.startswith("export ")]
    return {name: value for name, _, value in pairs}


@contextmanager
def local(folder: Path, *arguments: str) -> Iterator[Local]:
    started = Local(folder, *arguments)
    try:
        yield started
    finally:
        started.kill()


def listening(pids: list[int]) -> dict[int, str]:
    """The ports that these processes listen on, and the address of each."""
    found = [entry for pid in pids for entry in psutil.Process(pid).net_connections("inet")]
    # gRPC's sockets speak IPv6 too, with an address that is IPv4's all the same.
    return {entry.laddr.port: entry.laddr.ip.removeprefix("::ffff:") for entry in found if entry.status == "LISTEN"}


def free_ports(count: int) -> int:
    """The first of some free ports in a row."""
    for base in range(21000, 30000, count):
        with ExitStack() as stack, suppress(OSError):
            for port in range(base, base + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return base
    raise AssertionError("no ports are free")


def submit(http: httpx.Client, env: dict[str, str], data: object) -> str:
    place = f"/organizations/{env['SALAD_ORGANIZATION_NAME']}/projects/{env['SALAD_PROJECT_NAME']}"
    answer = http.post(f"{place}/queues/{env['SALAD_QUEUE_NAME']}/jobs", json={"input": data})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def work_off(env: dict[str, str]) -> messages.Job:
    """Take one job as a worker on that machine does, and complete it."""
    uri = env["SALAD_METADATA_URI"]
    token = httpx.get(f"{uri}/v1/token", headers={"Metadata": "true"}, trust_env=False).json()["jwt"]
    metadata = (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(env["SALAD_SERVICE_ENDPOINT"]) as channel:
        accept = channel.unary_stream(
            ACCEPT_JOBS,
            request_serializer=messages.AcceptJobsRequest.SerializeToString,
            response_deserializer=messages.AcceptJobsResponse.FromString,
        )
        for message in accept(messages.AcceptJobsRequest(), metadata=metadata, timeout=30):
            if message.HasField("job"):
                break
        complete = channel.unary_unary(
            COMPLETE_JOB,
            request_serializer=messages.CompleteJobRequest.SerializeToString,
            response_deserializer=Empty.FromString,
        )
        job: messages.Job = message.job
        complete(messages.CompleteJobRequest(job_id=job.job_id, output=b'"done"'), metadata=metadata, timeout=30)
        return job


def work_off_kelpie(env: dict[str, str]) -> str:
    """Submit a job by the API key, and take, fail and complete it by the machine's token; its id."""
    project = {"Salad-Project": env["SALAD_PROJECT_NAME"]}
    by_key = {**project, "Salad-Api-Key": env["SALAD_API_KEY"], "Salad-Organization": env["SALAD_ORGANIZATION_NAME"]}
    uri = env["SALAD_METADATA_URI"]
    token = httpx.get(f"{uri}/v1/token", headers={"Metadata": "true"}, trust_env=False).json()["jwt"]
    by_token = {**project, "Authorization": f"Bearer {token}"}
    worker = {"machine_id": env["SALAD_MACHINE_ID"], "container_group_id": env["SALAD_CONTAINER_GROUP_ID"]}
    with httpx.Client(base_url=env["KELPIE_API_URL"], trust_env=False) as http:
        document = {"command": "true", "container_group_id": env["SALAD_CONTAINER_GROUP_ID"]}
        job_id = http.post("/jobs", json=document, headers=by_key).json()["id"]
        assert [job["id"] for job in http.get("/work", params=worker, headers=by_token).json()] == [job_id]
        for what in ("failed", "completed"):
            assert http.post(f"/jobs/{job_id}/{what}", json=worker, headers=by_token).is_success
        assert http.get(f"/jobs/{job_id}", headers=by_key).json()["status"] == "completed"
    return str(job_id)


def test_what_it_prints_is_all_that_storage_queues_and_metadata_need(tmp_path: Path) -> None:
    base = free_ports(6)
    arguments = ["--port-base", str(base), "--machines", "2", "--app-port", "9000", "--app-path", "/generate"]
    with local(tmp_path, *arguments) as running:
        env = running.ready()
        second = environment(tmp_path / "env.2")
        assert {name: value for name, value in second.items() if env[name] != value} == {
            "SALAD_MACHINE_ID": "machine-2",
            "SALAD_INSTANCE_ID": second["SALAD_INSTANCE_ID"],
            "SALAD_METADATA_URI": f"http://127.0.0.1:{base + 5}",
        }
        assert listening(running.family()) == dict.fromkeys(range(base, base + 6), "127.0.0.1")
        for line in (tmp_path / "env").read_text().splitlines():
            assert line in running.text(), "printed as well as written"

        keys = {"aws_access_key_id": env["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": env["AWS_SECRET_ACCESS_KEY"]}
        place: dict[str, Any] = {**keys, "region_name": env["AWS_REGION"]}
        s3 = boto3.client("s3", endpoint_url=env["AWS_ENDPOINT_URL_S3"], **place)
        s3.put_object(Bucket="local", Key="a", Body=b"1")
        assert s3.get_object(Bucket="local", Key="a")["Body"].read() == b"1"
        sqs = boto3.client("sqs", endpoint_url=env["AWS_ENDPOINT_URL_SQS"], **place)
        url = sqs.create_queue(QueueName="q")["QueueUrl"]
        sqs.send_message(QueueUrl=url, MessageBody="hello")
        assert sqs.receive_message(QueueUrl=url)["Messages"][0]["Body"] == "hello"

        headers = {"Salad-Api-Key": env["SALAD_API_KEY"]}
        with httpx.Client(base_url=env["SALAD_API_URL"], headers=headers, trust_env=False) as http:
            for machine in (env, second):
                job_id = submit(http, env, {"n": 1})
                job = work_off(machine)
                assert (job.job_id, job.port, job.path) == (job_id, 9000, "/generate")
                assert json.loads(job.input) == {"n": 1}
                events = [line for line in running.text().splitlines() if job_id in line]
                assert [line.split()[3] for line in events] == ["created", "started", "succeeded"]
                assert f"on {machine['SALAD_MACHINE_ID']}, try 1" in events[1]

        assert env["KELPIE_API_URL"] == f"http://127.0.0.1:{base + 3}"
        assert "KELPIE_API_KEY" not in env
        for machine in (env, second):
            job_id = work_off_kelpie(machine)
            events = [line for line in running.text().splitlines() if job_id in line]
            assert [line.partition(job_id)[2].strip() for line in events] == [
                "created",
                f"started on {machine['SALAD_MACHINE_ID']}",
                "failed 1 of 3",
                "completed",
            ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_code_0_and_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    with local(tmp_path) as running:
        running.ready()
        family = running.family()
        assert len(family) > 1, "storage is a process of its own"
        running.process.send_signal(number)
        assert running.process.wait(15) == 0
        assert [pid for pid in family if alive(pid)] == []
        assert "Traceback" not in running.text()


def test_a_signal_while_storage_starts_ends_it_too(tmp_path: Path) -> None:
    with local(tmp_path) as running:
        eventually(lambda: len(running.family()) > 1, "storage is being started")
        family = running.family()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0, running.text()
        assert [pid for pid in family if alive(pid)] == []
        assert "Traceback" not in running.text()


@pytest.mark.parametrize("taken", range(5))
def test_a_port_that_is_taken_is_one_line_and_leaves_no_process(tmp_path: Path, taken: int) -> None:
    base = free_ports(5)
    with socket.socket() as other, local(tmp_path, "--port-base", str(base)) as running:
        other.bind(("127.0.0.1", base + taken))
        other.listen()
        family = running.family()
        began = time.monotonic()
        while running.process.poll() is None and time.monotonic() < began + 30:
            family = sorted({*family, *running.family()})
            time.sleep(0.02)
        assert running.process.wait(1) == 69
        assert running.text().splitlines() == [running.text().strip()]
        assert f"127.0.0.1:{base + taken}" in running.text()
        assert [pid for pid in family if alive(pid)] == []


def test_an_env_file_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    done = heeler("local", "--env-file", str(tmp_path / "no" / "env"))
    assert done.returncode == 64
    assert "--env-file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_does_not_stop_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "heeler", "local", "--env-file", str(tmp_path / "env")]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"# machine 1\n"
            process.stdout.close()
            env = environment(tmp_path / "env")
            headers = {"Salad-Api-Key": env["SALAD_API_KEY"]}
            with httpx.Client(base_url=env["SALAD_API_URL"], headers=headers, trust_env=False) as http:
                job_id = submit(http, env, 1)
            assert work_off(env).job_id == job_id
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
        finally:
            for child in psutil.Process(process.pid).children() if process.poll() is None else []:
                child.kill()
            process.kill()
