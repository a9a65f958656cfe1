"""Our S3 server starts, stops and is commanded, in a thread and as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.s3 import (
    Action,
    Answer,
    Corrupt,
    Cut,
    Delay,
    Rules,
    S3Process,
    S3Server,
    Slow,
    Stall,
    Truncate,
)
from tests.support.s3_clients import boto3_client, obstore_store
from tests.support.s3_raw import Raw, call

OPEN = Rules.lenient(verify_signature=False)

# Lifecycle.


def test_a_stopped_server_leaves_no_thread_and_no_socket() -> None:
    process = psutil.Process()
    threads, descriptors = threading.active_count(), process.num_fds()
    server = S3Server.start(rules=OPEN, buckets=["b"])
    rule = server.faults.add(Stall())
    with Raw(server) as idle, Raw(server) as stalled:
        stalled.send_head("PUT", "/b/k")
        rule.wait_held()
        server.stop()
        for raw in (idle, stalled):
            assert raw.read_to_end()[1]
    server.stop()
    assert (threading.active_count(), process.num_fds()) == (threads, descriptors)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_taken_port_is_an_error() -> None:
    with S3Server.start() as server, pytest.raises(OSError, match="address"):
        S3Server.start(port=server.port)


def test_an_error_of_the_server_itself_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        with S3Server.start(rules=OPEN, buckets=["b"]) as server:
            monkeypatch.setattr(server.store, "put", None)
            assert call(server, "PUT", "/b/k", b"")[0] == 500

    with pytest.raises(RuntimeError, match="itself failed"):
        run()


# The process.


@pytest.fixture(scope="module")
def process() -> Iterator[S3Process]:
    with S3Process.start(buckets=["b"], rules=["write_interval=0"]) as started:
        yield started


def test_a_process_is_used_like_a_thread(process: S3Process) -> None:
    client = boto3_client(process)
    process.stats.reset()
    client.put_object(Bucket="b", Key="a b/ü", Body=b"x")
    process.put("b", "direct", b"y")
    process.create_bucket("other")
    assert process.objects("b") == {"a b/ü": b"x", "direct": b"y"}
    assert process.objects("other") == {}
    assert process.stats.calls == {"PutObject": 1}
    assert process.stats.bytes_in == 1
    assert [record.key for record in process.stats.find("PutObject")] == ["a b/ü"]
    upload = client.create_multipart_upload(Bucket="b", Key="m")["UploadId"]
    assert process.uploads("b") == [{"key": "m", "upload_id": upload, "parts": []}]


@pytest.mark.parametrize(
    "action",
    [
        Answer(503, "SlowDown", retry_after=1),
        Delay(0.5, at="after"),
        Stall(None, at="request_body", after_bytes=3),
        Cut(at="response_body", after_bytes=7, reset=False),
        Slow(up=1.5),
        Truncate(3, hidden=True),
        Corrupt(-1),
    ],
)
def test_every_action_crosses_to_another_process(process: S3Process, action: Action) -> None:
    rule = process.faults.add(action, operation="PutObject", key="none/*", nth=2, probability=0.5, seed=3)
    ((match, known, hits),) = process.faults.rules()
    assert (known, hits, match.operation, match.key, match.nth) == (action, 0, "PutObject", "none/*", 2)
    assert (match.probability, match.seed) == (0.5, 3)
    process.faults.remove(rule)
    assert process.faults.rules() == []


def test_faults_act_in_the_other_process(process: S3Process) -> None:
    process.put("b", "k", b"x")
    stall = process.faults.add(Stall(), operation="GetObject", count=1)
    with ThreadPoolExecutor(1) as pool:
        stalled = pool.submit(lambda: bytes(obstore_store(process, "b").get("k").bytes()))
        stall.wait_held()
        assert not stalled.done()
        process.faults.release()
        assert stalled.result() == b"x"
    process.faults.clear()
    assert process.faults.rules() == []


def test_a_rule_that_makes_no_sense_is_refused(process: S3Process) -> None:
    for rule in ({"action": {"kind": "explode"}}, {"action": {"kind": "cut", "when": 1}}, {"match": {"ky": "x"}}):
        with pytest.raises(RuntimeError, match="InvalidArgument"):
            process.control.json("POST", "faults", rule)


def test_the_process_ends_on_a_signal_and_with_its_parent() -> None:
    with S3Process.start() as server:
        pid = server.pid
    assert not psutil.pid_exists(pid)
    command = [sys.executable, "-m", "tests.support.s3", "--port", "0", "--bucket", "b", "--lenient"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_bad_rule_on_the_command_line_is_named() -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        S3Process.start(rules=["no_such=1"])


def test_objects_cost_about_their_size_in_memory() -> None:
    size = 128 << 20
    with S3Process.start(buckets=["b"]) as server:
        before = psutil.Process(server.pid).memory_info().rss
        store = obstore_store(server, "b")
        store.put("whole", bytes(size), use_multipart=False)
        store.put("parts", bytes(size), chunk_size=8 << 20)
        grown = psutil.Process(server.pid).memory_info().rss - before
        assert len(store.get("parts").bytes()) == size
        assert grown < 1.3 * 2 * size
