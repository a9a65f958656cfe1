"""The next job starts while the outputs of the last one upload, and neither can hurt the other."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from tests.acceptance.kelpie_world import KelpieWorld
from tests.acceptance.world import BUCKET, MIB, alive, eventually
from tests.support.s3 import Answer, Slow, Stall
from tests.support.s3.faults import FaultRule
from tests.support.worker import Worker

FINAL_UPLOAD = 999_999_999

# Leaves a file in each of its folders.
LITTER = "for dir in $INPUT_DIR $CHECKPOINT_DIR $OUTPUT_DIR; do mkdir -p $dir/d; echo mine > $dir/d/litter; done\n"
FIRST = LITTER + "echo first >> $W/runs; echo first > $OUTPUT_DIR/same"
# Tells what it finds, and waits until it is told to write its outputs, of the same name.
SECOND = (
    "find $INPUT_DIR $CHECKPOINT_DIR $OUTPUT_DIR -not -path '*/.heeler*' > $W/found.new; mv $W/found.new $W/found\n"
    "while ! test -e $W/go; do sleep 0.01; done; echo second > $OUTPUT_DIR/same"
)


def outputs_only(kelpie: KelpieWorld, name: str) -> dict[str, Any]:
    """A sync of nothing but the outputs."""
    return {"after": kelpie.sync(name)["after"]}


def submit(kelpie: KelpieWorld, name: str, text: str, **fields: Any) -> str:
    """A job whose outputs lie below its name."""
    return kelpie.submit(kelpie.bash(text), sync=outputs_only(kelpie, name), **{"heartbeat_interval": 1, **fields})


def hold_outputs(kelpie: KelpieWorld, name: str) -> FaultRule:
    """Storage takes no output of that job until it is released."""
    return kelpie.storage.faults.add(Stall(at="before"), method="PUT", key=f"{name}/output/*")


def apart(kelpie: KelpieWorld, machine: str = "one") -> list[str]:
    """The folders of a machine beside those of its jobs."""
    standard = {"input", "checkpoint", "output", "kelpie-state.json"}
    return sorted(path.name for path in (kelpie.folder / machine).iterdir() if path.name not in standard)


def status(kelpie: KelpieWorld, job: str) -> str:
    """What the API says of a job."""
    return str(kelpie.server.job(job)["status"])


def found(kelpie: KelpieWorld) -> list[str]:
    """What the second program found in its folders, without these themselves."""
    own = [str(kelpie.place(part)) for part in ("input", "checkpoint", "output")]
    lines = kelpie.told("found").splitlines()
    assert set(own) <= set(lines), lines
    return [line for line in lines if line not in own]


def stays_in_place(kelpie: KelpieWorld, worker: Worker, hold: FaultRule, first: str, second: str) -> None:
    """The second job is not taken before the outputs of the first, which are held, are stored."""
    hold.wait_held()
    beats = kelpie.server.job(first)["num_heartbeats"]
    eventually(lambda: kelpie.server.job(first)["num_heartbeats"] >= beats + 3, "the first job is kept")
    assert status(kelpie, second) == "pending"
    assert len(worker.find("job_received")) == 1
    assert not apart(kelpie)
    hold.release()
    kelpie.wait_status("completed", first)
    assert found(kelpie) == []
    kelpie.tell("go")
    kelpie.wait_status("completed", second)
    assert kelpie.keys("first/output/") == {"first/output/same": b"first\n", "first/output/d/litter": b"mine\n"}
    assert kelpie.keys("second/output/") == {"second/output/same": b"second\n"}


def test_the_next_job_starts_in_empty_folders_while_outputs_upload_and_both_are_whole(kelpie: KelpieWorld) -> None:
    hold = hold_outputs(kelpie, "first")
    first = submit(kelpie, "first", FIRST)
    second = submit(kelpie, "second", SECOND)
    with kelpie.worker("--max-jobs", "2") as worker:
        hold.wait_held()
        assert found(kelpie) == []
        assert apart(kelpie) == [f"output-{first}"]
        beats = kelpie.server.job(first)["num_heartbeats"]
        eventually(lambda: kelpie.server.job(first)["num_heartbeats"] >= beats + 3, "the first job is kept")
        assert [status(kelpie, job) for job in (first, second)] == ["running", "running"]
        kelpie.tell("go")
        kelpie.wait_status("completed", second)
        assert status(kelpie, first) == "running"
        assert kelpie.keys("first/output/") == {}
        hold.release()
        kelpie.wait_status("completed", first)
        assert worker.wait() == 0
    assert [kelpie.events(job).count("completed") for job in (first, second)] == [1, 1]
    assert kelpie.keys("") == {
        "first/output/same": b"first\n",
        "first/output/d/litter": b"mine\n",
        "second/output/same": b"second\n",
    }
    assert apart(kelpie) == []


def test_outputs_on_a_slow_link_are_whole_though_the_next_job_writes_the_same_names(kelpie: KelpieWorld) -> None:
    kelpie.storage.faults.add(Slow(up=2 * MIB), method="PUT", key="first/output/*")
    size = 12 * MIB
    write = (
        f"head -c {size} /dev/zero | tr '\\0' LETTER > $OUTPUT_DIR/big\n"
        "mkdir $OUTPUT_DIR/e; cp $OUTPUT_DIR/big $OUTPUT_DIR/e/two"
    )
    first = submit(kelpie, "first", write.replace("LETTER", "a"))
    second = submit(kelpie, "second", "touch $W/began; " + write.replace("LETTER", "b"))
    with kelpie.worker():
        kelpie.told("began")
        assert status(kelpie, first) == "running"
        kelpie.wait_status("completed", first, timeout=60)
        kelpie.wait_status("completed", second, timeout=60)
    for name, letter in (("first", b"a"), ("second", b"b")):
        below = f"{name}/output/"
        assert {key: len(data) for key, data in kelpie.keys(below).items()} == {
            f"{below}{n}": size for n in ("big", "e/two")
        }
        assert all(data == letter * size for data in kelpie.keys(below).values())
        assert all(len(kelpie.storage.history(BUCKET, key)) == 1 for key in kelpie.keys(below))


def test_outputs_of_the_older_fields_upload_while_the_next_job_runs(kelpie: KelpieWorld) -> None:
    hold = hold_outputs(kelpie, "first")
    first = kelpie.submit(kelpie.bash(FIRST), heartbeat_interval=1, **kelpie.folders("first"))
    second = kelpie.submit(kelpie.bash(SECOND), heartbeat_interval=1, **kelpie.folders("second"))
    # Nothing is on its way yet when the program ends.
    with kelpie.worker(FILE_WATCHER_DEBOUNCE_MS="60000"):
        hold.wait_held()
        assert found(kelpie) == []
        assert status(kelpie, first) == "running"
        kelpie.tell("go")
        kelpie.wait_status("completed", second)
        assert status(kelpie, first) == "running"
        hold.release()
        kelpie.wait_status("completed", first)
    assert kelpie.keys("") == {
        "first/checkpoint/d/litter": b"mine\n",
        "first/output/same": b"first\n",
        "first/output/d/litter": b"mine\n",
        "second/output/same": b"second\n",
    }


@pytest.mark.parametrize("how", ["done", "failed", "killed", "without folders"])
def test_the_next_job_finds_nothing_of_the_last_one_however_that_ended(kelpie: KelpieWorld, how: str) -> None:
    # The second one syncs none of its folders, or (done) only its outputs.
    text = LITTER + {"failed": "exit 3", "killed": "kill -9 $$"}.get(how, "exit 0")
    sync = {} if how == "without folders" else kelpie.folders("first")
    first = kelpie.submit(kelpie.bash(text), max_failures=1, heartbeat_interval=1, **sync)
    own: dict[str, Any] = {"sync": outputs_only(kelpie, "second")} if how == "done" else {}
    second = kelpie.submit(kelpie.bash(SECOND), **own)
    kelpie.tell("go")
    with kelpie.worker():
        kelpie.wait_status("completed", second)
        kelpie.wait_status("failed" if how in ("failed", "killed") else "completed", first)
    assert found(kelpie) == []


def test_a_worker_killed_while_outputs_upload_runs_that_job_again_and_leaves_no_folder_behind(
    kelpie: KelpieWorld,
) -> None:
    hold = hold_outputs(kelpie, "first")
    first = submit(kelpie, "first", FIRST, heartbeat_interval=30)
    second = submit(kelpie, "second", SECOND, heartbeat_interval=30)
    with kelpie.worker() as worker:
        hold.wait_held()
        found(kelpie)
        assert apart(kelpie) == [f"output-{first}"]
        pid = kelpie.told_pid()
        worker.signal(signal.SIGKILL)
        worker.wait()
    eventually(lambda: not alive(pid), "the second program has died with it")
    kelpie.storage.faults.clear()
    kelpie.tell("go")
    assert [status(kelpie, job) for job in (first, second)] == ["running", "running"]
    with kelpie.worker("--max-jobs", "2") as worker:
        assert worker.wait() == 0
    assert [status(kelpie, job) for job in (first, second)] == ["completed", "completed"]
    assert (kelpie.folder / "runs").read_text() == "first\nfirst\n"
    assert kelpie.keys("first/") == {"first/output/same": b"first\n", "first/output/d/litter": b"mine\n"}
    assert kelpie.keys("second/") == {"second/output/same": b"second\n"}
    assert apart(kelpie) == []
    assert [kelpie.events(job).count("completed") for job in (first, second)] == [1, 1]


@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
def test_sigterm_while_outputs_upload_sends_them_within_the_grace_period_or_hands_the_job_back(
    kelpie: KelpieWorld, in_time: bool
) -> None:
    hold = hold_outputs(kelpie, "first")
    first = submit(kelpie, "first", FIRST)
    second = submit(kelpie, "second", SECOND)
    with kelpie.worker(HEELER_STOP_GRACE="60" if in_time else "4") as worker:
        hold.wait_held()
        found(kelpie)
        worker.signal(signal.SIGTERM)
        worker.wait_for("job_settled", job_id=second, outcome="release")
        if in_time:
            hold.release()
        assert worker.wait(70) == 0
    assert status(kelpie, second) == "running"  # nothing is reported of it
    assert status(kelpie, first) == ("completed" if in_time else "running")
    assert [kelpie.server.job(job)["num_failures"] for job in (first, second)] == [0, 0]
    if not in_time:
        hold.release()
        kelpie.tell("go")
        with kelpie.worker(machine="two"):
            kelpie.wait_status("completed", first)
            kelpie.wait_status("completed", second)
    assert kelpie.keys("first/") == {"first/output/same": b"first\n", "first/output/d/litter": b"mine\n"}


def test_without_overlap_the_next_job_waits_for_the_outputs(kelpie: KelpieWorld) -> None:
    hold = hold_outputs(kelpie, "first")
    first, second = submit(kelpie, "first", FIRST), submit(kelpie, "second", SECOND)
    with kelpie.worker("--overlap", "off") as worker:
        stays_in_place(kelpie, worker, hold, first, second)


def test_outputs_in_a_folder_that_can_not_be_moved_are_uploaded_from_where_they_are(kelpie: KelpieWorld) -> None:
    place = kelpie.place("output")
    place.mkdir(parents=True)
    hold = hold_outputs(kelpie, "first")
    first, second = submit(kelpie, "first", FIRST), submit(kelpie, "second", SECOND)
    with kelpie.worker(wrapper=_mounting(f"mount --bind {place} {place}")) as worker:
        stays_in_place(kelpie, worker, hold, first, second)


def test_outputs_in_a_folder_that_came_with_the_image_are_moved_aside_all_the_same(kelpie: KelpieWorld) -> None:
    place, disk = kelpie.folder / "one", kelpie.folder / "disk"
    place.mkdir()
    disk.mkdir()
    image = (
        f"mount -t tmpfs disk {disk} && cd {disk} && mkdir -p image/output upper work && "
        f"mount -t overlay -o lowerdir=image,upperdir=upper,workdir=work overlay {place} && cd {place}"
    )
    hold = hold_outputs(kelpie, "first")
    first, second = submit(kelpie, "first", FIRST), submit(kelpie, "second", SECOND)
    with kelpie.worker(wrapper=_mounting(image)):
        hold.wait_held()
        assert found(kelpie) == []
        kelpie.tell("go")
        kelpie.wait_status("completed", second)
        assert status(kelpie, first) == "running"
        hold.release()
        kelpie.wait_status("completed", first)
    assert kelpie.keys("first/") == {"first/output/same": b"first\n", "first/output/d/litter": b"mine\n"}
    assert kelpie.keys("second/") == {"second/output/same": b"second\n"}


def _mounting(mounts: str) -> Sequence[str]:
    """Starts a worker among mounts of its own."""
    wrapper = ["unshare", "--mount", "bash", "-c", f'{mounts} && exec "$0" "$@"']
    if os.geteuid() != 0 or subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    return wrapper


def test_outputs_that_are_refused_for_good_fail_their_job_and_not_the_next(kelpie: KelpieWorld) -> None:
    hold = hold_outputs(kelpie, "first")
    kelpie.storage.faults.add(Answer(403, "AccessDenied"), method="PUT", key="first/output/*")
    first = submit(kelpie, "first", FIRST, max_failures=1)
    second = submit(kelpie, "second", SECOND)
    with kelpie.worker() as worker:
        hold.wait_held()
        assert found(kelpie) == []
        hold.release()
        kelpie.wait_status("failed", first)
        assert status(kelpie, second) == "running"
        assert apart(kelpie) == [f"output-{first}"]  # for people to look at, until something else is set apart
        kelpie.tell("go")
        kelpie.wait_status("completed", second)
        eventually(lambda: not apart(kelpie), "nothing is left behind")
        assert worker.process.poll() is None
    assert kelpie.server.job(first)["num_failures"] == 1
    assert kelpie.server.job(second)["num_failures"] == 0
    assert kelpie.keys("second/") == {"second/output/same": b"second\n"}


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_jobs_are_taken_than_wanted_though_they_overlap(kelpie: KelpieWorld, most: int) -> None:
    hold = hold_outputs(kelpie, "*")
    jobs = [submit(kelpie, f"job-{number}", "echo $OUTPUT_DIR > $OUTPUT_DIR/one") for number in range(3)]
    with kelpie.worker("--max-jobs", str(most)) as worker:
        hold.wait_held(most)
        beats = kelpie.server.job(jobs[0])["num_heartbeats"]
        eventually(lambda: kelpie.server.job(jobs[0])["num_heartbeats"] >= beats + 2, "time passes")
        hold.release()
        assert worker.wait() == 0
        assert len(worker.find("job_received")) == most
    assert [status(kelpie, job) for job in jobs] == ["completed"] * most + ["pending"] * (3 - most)


def test_the_machine_costs_most_to_delete_while_outputs_upload_and_nothing_when_idle(kelpie: KelpieWorld) -> None:
    hold = hold_outputs(kelpie, "first")
    first, second = submit(kelpie, "first", FIRST), submit(kelpie, "second", SECOND)
    machine = kelpie.server.imds("one")

    def costs() -> list[int]:
        return [cost for _, cost in machine.deletion_costs]

    with kelpie.worker():
        hold.wait_held()
        found(kelpie)
        eventually(lambda: machine.deletion_cost == FINAL_UPLOAD, "the final upload is told")
        hold.release()
        kelpie.wait_status("completed", first)
        eventually(lambda: 0 < machine.deletion_cost < FINAL_UPLOAD, f"the second job's own cost: {costs()}")
        kelpie.tell("go")
        kelpie.wait_status("completed", second)
        eventually(lambda: machine.deletion_cost == 0, "it is idle")


@pytest.mark.parametrize("inside", ["results", "{job_id}"])
def test_outputs_inside_a_folder_that_the_next_job_empties_are_all_stored(kelpie: KelpieWorld, inside: str) -> None:
    hold = kelpie.storage.faults.add(Stall(at="before"), method="PUT", key="first/*")
    script = 'mkdir -p "$HEELER_OUTPUT_DIR"; for i in $(seq 60); do echo $i > "$HEELER_OUTPUT_DIR/$i"; done\n'
    jobs = []
    for name, more in (("first", ""), ("second", "touch $W/second")):
        entry = {"bucket": BUCKET, "prefix": name, "local_path": f"output/{inside}", "direction": "upload"}
        jobs.append(kelpie.submit(kelpie.bash(script + more), sync={"after": [entry]}))
    with kelpie.worker() as worker:
        hold.wait_held()
        kelpie.told("second")  # its folders are prepared, and most of the first one's outputs are not sent
        hold.release()
        for job in jobs:
            kelpie.wait_status("completed", job)
        worker.wait_for("job_settled", count=2)
    for name in ("first", "second"):
        assert set(kelpie.keys(f"{name}/")) == {f"{name}/{number}" for number in range(1, 61)}


def test_jobs_side_by_side_do_not_empty_one_anothers_folders(kelpie: KelpieWorld) -> None:
    program = kelpie.bash(
        "touch $CHECKPOINT_DIR/$KELPIE_JOB_ID $W/$KELPIE_JOB_ID; while ! test -e $W/go; do sleep 0.01; done\n"
        "test -e $CHECKPOINT_DIR/$KELPIE_JOB_ID"
    )
    jobs = [kelpie.submit(program) for _ in range(2)]
    with kelpie.worker("--concurrency", "2"):
        eventually(lambda: all((kelpie.folder / job).exists() for job in jobs), "both run at once")
        kelpie.tell("go")
        for job in jobs:
            kelpie.wait_status("completed", job)
