"""`heeler submit`, `jobs`, `cancel` and `result` on a queue of SQS: the real command line, a real worker."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.world import BUCKET
from tests.support.s3 import S3Server
from tests.support.sqs_server import KEY, REGION, SECRET, SqsServer
from tests.support.worker import Worker, clean_environment, heeler, storage_environment

Said = subprocess.CompletedProcess[str]
_numbers = itertools.count()

APP = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.end_headers()
        self.wfile.write(bytes(range(256)) + body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[SqsServer]:
    with SqsServer() as server:
        yield server


class SqsDesk:
    """Commands against one queue, from a folder."""

    def __init__(self, folder: Path, server: SqsServer, storage: S3Server, suffix: str = "") -> None:
        self.folder, self.server, self.storage = folder, server, storage
        self.name = f"commands-{next(_numbers)}{suffix}"
        self.url = server.queue(self.name, **({"FifoQueue": "true"} if suffix else {}))
        self.environment = clean_environment(
            **storage_environment(storage),
            SQS_QUEUE_URL=self.url,
            SQS_AWS_REGION=REGION,
            SQS_AWS_ACCESS_KEY_ID=KEY,
            SQS_AWS_SECRET_ACCESS_KEY=SECRET,
            HEELER_RECORDS=f"s3://{BUCKET}/records/",
            HEELER_S3_PROVIDER="r2",
            HEELER_RETRY_DELAY="0.1",
            TZ="UTC",
        )

    def say(self, *arguments: str, stdin: str = "", **changes: str) -> Said:
        """One command."""
        return heeler(*arguments, env={**self.environment, **changes}, cwd=self.folder, stdin=stdin)

    def good(self, *arguments: str, stdin: str = "", **changes: str) -> str:
        """One command that succeeds: what it printed."""
        said = self.say(*arguments, stdin=stdin, **changes)
        assert said.returncode == 0, said
        assert all(line.startswith("note: ") for line in said.stderr.splitlines()), said.stderr
        return said.stdout

    def refused(self, *arguments: str, stdin: str = "", code: int = 64, **changes: str) -> str:
        """One command that is refused: its one line."""
        said = self.say(*arguments, stdin=stdin, **changes)
        assert said.returncode == code, said
        assert said.stdout == ""
        assert said.stderr.startswith("heeler: ")
        assert said.stderr.count("\n") == 1, said.stderr
        assert SECRET not in said.stderr
        assert self.storage.secret_key not in said.stderr
        return said.stderr

    def states(self) -> dict[str, str]:
        return {job["id"]: job["state"] for job in json.loads(self.good("jobs", "--json"))}

    def worker(self, *arguments: str) -> Worker:
        """A worker that ends once there has been nothing to do for a while."""
        state = self.folder / f"state-{next(_numbers)}"
        return Worker("--exit-when-idle", "3", *arguments, state_dir=state, env=self.environment, cwd=self.folder)

    def sent(self) -> list[dict[str, Any]]:
        return self.server.messages(self.url)


@pytest.fixture
def desk(tmp_path: Path, server: SqsServer, storage: S3Server) -> SqsDesk:
    return SqsDesk(tmp_path, server, storage)


def jobs(*documents: dict[str, Any]) -> str:
    return json.dumps([{"command": "true", **document} for document in documents])


def test_jobs_are_submitted_run_listed_and_their_results_fetched(desk: SqsDesk) -> None:
    both = jobs({"id": "good"}, {"id": "bad", "command": "sh", "arguments": ["-c", "exit 3"], "max_failures": 2})
    said = desk.say("submit", "-", stdin=both)
    assert (said.returncode, said.stdout) == (0, "good\nbad\n")
    (note,) = said.stderr.splitlines()
    assert note.startswith(
        "note: this queue drops messages after 14 days, whoever works on them: a job must end before"
    )
    assert desk.states() == {"good": "pending", "bad": "pending"}
    assert "job good is pending: it has no result yet" in desk.refused("result", "good", code=1)
    with desk.worker() as worker:
        assert worker.wait(60) == 0
    assert [line.split() for line in desk.good("jobs").splitlines()] == [
        ["ID", "STATE", "ATTEMPTS", "FAILURES", "REASON"],
        ["bad", "failed", "2", "2", "exit", "code", "3"],
        ["good", "done", "1", "0"],
    ]
    assert desk.good("result", "good") == '{"exit_code": 0, "signal": null}\n'
    assert desk.good("result", "bad", "--output", "out.json") == ""
    assert (desk.folder / "out.json").read_text() == '{"exit_code": 3, "signal": null}\n'
    shown = desk.good("jobs", "show", "bad")
    first, second = [line.split() for line in shown.splitlines() if "exit code 3" in line and line.startswith(" ")]
    assert (first[0], first[-4:]) == ("1", ["retry", "exit", "code", "3"])
    assert (second[0], second[-4:]) == ("2", ["fail", "exit", "code", "3"])
    record = json.loads(desk.good("jobs", "show", "bad", "--json"))
    assert [entry["outcome"] for entry in record["history"]] == ["retry", "fail"]
    assert record["result"] == {"exit_code": 3, "signal": None}


def test_submitting_again_runs_nothing_twice_and_fresh_runs_it_anew(desk: SqsDesk) -> None:
    text = jobs({"id": "a", "command": "sh", "arguments": ["-c", "echo x >> ran"]})
    with ThreadPoolExecutor(3) as threads:
        outputs = [*threads.map(lambda _: desk.good("submit", "-", stdin=text), range(3))]
    assert outputs == ["a\n"] * 3
    with desk.worker() as worker:
        assert worker.wait(60) == 0
    assert (desk.folder / "ran").read_text() == "x\n"
    said = desk.say("submit", "-", stdin=text)
    assert (said.returncode, said.stdout) == (0, "a\n")
    assert said.stderr == "note: submitted before, so not sent again: a (done); --fresh runs an ended job anew\n"
    other = jobs({"id": "a", "timeout": 5})
    assert (
        "standard input: the job is refused: id: 'a' is in the queue already with another document; choose another,"
        " or submit --fresh once it has ended" in desk.refused("submit", "-", stdin=other)
    )
    assert desk.good("submit", "--fresh", "-", stdin=text) == "a\n"
    assert desk.states() == {"a": "pending"}
    assert "pending in another run" in desk.refused("submit", "-", stdin=text)
    with desk.worker() as worker:
        assert worker.wait(60) == 0
    assert (desk.folder / "ran").read_text() == "x\nx\n"


def test_an_array_gives_each_job_its_index(desk: SqsDesk) -> None:
    text = jobs({"id": "part", "command": "sh", "arguments": ["-c", "touch part-$AWS_BATCH_JOB_ARRAY_INDEX"]})
    assert desk.good("submit", "--array", "12", "-", stdin=text).split() == [f"part-{index}" for index in range(12)]
    with desk.worker() as worker:
        assert worker.wait(60) == 0
    assert sorted(path.name for path in desk.folder.glob("part-*")) == sorted(f"part-{index}" for index in range(12))
    assert set(desk.states().values()) == {"done"}


def test_arrays_and_results_of_a_queue_in_a_folder(tmp_path: Path) -> None:
    environment = clean_environment(HEELER_SOURCE="local:queue", HEELER_STATE_DIR=str(tmp_path / "state"))

    def say(*arguments: str, stdin: str = "") -> Said:
        return heeler(*arguments, env=environment, cwd=tmp_path, stdin=stdin)

    text = jobs({"id": "p", "command": "sh", "arguments": ["-c", "exit $((HEELER_JOB_INDEX))"], "max_failures": 1})
    assert say("submit", "--array", "2", "-", stdin=text).stdout == "p-0\np-1\n"
    assert (say("result", "p-0").returncode, say("result", "nobody").returncode) == (1, 64)
    state = tmp_path / "state"
    with Worker("--exit-when-idle", "0.5", state_dir=state, env=environment, cwd=tmp_path) as worker:
        assert worker.wait() == 0
    assert say("result", "p-0").stdout == '{"exit_code": 0, "signal": null}\n'
    assert say("result", "p-1").stdout == '{"exit_code": 1, "signal": null}\n'
    assert "--group names a message group" in say("submit", "--group", "g", "-", stdin=text).stderr


def test_a_running_job_is_cancelled_and_waiting_tells_it(desk: SqsDesk) -> None:
    text = jobs({"id": "long", "command": "sh", "arguments": ["-c", "touch begun; sleep 1000"]}, {"id": "short"})
    desk.environment["HEELER_SQS_VISIBILITY"] = "3"
    command = [sys.executable, "-m", "heeler", "submit", "--wait", "-"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with desk.worker() as worker:
        waiting = subprocess.Popen(command, env=desk.environment, cwd=desk.folder, text=True, **pipes)
        try:
            assert waiting.stdin is not None
            waiting.stdin.write(text)
            waiting.stdin.close()
            waiting.stdin = None
            worker.wait_until((desk.folder / "begun").exists, "the job's beginning")
            assert desk.good("cancel", "long") == "long cancelled; its worker stops it at its next heartbeat\n"
            assert "job long is cancelled already" in desk.refused("cancel", "long")
            assert "job long is cancelled, without a result\n" in desk.refused("result", "long", code=1)
            output, errors = waiting.communicate(timeout=60)
        finally:
            waiting.kill()
            waiting.wait()
        assert worker.wait(60) == 0
    assert (waiting.returncode, output) == (1, "long\nshort\n")
    assert sorted(line for line in errors.splitlines() if not line.startswith("note: ")) == [
        "long cancelled",
        "short done",
    ]
    assert desk.sent() == []


def test_a_message_for_an_app_has_an_id_and_its_answer_is_fetched_byte_for_byte(desk: SqsDesk) -> None:
    (desk.folder / "app.py").write_text(APP)
    job_id = desk.good("submit", "--raw", "-", stdin="hello \u20ac").strip()
    from heeler.local.processes import free_port

    app = (sys.executable, "app.py", str(free_port()))
    with desk.worker("--", *app) as worker:
        assert worker.wait(60) == 0
    assert desk.states() == {job_id: "done"}
    said = subprocess.run(
        [sys.executable, "-m", "heeler", "result", job_id],
        env=desk.environment,
        cwd=desk.folder,
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert said.stdout == bytes(range(256)) + "hello \u20ac".encode()


def test_a_fifo_queue_takes_a_group(tmp_path: Path, server: SqsServer, storage: S3Server) -> None:
    desk = SqsDesk(tmp_path, server, storage, ".fifo")
    desk.good("submit", "--group", "line", "-", stdin=jobs({"id": "a"}))
    desk.good("submit", "-", stdin=jobs({"id": "b"}))
    assert [message["group"] for message in desk.sent()] == ["line", "b"]
    assert "--group is 'a b', but must be" in desk.refused("submit", "--group", "a b", "-", stdin=jobs({"id": "c"}))


@pytest.mark.parametrize(
    ("arguments", "stdin", "changes", "words"),
    [
        (["--array", "0"], jobs({}), {}, "--array"),
        (["--array", "10001"], jobs({}), {}, "--array"),
        (["--array", "2"], jobs({"index": 1}), {}, "index: is there already, and --array gives each job its own"),
        (["--array", "2", "--raw"], "x", {}, "--array changes a job document, and --raw sends a message as it is"),
        (["--array", "2"], '{"command": "x"}\nnonsense', {}, "document: is not JSON"),
        (["--array", "2"], jobs({"id": "x" * 199}), {}, "can't be used: an id is 1 to 200"),
        (["--fresh"], '{"command": "x"}\nnonsense', {}, "document: is not JSON"),
        (["--group", "g"], jobs({}), {}, "--group names a message group of a FIFO queue, and this queue is none"),
        (["--raw"], "", {}, "standard input: the job is refused: message: is empty"),
        (["--raw"], "a\0b", {}, "U+0000, which SQS does not take"),
        ([], jobs({"environment": {"X": "x" * (1 << 20)}, "id": "big"}), {}, "job 'big' has 1048"),
        ([], jobs({"id": "a"}, {"id": "a"}), {}, "id: 'a' is there twice"),
        ([], jobs({"webhook": "https://x.example/"}), {"HEELER_RECORDS": ""}, "webhook: needs records of jobs"),
        (["--wait"], jobs({}), {"HEELER_RECORDS": ""}, "--wait: the state of a job needs records"),
        (["--sqs-queue-url", "nowhere"], jobs({}), {}, "SQS_QUEUE_URL (or --sqs-queue-url) is not an http"),
        (["--source", "sqs"], jobs({}), {"SQS_QUEUE_URL": ""}, "source sqs needs its queue"),
        ([], jobs({}), {"SQS_QUEUE_URL": ""}, "no source of jobs: set --source"),
        (["--source", "salad"], jobs({}), {}, "takes no jobs from here; use sqs or local:FOLDER"),
        (["--records", "s3://nowhere/"], jobs({"id": "a"}), {}, "the bucket does not exist"),
        (["--s3-provider", "nobody"], jobs({}), {}, "--s3-provider is 'nobody'"),
        ([], jobs({"id": "a"}), {"AWS_SECRET_ACCESS_KEY": "wrong"}, "storage refuses us"),
    ],
)
def test_wrong_submissions_are_refused_in_one_line_and_nothing_is_sent(
    desk: SqsDesk, arguments: list[str], stdin: str, changes: dict[str, str], words: str
) -> None:
    assert words in desk.refused("submit", *arguments, "-", stdin=stdin, **changes)  # type: ignore[arg-type]
    assert desk.sent() == []


def test_every_command_says_what_is_wrong_with_queue_or_storage(desk: SqsDesk) -> None:
    assert "NonExistentQueue" in desk.refused("submit", "-", stdin=jobs({"id": "a"}), SQS_QUEUE_URL=desk.url + "-none")
    assert desk.storage.objects(BUCKET) == {}
    assert "storage is out of reach" in desk.refused("jobs", code=69, AWS_ENDPOINT_URL_S3="http://127.0.0.1:9")
    for command in (["jobs"], ["jobs", "show", "a"], ["cancel", "a"], ["result", "a"]):
        assert "set HEELER_RECORDS=s3://bucket/prefix/" in desk.refused(*command, HEELER_RECORDS="")
        if command != ["jobs"]:
            assert f"no job 'a' in sqs:{desk.url}" in desk.refused(*command)
    assert "no job '../a'" in desk.refused("result", "../a")
    desk.good("submit", "-", stdin=jobs({"id": "a", "command": "true"}))
    flags = ("--records", f"s3://{BUCKET}/elsewhere/")
    assert "no job 'a'" in desk.refused("jobs", *flags, "show", "a")
    assert "no job 'a'" in desk.refused("jobs", "show", *flags, "a")
    assert desk.good("jobs", "show", "--source", f"sqs:{desk.url}", "a", SQS_QUEUE_URL="").startswith("id ")


def test_a_damaged_record_is_named_and_the_others_are_listed(desk: SqsDesk) -> None:
    desk.good("submit", "-", stdin=jobs({"id": "a"}, {"id": "b"}))
    (key,) = [key for key in desk.storage.objects(BUCKET) if key.endswith("/a.json")]
    desk.storage.put(BUCKET, key, b"{}")
    said = desk.say("jobs")
    assert said.returncode == 0
    assert [line.split()[0] for line in said.stdout.splitlines()] == ["ID", "b"]
    assert said.stderr.startswith(f"note: s3://{BUCKET}/{key} is no record of a job")
    assert key in desk.refused("cancel", "a")


def test_a_file_that_can_not_be_written_is_named(desk: SqsDesk) -> None:
    desk.good("submit", "-", stdin=jobs({"id": "a"}))
    with desk.worker() as worker:
        assert worker.wait(60) == 0
    assert "--output no/such can't be written: No such file" in desk.refused("result", "a", "--output", "no/such")
