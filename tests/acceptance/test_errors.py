"""What a person sees who got something wrong: one line that says what, and an exit code. Never a traceback."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time

import pytest

from tests.acceptance.world import BUCKET, World
from tests.support.s3 import Stall
from tests.support.worker import heeler

Said = subprocess.CompletedProcess[str]


def complaint(said: Said, code: int) -> str:
    """The one line of complaint; all else on standard error is log events."""
    assert said.returncode == code, said
    lines = said.stderr.splitlines()
    complaints = [line for line in lines if not (line.startswith("{") and "event" in json.loads(line))]
    assert len(complaints) == 1, said.stderr
    assert complaints[0].startswith("heeler: ")
    assert "Traceback" not in said.stderr
    return complaints[0]


def run(world: World, *arguments: str, **environment: str) -> Said:
    """`heeler run`, which is expected to end by itself."""
    env = world.environment(HEELER_STATE_DIR=str(world.folder / "state"), **environment)
    return heeler("run", "--control", "off", "--exit-when-idle", "0", *arguments, env=env, cwd=world.folder, timeout=30)


# Settings.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no source of jobs"),
        (["--source", "nonsense"], "unknown source 'nonsense'"),
        (["--source", "kelpie"], "set KELPIE_API_KEY"),
        (["--source", "kelpie:http://127.0.0.1:9"], "--kelpie-url"),
        (["--source", "sqs"], "set SQS_QUEUE_URL"),
        (["--source", "local:"], "needs a folder"),
        (["--source", "once"], "needs its job"),
        (["--job", "no-such-file.json"], "no-such-file.json can't be read"),
        (["--source", "local:q", "--stop-grace", "soon"], "--stop-grace is 'soon', but must be a number of seconds"),
        (["--source", "local:q", "--stop-grace", "-1"], "--stop-grace"),
        (["--source", "local:q", "--max-jobs", "0"], "--max-jobs is '0'"),
        (["--source", "local:q", "--retry-exit-codes", "0"], "--retry-exit-codes is '0'"),
        (["--source", "local:q", "--scrub-env", "perhaps"], "--scrub-env is 'perhaps', but must be true or false"),
        (["--source", "local:q", "--control", "0.0.0.0:1"], "listens on loopback only"),
        (["--source", "local:q", "--control", "here"], "must be like 127.0.0.1:8642"),
        (["--source", "local:q", "--no-such-flag"], "--no-such-flag"),
        (["--source", "local:q", "--delivery", "command", "--", "python", "app.py"], "leave out the program"),
        (["--source", "local:q", "--delivery", "app"], "who is the app?"),
        (["--source", "local:q", "--app-url", "https://127.0.0.1"], "must be like http://127.0.0.1:8080"),
        (["--source", "local:q", "--app-path", "jobs"], "a path that starts with /"),
        (["--source", "once", "--concurrency", "2"], "gives one job at a time"),
        (["--source", "local:q", "--config", "no-such.toml"], "no-such.toml can't be read"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line(world: World, arguments: list[str], words: str) -> None:
    assert words in complaint(run(world, *arguments), 64)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HEELER_SUORCE": "x"}, "HEELER_SUORCE is no setting of heeler; did you mean HEELER_SOURCE?"),
        ({"HEELER_STOP_GRACE": "soon"}, "HEELER_STOP_GRACE is 'soon'"),
        ({"HEELER_S3_ENDPOINT": "nonsense"}, "the storage endpoint is 'nonsense'"),
        ({"HEELER_S3_ENDPOINT": "http://[bad"}, "the storage endpoint is 'http://[bad'"),
        ({"HEELER_S3_ENDPOINT": "http://host:port"}, "the storage endpoint is 'http://host:port'"),
        ({"HEELER_S3_ENDPOINT": "https://me:hidden@host"}, "holds a user name or password"),
        ({"HEELER_S3_ENDPOINT": "https://"}, "the storage endpoint is 'https://'"),
        ({"HEELER_S3_PROVIDER": "nobody"}, "HEELER_S3_PROVIDER is 'nobody'"),
        ({"HEELER_CHECKPOINTS": "s3:/oops"}, "'s3:/oops' is not of the form s3://bucket/prefix/"),
        ({"HEELER_CHECKPOINTS": "s3://UP_CASE!/x"}, "UP_CASE!"),
        ({"HEELER_CHECKPOINTS": "s3://nope/{job_id}/"}, "s3://nope/"),
        ({"HEELER_CHECKPOINTS": f"s3://{BUCKET}/x/"}, "put {job_id} into the prefix"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong", "HEELER_CHECKPOINTS": f"s3://{BUCKET}/{{job_id}}/"}, "check bucket, keys"),
        ({"AWS_ACCESS_KEY_ID": "wrong", "HEELER_OUTPUTS": f"s3://{BUCKET}/x/"}, "check bucket, keys"),
        ({"AWS_SECRET_ACCESS_KEY": "", "HEELER_INPUTS": f"s3://{BUCKET}/x/"}, "only one is set"),
    ],
)
def test_a_wrong_name_or_value_in_the_environment_is_told_in_one_line(
    world: World, environment: dict[str, str], words: str
) -> None:
    assert words in complaint(run(world, "--source", "local:q", **environment), 64)


def test_a_wrong_settings_file_is_told_in_one_line(world: World) -> None:
    (world.folder / "heeler.toml").write_text('suorce = "local:q"\n')
    assert "did you mean source?" in complaint(run(world), 64)
    (world.folder / "heeler.toml").write_text("source = \n")
    assert "is not TOML" in complaint(run(world), 64)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_storage_out_of_reach_at_the_start_is_told_within_the_limit(world: World, endpoint: str) -> None:
    started = time.monotonic()
    environment = {"AWS_ENDPOINT_URL_S3": endpoint, "HEELER_CHECKPOINTS": f"s3://{BUCKET}/{{job_id}}/"}
    said = run(world, "--source", "local:q", HEELER_STARTUP_TIMEOUT="1", **environment)
    assert "storage is out of reach" in complaint(said, 69)
    assert time.monotonic() - started < 10


def test_storage_that_never_answers_at_the_start_is_told_within_the_limit(world: World) -> None:
    world.storage.faults.add(Stall(at="before"))
    started = time.monotonic()
    said = run(
        world, "--source", "local:q", HEELER_STARTUP_TIMEOUT="2", HEELER_CHECKPOINTS=f"s3://{BUCKET}/{{job_id}}/"
    )
    assert "storage is out of reach" in complaint(said, 69)
    assert time.monotonic() - started < 8


def test_a_state_folder_or_queue_that_cannot_be_written_is_told_in_one_line(world: World) -> None:
    (world.folder / "file").write_text("")
    said = run(world, "--source", "local:q", "--state-dir", str(world.folder / "file/state"))
    assert f"state folder {world.folder}/file/state can't be written" in complaint(said, 64)
    assert "queue.db can't be opened" in complaint(run(world, "--source", f"local:{world.folder}/file/q"), 69)
    (world.folder / "q").mkdir()
    (world.folder / "q/queue.db").write_bytes(b"this is no database" * 100)
    assert "q/queue.db" in complaint(run(world, "--source", "local:q"), 69)


def test_a_taken_control_port_is_told_in_one_line(world: World) -> None:
    said = run(world, "--source", "local:q", "--control", f"127.0.0.1:{world.storage.port}")
    assert "the control API can't listen on" in complaint(said, 64)


# Jobs that can't be run.

GOOD_BODY = json.dumps({"command": "true"})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"arguments": []}', "command: is missing"),
        ('{"command": ""}', "command: "),
        ('{"command": 7}', "command: "),
        ("not json", "document: is not JSON"),
        ("[]", "document: is not a JSON object"),
        ('{"command": "true", "commando": 1}', "commando: is not a field"),
        ('{"command": "true", "timeout": -1}', "timeout: "),
        ('{"command": "true", "sync": {"before": [{"bucket": "jobs"}]}}', "sync.before.0.prefix: is missing"),
        ('{"command": "a\\u0000b"}', "command: contains a NUL"),
        ('{"command": "true", "environment": {"A=B": "x"}}', "environment: "),
        (
            '{"command": "true", "sync": {"during": [{"bucket": "jobs", "prefix": "x/", "local_path": "/etc"}]}}',
            "sync.during.0.local_path: /etc can't be a job's folder",
        ),
        (
            '{"command": "true", "sync": {"during": [{"bucket": "jobs", "prefix": "x/", "local_path": "a/../../b"}]}}',
            "sync.during.0.local_path: ",
        ),
        (
            '{"command": "true", "sync": {"during": [{"bucket": "jobs", "prefix": "../x/", "local_path": "a"}]}}',
            "sync.during.0.prefix: ",
        ),
        (b"\xff\xfe\x00", "document: "),
        ('{"command": "true", "arguments": ["\\ud800"]}', "arguments.0: "),
        ('{"command": "true", "\\ud800": 1}', "document: "),
        ('{"command": "true", "heartbeat_interval": 0.0001}', "heartbeat_interval: "),
        (
            '{"command": "true", "sync": {"during": [{"bucket": "jobs", "prefix": "x/", "local_path": "a",'
            ' "pattern": "(a+)+$"}]}}',
            "sync.during.0.pattern: ",
        ),
        (
            '{"command": "true", "sync": {"before": [{"bucket": "jobs", "prefix": "x/", "local_path": "a"},'
            ' {"bucket": "jobs", "prefix": "y/", "local_path": "a/b"}]}}',
            "sync.before.1.local_path: ",
        ),
        (
            '{"command": "true", "sync": {"before": [{"bucket": "jobs", "prefix": "x/", "local_path": "queue/x"}]}}',
            "sync.before.0.local_path: ",
        ),
    ],
)
def test_a_poison_message_fails_with_a_reason_that_names_the_field_and_the_worker_goes_on(
    world: World, body: str | bytes, words: str
) -> None:
    put_directly(world, "poison", body)
    put_directly(world, "good", GOOD_BODY)
    with world.worker() as worker:
        world.wait_state("done", "good")
        assert worker.process.poll() is None
    record = world.job("poison")
    assert (record.state, record.attempts) == ("failed", 1)
    assert record.reason.startswith(words), record.reason


@pytest.mark.parametrize("job_id", ["../../evil", "{folder}/evil", "a/b", ""])
def test_a_message_whose_id_leads_out_of_the_folders_writes_nothing_there(world: World, job_id: str) -> None:
    job_id = job_id.format(folder=world.folder)
    put_directly(world, job_id, GOOD_BODY)
    put_directly(world, "good", GOOD_BODY)
    with world.worker() as worker:
        world.wait_state("done", "good")
        assert worker.process.poll() is None
    assert world.job(job_id).state == "failed"
    assert world.job(job_id).reason.startswith("id: ")
    assert not list(world.folder.rglob("*evil*"))


def test_a_folder_that_cannot_be_made_is_told_and_the_worker_goes_on(world: World) -> None:
    (world.folder / "file").write_text("")
    sync = {"during": [{**world.entry("ck"), "local_path": "file/ck"}]}
    world.submit(world.bash("exit 0"), "stuck", sync=sync)
    world.submit(world.bash("exit 0"), "good")
    with world.worker() as worker:
        fault = worker.wait_for("restore_failed", job_id="stuck")
        world.wait_state("done", "good")
    assert f"{world.folder}/file/ck: is not a folder" in fault["error"]
    assert world.job("stuck").state != "done"


def put_directly(world: World, job_id: str, body: str | bytes) -> None:
    """A row in the queue that `heeler submit` would not have let in."""
    with sqlite3.connect(world.queue / "queue.db") as table:
        data = body.encode() if isinstance(body, str) else body
        table.execute(
            "INSERT INTO jobs (id, body, lease_seconds, max_failures, visible_at, created) VALUES (?, ?, 30, 3, 0, 0)",
            (job_id, data),
        )
    table.close()
