"""FAULTS.md, Kelpie 1 to 15, end to end: real workers of Kelpie's API, and what it says of their jobs is the judge."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import time

import pytest

from tests.acceptance.kelpie_world import KelpieWorld
from tests.acceptance.world import BUCKET, FAMILY, MEMBERS, MIB, alive, eventually
from tests.support.kelpie_server import API_KEY, KEY
from tests.support.s3 import Answer, Slow, Stall, Truncate

# Takes up its step where the checkpoint left it, tells it, and writes the next.
STEPS = (
    "step=$(cat $CHECKPOINT_DIR/step 2>/dev/null || echo 0); echo $step > $W/start.new; mv $W/start.new $W/start\n"
    "echo $((step + 1)) > $CHECKPOINT_DIR/step"
)


def check(kelpie: KelpieWorld, job: str, status: str, *, failures: int = 0, machine: str = "one") -> None:
    """What the API says of a job."""
    found = kelpie.server.job(job)
    assert (found["status"], found["num_failures"], found["machine_id"]) == (status, failures, machine), found


# 1: "the error is logged, the job is reported completed, the bucket is empty and the local copy deleted".


def test_a_job_whose_outputs_storage_refuses_for_a_while_is_completed_only_when_they_are_stored(
    kelpie: KelpieWorld,
) -> None:
    kelpie.storage.faults.add(Answer(500, "InternalError"), operation="PutObject", key="job/output/d/two")
    program = kelpie.bash("echo one > $OUTPUT_DIR/one; mkdir $OUTPUT_DIR/d; echo two > $OUTPUT_DIR/d/two")
    job = kelpie.submit(program, heartbeat_interval=1, **kelpie.folders())
    with kelpie.worker() as worker:
        worker.wait_for("upload_retried", count=3)
        with kelpie.worker(machine="two"):
            # Longer than the API waits for a heartbeat.
            eventually(lambda: kelpie.server.job(job)["num_heartbeats"] >= 5, "the job is kept")
            check(kelpie, job, "running")
            assert list(kelpie.place("").glob("output*/d/two"))  # set apart, perhaps
            kelpie.storage.faults.clear()
            kelpie.wait_status("completed", job)
    check(kelpie, job, "completed")
    assert kelpie.events(job) == ["created", "started", "completed"]
    assert kelpie.keys() == {"job/output/one": b"one\n", "job/output/d/two": b"two\n"}


# 2: "a checkpoint upload that failed once is never tried again".


def test_a_checkpoint_whose_upload_failed_once_is_stored_while_the_job_runs(kelpie: KelpieWorld) -> None:
    kelpie.storage.faults.add(Answer(503, "SlowDown"), operation="PutObject", count=1)
    program = kelpie.bash("echo 1 > $CHECKPOINT_DIR/step; while ! test -e $W/go; do sleep 0.01; done")
    job = kelpie.submit(program, sync=kelpie.sync())
    with kelpie.worker() as worker:
        eventually(lambda: kelpie.keys() == {"job/checkpoint/step": b"1\n"}, "the checkpoint is stored")
        assert worker.find("upload_retried")
        check(kelpie, job, "running")
        kelpie.tell("go")
        kelpie.wait_status("completed", job)
    check(kelpie, job, "completed")


# 3: "the bucket keeps the old content for ever (lost update)".


def test_a_checkpoint_rewritten_while_it_uploads_is_stored_in_its_newest_state(kelpie: KelpieWorld) -> None:
    hold = kelpie.storage.faults.add(Stall(at="before"), operation="PutObject", count=1)
    program = kelpie.bash(
        "echo old > $CHECKPOINT_DIR/model; while ! test -e $W/rewrite; do sleep 0.01; done\n"
        "echo new > $CHECKPOINT_DIR/model; touch $W/rewritten; while ! test -e $W/go; do sleep 0.01; done"
    )
    job = kelpie.submit(program, **kelpie.folders())
    with kelpie.worker():
        hold.wait_held()
        kelpie.tell("rewrite")
        kelpie.told("rewritten")
        hold.release()
        eventually(lambda: kelpie.keys() == {"job/checkpoint/model": b"new\n"}, "the newest state is stored")
        check(kelpie, job, "running")
        kelpie.tell("go")
        kelpie.wait_status("completed", job)
    assert kelpie.keys() == {"job/checkpoint/model": b"new\n"}


# 4: "the stored object is 75 MB of one version and 239 MB of the other, 'successfully'".


def test_a_large_output_rewritten_in_place_during_its_upload_is_never_visible_as_a_mixture(
    kelpie: KelpieWorld,
) -> None:
    size = 64 * MIB
    hold = kelpie.storage.faults.add(Stall(at="before"), operation="UploadPart", part_number=3, count=1)
    program = kelpie.python(
        "file = Path(env['OUTPUT_DIR']) / 'big'\n"
        f"file.write_bytes(b'A' * {size})\n"
        "await_('rewrite')\n"
        "with file.open('r+b', buffering=0) as out:\n"
        f"    for _ in range({size // MIB}): out.write(b'B' * {MIB})\n"
        "tell('rewritten')\n"
    )
    job = kelpie.submit(program, **kelpie.folders())  # outputs are uploaded early with the older fields
    with kelpie.worker():
        hold.wait_held()
        kelpie.tell("rewrite")
        kelpie.told("rewritten")
        hold.release()
        kelpie.wait_status("completed", job, timeout=60)
    versions = kelpie.storage.history(BUCKET, "job/output/big")
    # Of one letter each: storage keeps every version that was ever visible.
    assert [(set(data or b""), len(data or b"")) for data in versions][-1] == (set(b"B"), size)
    assert all(data in (b"A" * size, b"B" * size) for data in versions)
    check(kelpie, job, "completed")


# 5: "a checkpoint of two files, killed between them: the next worker starts with one file of step 2 and one of step 1".


def test_a_worker_killed_between_the_two_files_of_a_checkpoint_leaves_the_next_one_a_whole_one(
    kelpie: KelpieWorld,
) -> None:
    program = kelpie.bash(
        "cd $CHECKPOINT_DIR; ls > $W/found-$SALAD_MACHINE_ID; cat * >> $W/found-$SALAD_MACHINE_ID 2> /dev/null\n"
        "test $SALAD_MACHINE_ID = one || exit 0\n"
        "echo 1 > a; echo 1 > b; while ! test -e $W/go; do sleep 0.01; done\n"
        "echo 2 > a; touch $W/between; sleep 1000"
    )
    job = kelpie.submit(program, heartbeat_interval=1, **kelpie.snapshots("b"))
    with kelpie.worker(HEELER_COMMIT_INTERVAL="0.2") as first:
        first.wait_for("committed")
        kelpie.tell("go")
        kelpie.told("between")
        first.signal(signal.SIGKILL)
        first.wait()
    check(kelpie, job, "running")
    with kelpie.worker(machine="two"):
        kelpie.wait_status("completed", job)
    assert kelpie.told("found-two") == "a\nb\n1\n1\n"
    check(kelpie, job, "completed", machine="two")


# 6: "the job starts at step 0 and overwrites checkpoint 5 with 2".


@pytest.mark.parametrize("operation", ["GetObject", "ListObjectsV2"])
def test_a_job_waits_for_a_checkpoint_that_storage_can_not_give_and_goes_on_from_it(
    kelpie: KelpieWorld, operation: str
) -> None:
    kelpie.storage.put(BUCKET, "job/checkpoint/step", b"5\n")
    kelpie.storage.faults.add(Answer(500, "InternalError"), operation=operation)
    job = kelpie.submit(kelpie.bash(STEPS), heartbeat_interval=1, **kelpie.folders())
    with kelpie.worker() as worker:
        worker.wait_for("storage_retried", count=2)
        check(kelpie, job, "running")
        assert not (kelpie.folder / "start").exists()
        kelpie.storage.faults.clear()
        kelpie.wait_status("completed", job)
    assert kelpie.told("start") == "5\n"
    assert kelpie.storage.history(BUCKET, "job/checkpoint/step") == [b"5\n", b"6\n"]
    check(kelpie, job, "completed")


# 7: "a download cut in the middle of the body hangs for ever with a truncated file, heartbeats going on".


def test_an_input_cut_in_the_middle_of_its_body_reaches_the_program_whole(kelpie: KelpieWorld) -> None:
    content = random.Random(7).randbytes(8 * MIB)
    kelpie.storage.put(BUCKET, "job/input/big", content)
    kelpie.storage.faults.add(Truncate(after_bytes=2 * MIB), operation="GetObject", count=1)
    kelpie.storage.faults.add(Stall(at="response_body", after_bytes=MIB), operation="GetObject", nth=2)
    job = kelpie.submit(kelpie.bash("sha256sum < $INPUT_DIR/big > $W/sum"), sync=kelpie.sync())
    with kelpie.worker(HEELER_S3_TIMEOUT="0.8"):
        kelpie.wait_status("completed", job)
    assert kelpie.told("sum").split()[0] == hashlib.sha256(content).hexdigest()
    assert len(kelpie.storage.stats.find("GetObject", "job/input/big")) >= 3
    check(kelpie, job, "completed")


# 8: "an object key with ../ is written outside the job's folder".


def test_a_key_that_leads_out_of_the_folder_fails_the_job_and_writes_nothing(kelpie: KelpieWorld) -> None:
    kelpie.storage.put(BUCKET, "job/checkpoint/step", b"5\n")
    kelpie.storage.put(BUCKET, "job/checkpoint/../../evil", b"evil")
    job = kelpie.submit(kelpie.bash(STEPS), max_failures=1, **kelpie.folders())
    with kelpie.worker() as worker:
        kelpie.wait_status("failed", job)
        settled = worker.wait_for("job_settled", job_id=job)
    assert "job/checkpoint/../../evil" in settled["reason"]
    check(kelpie, job, "failed", failures=1)
    assert not list(kelpie.folder.rglob("evil*"))
    assert not (kelpie.folder / "pid").exists()
    assert kelpie.storage.history(BUCKET, "job/checkpoint/step") == [b"5\n"]


# 9: "exits at once; the child is not told and lives on as an orphan; a 30 MB upload under way is lost".


def test_sigterm_during_an_upload_tells_the_program_sends_all_and_counts_no_failure(kelpie: KelpieWorld) -> None:
    size = 24 * MIB
    kelpie.storage.faults.add(Slow(up=6 * MIB), operation="UploadPart")
    program = kelpie.bash(
        "if test $SALAD_MACHINE_ID = two; then cmp $CHECKPOINT_DIR/big $W/big && touch $W/same; exit 0; fi\n"
        "trap 'touch $W/told; exit 0' TERM\n"
        "sleep 1000 & echo $! > $W/child.new; mv $W/child.new $W/child\n"
        f"head -c {size} /dev/urandom > $W/big; cp $W/big $CHECKPOINT_DIR/big; wait"
    )
    job = kelpie.submit(program, heartbeat_interval=1, sync=kelpie.sync())
    with kelpie.worker(HEELER_STOP_GRACE="60") as first:
        pids = [kelpie.told_pid(), kelpie.told_pid("child")]
        eventually(lambda: kelpie.storage.stats.bytes_in > MIB, "the upload is under way")
        assert not kelpie.keys()
        first.signal(signal.SIGTERM)
        assert first.wait(70) == 0
    assert (kelpie.folder / "told").exists()
    assert not any(alive(pid) for pid in pids)
    assert kelpie.keys() == {"job/checkpoint/big": (kelpie.folder / "big").read_bytes()}
    check(kelpie, job, "running")
    with kelpie.worker(machine="two"):
        kelpie.wait_status("completed", job)
    assert (kelpie.folder / "same").exists()
    check(kelpie, job, "completed", machine="two")
    assert kelpie.events(job) == ["created", "started", "started", "completed"]


# 10: "taken for a remote cancel, never reported as failed; run again 8 times in 16 s".


def test_a_program_that_dies_of_a_signal_has_failed_and_is_not_run_there_again(kelpie: KelpieWorld) -> None:
    program = kelpie.bash("echo $SALAD_MACHINE_ID >> $W/starts; ulimit -c 0; kill -SEGV $$")
    job = kelpie.submit(program, heartbeat_interval=1, max_failures=2, **kelpie.folders())
    with kelpie.worker() as first:
        first.wait_for("job_settled", job_id=job)
        check(kelpie, job, "running", failures=1)
        with kelpie.worker(machine="two"):
            kelpie.wait_status("failed", job)
    check(kelpie, job, "failed", failures=2, machine="two")
    assert (kelpie.folder / "starts").read_text() == "one\ntwo\n"


# 11: "SIGINT to the direct child only; grandchildren live on; a child that then exits 0 turns canceled into completed".


def test_a_canceled_job_dies_with_all_its_descendants_and_stays_canceled(kelpie: KelpieWorld) -> None:
    # Its program exits with 0 when it is told to stop.
    job = kelpie.submit(kelpie.python(FAMILY + "await_('never')"), heartbeat_interval=1, sync=kelpie.sync())
    with kelpie.worker() as worker:
        pids = [kelpie.told_pid(name) for name in MEMBERS]
        assert all(alive(pid) for pid in pids)
        kelpie.server.table.cancel(kelpie.server.user, job)
        worker.wait_for("job_settled", outcome="cancelled", job_id=job)
        assert not [name for name, pid in zip(MEMBERS, pids, strict=True) if alive(pid)]
        other = kelpie.submit(["true"], **kelpie.folders("other"))  # the worker is as good as new
        kelpie.wait_status("completed", other)
    assert kelpie.server.job(job)["status"] == "canceled"
    assert kelpie.server.job(job)["num_failures"] == 0
    assert kelpie.events(job) == ["created", "started", "canceled"]


# 12: "a checkpoint written right before exit is lost in 4 runs of 20".


def test_a_checkpoint_written_right_before_the_exit_is_never_lost(kelpie: KelpieWorld) -> None:
    words = {
        "place": "cp $W/bytes $CHECKPOINT_DIR/last",
        "rename": "cp $W/bytes $W/new; mv $W/new $CHECKPOINT_DIR/last",
        "folder": "mkdir -p $CHECKPOINT_DIR/a/b; cp $W/bytes $CHECKPOINT_DIR/a/b/last",
        "over": "echo first > $CHECKPOINT_DIR/last; sleep 0.1; cp $W/bytes $CHECKPOINT_DIR/last",
    }
    wanted = random.Random(12).randbytes(100_000)
    (kelpie.folder / "bytes").write_bytes(wanted)
    jobs = []
    for number in range(3):
        for way, text in words.items():
            name = f"{way}-{number}"
            how = kelpie.folders(name) if number % 2 else {"sync": kelpie.sync(name)}
            jobs.append((name, kelpie.submit(kelpie.bash(f"{text}; exit 0"), **how)))
    with kelpie.worker("--max-jobs", str(len(jobs))) as worker:
        assert worker.wait(90) == 0
    for name, job in jobs:
        check(kelpie, job, "completed")
        assert list(kelpie.keys(f"{name}/checkpoint/").values()) == [wanted], name


# 13: "three empty jobs took 46 s at an interval of 15 s".


def test_three_empty_jobs_are_done_before_one_heartbeat_is_due(kelpie: KelpieWorld) -> None:
    jobs = [kelpie.submit(["true"], heartbeat_interval=15, **kelpie.folders(f"job-{one}")) for one in range(3)]
    started = time.monotonic()
    with kelpie.worker("--max-jobs", "3") as worker:
        assert worker.wait() == 0
    assert time.monotonic() - started < 15
    for job in jobs:
        check(kelpie, job, "completed")


# 14: "the child gets the queue's key and the storage credentials in its environment, asked or not".


def test_no_key_of_queue_or_storage_reaches_the_program_when_it_is_not_to(kelpie: KelpieWorld) -> None:
    secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCY"
    program = kelpie.python("import json\ntell('environment', json.dumps(dict(env)))\n")
    job = kelpie.submit(program, environment={"MINE": "stays"})
    with kelpie.worker("--scrub-env", "true", SALAD_API_KEY=API_KEY, AWS_SECRET_ACCESS_KEY=secret) as worker:
        kelpie.wait_status("completed", job)
    environment = json.loads(kelpie.told("environment"))
    for hidden in (KEY, API_KEY, secret):
        assert not [name for name, value in environment.items() if hidden in value]
        assert hidden not in "\n".join(worker.lines)
    assert environment["MINE"] == "stays"
    assert environment["KELPIE_JOB_ID"] == job
    for part in ("input", "checkpoint", "output"):
        assert environment[f"{part.upper()}_DIR"] == str(kelpie.place(part))


# 15: "local_path is not created when there was nothing to download".


@pytest.mark.parametrize("older", [True, False], ids=["older fields", "sync"])
def test_all_folders_are_there_and_empty_when_there_is_nothing_to_download(kelpie: KelpieWorld, older: bool) -> None:
    for part in ("input", "checkpoint", "output"):  # of somebody before us
        kelpie.place(part).mkdir(parents=True)
        (kelpie.place(part) / "old").touch()
    program = kelpie.bash("ls -A $INPUT_DIR $CHECKPOINT_DIR $OUTPUT_DIR > $W/found && touch $W/all_there")
    job = kelpie.submit(program, **(kelpie.folders() if older else {"sync": kelpie.sync()}))
    with kelpie.worker():
        kelpie.wait_status("completed", job)
    assert (kelpie.folder / "all_there").exists()
    assert [line for line in kelpie.told("found").split() if not line.endswith(":") and line != ".heeler"] == []
    assert not kelpie.keys()
