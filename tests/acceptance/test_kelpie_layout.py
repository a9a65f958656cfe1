"""Kelpie's layout of keys: its workers and ours go on with each other's jobs; and snapshots where they are wanted."""

from __future__ import annotations

import io
import json
import signal
from typing import Any

import pytest

from tests.acceptance.kelpie_world import KelpieWorld
from tests.acceptance.snapshot_programs import QUICK, Prefix
from tests.acceptance.world import BUCKET, MIB, eventually
from tests.support.s3_clients import boto3_client

LARGE = bytes(range(256)) * (12 * MIB // 256)
"""More than one part of boto3's uploads: its ETag is no checksum of it."""

# Tells where it starts and with what, goes on to step 5, and waits in step 3 on machine one until it is told.
STEPS = """
cd $CHECKPOINT_DIR
step=$(cat step 2>/dev/null || echo 0)
echo "$SALAD_MACHINE_ID began at $step with $(cat $INPUT_DIR/data)" >> $W/starts
find . -type f -not -path './.heeler/*' | sort > $W/found-$SALAD_MACHINE_ID
test -e parts/large && cksum < parts/large > $W/cksum
rm -f scratch
while [ $step -lt 5 ]; do
    step=$((step + 1)); echo $step > step.new; mv step.new step
    if [ $step = 3 ] && [ $SALAD_MACHINE_ID = one ]; then
        mkdir -p parts; echo p > parts/p; touch scratch; rm -f old; echo early > $OUTPUT_DIR/early
        while ! test -e $W/go; do sleep 0.01; done
    fi
done
echo done at $step > $OUTPUT_DIR/result
"""


def written_by_kelpie(kelpie: KelpieWorld, **objects: bytes) -> None:
    """Put objects as Kelpie's worker does, with a library of Amazon's: large ones in parts."""
    client = boto3_client(kelpie.storage)
    for key, data in objects.items():
        client.upload_fileobj(io.BytesIO(data), BUCKET, f"job/{key.replace('__', '/')}")


def layout(kelpie: KelpieWorld, older: bool, **more: str) -> dict[str, Any]:
    """A job's fields for its folders, in either way."""
    return kelpie.folders() if older else {"sync": kelpie.sync(**more)}


OLDER_OR_SYNC = pytest.mark.parametrize("older", [True, False], ids=["older fields", "sync"])


@OLDER_OR_SYNC
def test_a_job_half_done_by_kelpies_worker_is_gone_on_with(kelpie: KelpieWorld, older: bool) -> None:
    written_by_kelpie(kelpie, checkpoint__step=b"4\n", checkpoint__parts__large=LARGE, input__data=b"input")
    before = kelpie.keys()
    job = kelpie.submit(kelpie.bash(STEPS), heartbeat_interval=1, **layout(kelpie, older))
    assert kelpie.server.take("of-kelpie") == job  # whose machine vanishes now
    with kelpie.worker():
        kelpie.wait_status("completed", job)
    assert kelpie.told("starts") == "one began at 4 with input\n"
    assert kelpie.told("found-one") == "./parts/large\n./step\n"
    assert kelpie.keys() == before | {"job/checkpoint/step": b"5\n", "job/output/result": b"done at 5\n"}
    # What did not change was not sent again.
    assert len(kelpie.storage.history(BUCKET, "job/checkpoint/parts/large")) == 1
    assert kelpie.server.job(job)["num_failures"] == 0


@OLDER_OR_SYNC
def test_a_job_half_done_by_a_worker_that_is_killed_leaves_the_keys_that_kelpies_would(
    kelpie: KelpieWorld, older: bool
) -> None:
    written_by_kelpie(kelpie, checkpoint__old=b"old", checkpoint__step=b"1\n", input__data=b"input")
    job = kelpie.submit(kelpie.bash(STEPS), heartbeat_interval=1, **layout(kelpie, older))
    halfway = {
        "job/input/data": b"input",
        "job/checkpoint/step": b"3\n",
        "job/checkpoint/parts/p": b"p\n",
        "job/checkpoint/scratch": b"",
    }
    if older:  # outputs are uploaded while the program runs
        halfway["job/output/early"] = b"early\n"
    with kelpie.worker() as worker:
        eventually(lambda: kelpie.keys() == halfway, "the third step is stored, and the old file is gone there too")
        worker.signal(signal.SIGKILL)
        worker.wait()
    assert kelpie.keys("") == halfway
    kelpie.tell("go")
    with kelpie.worker(machine="two"):
        kelpie.wait_status("completed", job)
    assert kelpie.told("starts") == "one began at 1 with input\ntwo began at 3 with input\n"
    assert kelpie.told("found-two") == "./parts/p\n./scratch\n./step\n"
    wanted = halfway | {"job/checkpoint/step": b"5\n", "job/output/result": b"done at 5\n"}
    del wanted["job/checkpoint/scratch"]
    assert kelpie.keys("") == wanted
    assert kelpie.server.job(job)["num_failures"] == 0


def test_a_pattern_says_which_files_come_and_go(kelpie: KelpieWorld) -> None:
    written_by_kelpie(kelpie, checkpoint__of_others=b"stays", checkpoint__a__deep_keep=b"1", input__data_keep=b"input")
    written_by_kelpie(kelpie, input__data=b"too much")
    sync = kelpie.sync(pattern="_keep$")
    program = kelpie.bash(
        "find $INPUT_DIR $CHECKPOINT_DIR -type f -printf '%P\\n' | sort > $W/found\n"
        "cd $CHECKPOINT_DIR; echo 2 > b_keep; echo 2 > other; echo 2 > of_others; rm a/deep_keep; mkdir c\n"
        "echo 2 > c/c_keep; echo 2 > c/not; echo result > $OUTPUT_DIR/r_keep; echo 2 > $OUTPUT_DIR/r\n"
        "while ! test -e $W/go; do sleep 0.01; done"
    )
    job = kelpie.submit(program, heartbeat_interval=1, sync=sync)
    kept = {
        "job/input/data": b"too much",
        "job/input/data_keep": b"input",
        "job/checkpoint/of_others": b"stays",
        "job/checkpoint/b_keep": b"2\n",
        "job/checkpoint/c/c_keep": b"2\n",
    }
    with kelpie.worker() as worker:
        eventually(lambda: kelpie.keys() == kept, "what is to be kept is stored")
        assert kelpie.told("found") == "a/deep_keep\ndata_keep\n"
        worker.signal(signal.SIGKILL)
        worker.wait()
    assert kelpie.keys("") == kept
    kelpie.tell("go")
    with kelpie.worker(machine="two"):
        kelpie.wait_status("completed", job)
    assert kelpie.told("found") == "b_keep\nc/c_keep\ndata_keep\n"
    assert kelpie.keys("") == kept | {"job/output/r_keep": b"result\n"}


def test_checkpoints_that_go_are_deleted_and_outputs_that_go_while_the_job_runs_are_not(kelpie: KelpieWorld) -> None:
    program = kelpie.bash(
        "echo 1 > $CHECKPOINT_DIR/gone; echo 1 > $OUTPUT_DIR/gone; echo 1 > $OUTPUT_DIR/stays\n"
        "while ! test -e $W/remove; do sleep 0.01; done\n"
        "rm $CHECKPOINT_DIR/gone $OUTPUT_DIR/gone; echo 2 > $OUTPUT_DIR/later\n"
        "while ! test -e $W/go; do sleep 0.01; done; echo 3 > $OUTPUT_DIR/last"
    )
    job = kelpie.submit(program, **kelpie.folders())
    stored = {"job/checkpoint/gone": b"1\n", "job/output/gone": b"1\n", "job/output/stays": b"1\n"}
    with kelpie.worker():
        eventually(lambda: kelpie.keys() == stored, "all is stored while the program runs")
        kelpie.tell("remove")
        del stored["job/checkpoint/gone"]
        stored["job/output/later"] = b"2\n"
        eventually(lambda: kelpie.keys() == stored, "the checkpoint is deleted")
        kelpie.tell("go")
        kelpie.wait_status("completed", job)
    assert kelpie.keys("") == stored | {"job/output/last": b"3\n"}
    assert kelpie.storage.history(BUCKET, "job/output/gone") == [b"1\n"]


SNAPSHOTS: dict[str, Any] = {**QUICK, "HEELER_KELPIE_SNAPSHOTS": "true"}


@OLDER_OR_SYNC
def test_with_snapshots_kelpies_keys_are_taken_over_and_the_next_worker_goes_on_from_the_newest(
    kelpie: KelpieWorld, older: bool
) -> None:
    prefix = Prefix(kelpie.storage, "", "job/checkpoint/")
    written_by_kelpie(kelpie, checkpoint__old=b"old", checkpoint__step=b"1\n", input__data=b"input")
    job = kelpie.submit(kelpie.bash(STEPS), heartbeat_interval=1, **layout(kelpie, older))
    halfway = {"step": b"3\n", "parts/p": b"p\n", "scratch": b""}
    with kelpie.worker(**SNAPSHOTS) as worker:
        eventually(lambda: prefix.generation() and prefix.newest() == halfway, "the third step is a generation")
        worker.signal(signal.SIGKILL)
        worker.wait()
    kelpie.tell("go")
    with kelpie.worker(machine="two", **SNAPSHOTS) as second:
        kelpie.wait_status("completed", job)
        assert prefix.restored_by(second) == halfway
    assert kelpie.told("starts") == "one began at 1 with input\ntwo began at 3 with input\n"
    assert prefix.newest() == {"step": b"5\n", "parts/p": b"p\n"}
    below = {key for key in kelpie.keys("") if not key.startswith("job/checkpoint/.heeler/")}
    # Kelpie's own keys stay as they were.
    assert below == {"job/checkpoint/old", "job/checkpoint/step", "job/input/data", "job/output/result"} | (
        {"job/output/early"} if older else set()
    )
    assert kelpie.storage.history(BUCKET, "job/checkpoint/step") == [b"1\n"]
    assert kelpie.server.job(job)["num_failures"] == 0


def test_a_document_in_the_jobs_environment_says_which_of_its_folders_are_snapshots(kelpie: KelpieWorld) -> None:
    prefix = Prefix(kelpie.storage, "", "job/checkpoint/")
    sync = kelpie.sync()
    model = {"bucket": BUCKET, "prefix": "job/model/", "local_path": "model"}
    document = {
        "sync": {
            "before": [*sync["before"], model],
            "during": [{**sync["during"][0], "mode": "snapshot", "ready": "done"}, model],
            "after": sync["after"],
        }
    }
    written_by_kelpie(kelpie, checkpoint__step=b"1\n", model__weights=b"weights")
    program = kelpie.bash(
        "env | grep -c HEELER_DOCUMENT > $W/seen; cat model/weights $CHECKPOINT_DIR/step > $W/found\n"
        "echo 2 > $CHECKPOINT_DIR/step; echo new > model/weights; touch $CHECKPOINT_DIR/done\n"
        "while ! test -e $W/go; do sleep 0.01; done"
    )
    job = kelpie.submit(program, sync=sync, environment={"HEELER_DOCUMENT": json.dumps(document)})
    with kelpie.worker(HEELER_COMMIT_INTERVAL="0.2"):
        eventually(lambda: prefix.generation() and prefix.newest() == {"step": b"2\n", "done": b""}, "a generation")
        eventually(lambda: kelpie.keys("job/model/") == {"job/model/weights": b"new\n"}, "the other is mirrored")
        kelpie.tell("go")
        kelpie.wait_status("completed", job)
    assert kelpie.told("found") == "weights1\n"
    assert kelpie.told("seen") == "0\n"
    assert kelpie.storage.history(BUCKET, "job/checkpoint/step") == [b"1\n"]
