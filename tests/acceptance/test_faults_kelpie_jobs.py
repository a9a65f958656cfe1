"""FAULTS.md, Kelpie 12, 13 and 14: the last checkpoint, the time between jobs, and the program's environment."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.world import BUCKET, World
from tests.support.s3 import Answer, Rules, S3Server
from tests.support.worker import heeler

# 12: "a checkpoint written right before exit is lost in 4 runs of 20".

LAST_WORDS = {
    "written in place": "$RANDOM_BYTES > $CHECKPOINT_DIR/last",
    "renamed into place": "$RANDOM_BYTES > $W/new-$HEELER_JOB_ID; mv $W/new-$HEELER_JOB_ID $CHECKPOINT_DIR/last",
    "in a new folder": "mkdir -p $CHECKPOINT_DIR/a/b; $RANDOM_BYTES > $CHECKPOINT_DIR/a/b/last",
    "over an earlier one": "echo first > $CHECKPOINT_DIR/last; sleep 0.1; $RANDOM_BYTES > $CHECKPOINT_DIR/last",
}


def test_a_checkpoint_written_right_before_the_exit_is_never_lost(world: World) -> None:
    ids = []
    for round_ in range(5):
        for name, command in LAST_WORDS.items():
            job_id = f"{name.replace(' ', '-')}-{round_}"
            ids.append(job_id)
            copy = f"find $CHECKPOINT_DIR -name last -exec cp {{}} $W/copy-{job_id} ';'"
            world.submit(
                world.bash(f"RANDOM_BYTES='head -c 100000 /dev/urandom'; {command}; {copy}; exit 0"),
                job_id,
                sync=world.checkpoints(),
            )
    with world.worker("--max-jobs", str(len(ids))) as worker:
        assert worker.wait(60) == 0
    objects = world.storage.objects(BUCKET)
    for job_id in ids:
        wanted = (world.folder / f"copy-{job_id}").read_bytes()
        assert len(wanted) == 100_000
        found = [data for key, data in objects.items() if key.startswith(f"{job_id}/ck/")]
        assert [hashlib.sha256(data).hexdigest() for data in found] == [hashlib.sha256(wanted).hexdigest()], job_id


# 13: "three empty jobs took 46 s at an interval of 15 s".


def test_three_empty_jobs_take_less_than_3_s_at_a_heartbeat_of_15_s(world: World) -> None:
    for number in range(3):
        world.submit(["true"], f"empty-{number}", heartbeat_interval=15, sync=world.checkpoints())
    with world.worker("--max-jobs", "3") as worker:
        started = worker.wait_for("started")["_seen"]  # how long Python takes to come so far is not the jobs'
        assert worker.wait() == 0
    assert time.monotonic() - started < 3
    assert [world.job(f"empty-{number}").state for number in range(3)] == ["done"] * 3


def test_empty_jobs_wait_for_no_heartbeat(world: World) -> None:
    """How long they take is measured in bench/empty_jobs.py: here nobody could wait for a heartbeat, once an hour."""
    for number in range(3):
        world.submit(["true"], f"empty-{number}", heartbeat_interval=3600, sync=world.checkpoints())
    with world.worker("--max-jobs", "3") as worker:
        assert worker.wait() == 0
    assert [world.job(f"empty-{number}").state for number in range(3)] == ["done"] * 3


# 14: "the child gets the queue's key and the storage credentials in its environment, asked or not".

KEY, SECRET, TOKEN, OTHER = (
    "AKIAEXAMPLE0123456789",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCY",
    "FwoGZXIvYXdzEJr-token",
    "another-secret-0123",
)


@pytest.fixture
def storage() -> Iterator[S3Server]:
    with S3Server.start(rules=Rules(), buckets=[BUCKET], access_key=KEY, secret_key=SECRET) as server:
        yield server


def test_scrub_env_leaves_no_credential_in_the_programs_environment_whatever_its_name(world: World) -> None:
    environment = _run_printing_environment(
        world,
        "--scrub-env",
        "true",
        HEELER_S3_ACCESS_KEY_ID=KEY,
        HEELER_S3_SECRET_ACCESS_KEY=SECRET,
        R2_AWS_ACCESS_KEY_ID=KEY,
        R2_AWS_SECRET_ACCESS_KEY=SECRET,
        AWS_SECRET_ACCESS_KEY=OTHER,
        AWS_SESSION_TOKEN=TOKEN,
        SALAD_API_KEY=OTHER,
        KELPIE_API_KEY=OTHER,
        SQS_AWS_SECRET_ACCESS_KEY=OTHER,
        MY_COPY=SECRET,
        MY_URL=f"https://{KEY}:{SECRET}@example.org/",
        MY_OTHER_COPY=OTHER,
        HARMLESS="stays",
    )
    for secret in (KEY, SECRET, TOKEN, OTHER):
        assert [name for name, value in environment.items() if secret in value] == []
    assert environment["HARMLESS"] == "stays"
    assert environment["PATH"]
    assert environment["HEELER_JOB_ID"] == "job-1"


def test_without_scrub_env_the_program_keeps_its_own_credentials_but_never_gets_heelers(world: World) -> None:
    environment = _run_printing_environment(
        world, HEELER_S3_ACCESS_KEY_ID=KEY, HEELER_S3_SECRET_ACCESS_KEY=SECRET, AWS_SECRET_ACCESS_KEY=OTHER
    )
    assert not [name for name in environment if name.startswith("HEELER_S3_")]
    assert SECRET not in environment.values()
    assert environment["AWS_SECRET_ACCESS_KEY"] == OTHER


def _run_printing_environment(world: World, *arguments: str, **environment: str) -> dict[str, str]:
    program = world.python("import json\ntell('environment', json.dumps(dict(env)))\n")
    world.submit(program, sync=world.outputs())
    with world.worker(*arguments, **environment):
        world.wait_state("done")
    found: dict[str, str] = json.loads(world.told("environment"))
    return found


def test_no_secret_is_in_a_log_line_a_setting_or_a_status(world: World, tmp_path: Path) -> None:
    secrets = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}
    world.storage.faults.add(Answer(500, "InternalError"), operation="ListObjectsV2", count=1)
    world.storage.faults.add(Answer(403, "SignatureDoesNotMatch"), operation="PutObject")
    world.submit(
        world.bash("echo 1 > $OUTPUT_DIR/one"), max_failures=1, sync={**world.checkpoints(), **world.outputs()}
    )
    with world.worker("--control", "127.0.0.1:0", **secrets) as worker:
        world.wait_state("failed")
        environment = {**world.environment(**secrets), "HEELER_STATE_DIR": str(tmp_path / "state-a")}
        said = [
            heeler(*command, env=environment, cwd=tmp_path)
            for command in (["config"], ["config", "--json"], ["status"], ["status", "--json"])
        ]
    assert [each.returncode for each in said] == [0, 0, 0, 0], said
    assert "********" in said[0].stdout
    assert "upload_failed" in said[2].stdout
    everything = "\n".join([*worker.lines, *(each.stdout + each.stderr for each in said), str(world.job())])
    for secret in (KEY, SECRET, TOKEN):
        assert secret not in everything


def test_a_secret_that_a_job_or_the_storage_utters_is_masked_in_the_log(world: World) -> None:
    world.storage.faults.add(Answer(403, "AccessDenied", f"not {SECRET}"), operation="ListObjectsV2")
    world.submit([f"/no/{SECRET}"], max_failures=1)
    world.submit(["true"], "job-2", max_failures=1, sync=world.checkpoints())
    with world.worker() as worker:
        world.wait_state("failed")
        world.wait_state("failed", "job-2")
    assert worker.find("restore_failed")
    log = "\n".join(worker.lines)
    assert "/no/********" in log
    assert "not ********" in log
    assert SECRET not in log
