"""`heeler kelpie` in the place of Kelpie's worker on a machine of SaladCloud's: its variables, and several workers."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from tests.acceptance.kelpie_world import KelpieWorld
from tests.acceptance.world import BUCKET, eventually
from tests.support.s3 import Slow
from tests.support.worker import heeler

MIB = 1 << 20


def state_of(place: Path) -> dict[str, Any]:
    """What a state file of Kelpie's says."""
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def test_the_command_alone_takes_the_place_of_kelpies_worker(kelpie: KelpieWorld) -> None:
    job = kelpie.submit(kelpie.bash("echo $KELPIE_JOB_ID > $OUTPUT_DIR/id"), **kelpie.folders())
    with kelpie.worker(command="kelpie") as worker:
        kelpie.wait_status("completed", job)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert kelpie.keys() == {"job/output/id": f"{job}\n".encode()}


def test_with_sync_the_program_knows_the_standard_folders_and_finds_them_empty(kelpie: KelpieWorld) -> None:
    dirty = kelpie.submit(kelpie.bash("touch $INPUT_DIR/a $CHECKPOINT_DIR/b $OUTPUT_DIR/c; exit 1"), max_failures=1)
    sync = {"after": [{"bucket": BUCKET, "prefix": "own", "local_path": "own", "direction": "upload"}]}
    script = "echo $INPUT_DIR $CHECKPOINT_DIR $OUTPUT_DIR $HEELER_OUTPUT_DIR > own/names; ls $INPUT_DIR $CHECKPOINT_DIR"
    job = kelpie.submit(kelpie.bash(f"{script} $OUTPUT_DIR > own/found"), sync=sync)
    with kelpie.worker():
        kelpie.wait_status("failed", dirty)
        kelpie.wait_status("completed", job)
    places = [str(kelpie.place(part)) for part in ("input", "checkpoint", "output")]
    kept = kelpie.keys("own/")
    assert kept["own/names"].decode().split() == [*places, str(kelpie.folder / "one" / "own")]
    assert kept["own/found"].decode().split() == [f"{place}:" for place in sorted(places)]


def test_a_machine_is_left_after_as_many_failures_as_kelpies_worker_leaves_it_after(kelpie: KelpieWorld) -> None:
    jobs = [kelpie.submit(kelpie.bash("exit 1")) for _ in range(6)]
    with kelpie.worker() as worker:
        worker.wait_for("reallocation_asked")
        assert worker.running
    assert [kelpie.server.job(job)["num_failures"] for job in jobs] == [1, 1, 1, 1, 1, 0]
    (_, reason) = kelpie.server.imds("one").reallocations[0]
    assert reason == "5 failures in a row on this machine; the last: exit code 1"


def test_a_machine_without_work_for_long_is_left(kelpie: KelpieWorld) -> None:
    job = kelpie.submit(kelpie.bash("true"))
    with kelpie.worker(MAX_TIME_WITH_NO_WORK_S="1") as worker:
        worker.wait_for("reallocation_asked")
        assert kelpie.server.job(job)["status"] == "completed"
        assert worker.running, "SaladCloud ends it"
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert [reason for _, reason in kelpie.server.imds("one").reallocations] == ["no job for 1 s"]


def test_between_jobs_the_container_is_made_anew_once_all_is_told(kelpie: KelpieWorld) -> None:
    first = kelpie.submit(kelpie.bash("echo 1 > $OUTPUT_DIR/o"), **kelpie.folders())
    second = kelpie.submit(kelpie.bash("true"))
    with kelpie.worker(KELPIE_RECREATE_BETWEEN_JOBS="true") as worker:
        worker.wait_for("recreation_asked")
        assert kelpie.server.job(first)["status"] == "completed"
        assert kelpie.server.job(second)["status"] == "pending"
        assert len(kelpie.server.imds("one").recreations) == 1
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


def test_a_container_whose_program_interrupted_itself_is_made_anew_too(kelpie: KelpieWorld) -> None:
    first = kelpie.submit(kelpie.bash("echo >> $W/ran; exit 75"))
    second = kelpie.submit(kelpie.bash("touch $W/second"))
    with kelpie.worker(KELPIE_RECREATE_BETWEEN_JOBS="true") as worker:
        worker.wait_for("recreation_asked")
        assert worker.find("job_settled")[0]["outcome"] == "release"
        assert kelpie.server.job(first)["status"] != "completed"
        assert kelpie.server.job(second)["status"] == "pending"
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert (kelpie.folder / "ran").read_text() == "\n"
    assert not (kelpie.folder / "second").exists()


def test_the_state_file_tells_programs_what_is_under_way(kelpie: KelpieWorld) -> None:
    kelpie.storage.faults.add(Slow(up=2 * MIB), operation="PutObject")
    program = kelpie.bash(
        "head -c 1000000 /dev/urandom > $CHECKPOINT_DIR/new; mv $CHECKPOINT_DIR/new $CHECKPOINT_DIR/big\n"
        "echo $KELPIE_STATE_FILE > $W/where.new; mv $W/where.new $W/where; while ! test -e $W/go; do sleep 0.01; done"
    )
    job = kelpie.submit(program, **kelpie.folders())
    bad = kelpie.submit(kelpie.bash("exit 7"))
    place = kelpie.folder / "one" / "state.json"
    big = str(kelpie.place("checkpoint") / "big")
    with kelpie.worker(KELPIE_STATE_FILE="state.json"):
        assert kelpie.told("where").strip() == str(place)
        eventually(lambda: state_of(place)["jobs"][0]["activeUploads"] == [big], "it uploads")
        eventually(lambda: state_of(place)["jobs"][0]["activeUploads"] == [], "it is in storage")
        assert kelpie.keys()["job/checkpoint/big"] == Path(big).read_bytes()
        (running,) = state_of(place)["jobs"]
        assert running.keys() == {"id", "status", "start", "activeUploads", "activeDownloads"}
        assert (running["id"], running["status"]) == (job, "running")
        kelpie.tell("go")
        eventually(lambda: [one["status"] for one in state_of(place)["jobs"]] == ["completed", "failed"], "both ended")
    done, failed = state_of(place)["jobs"]
    assert done.keys() >= {"start", "exitTime", "exitCode", "end"}
    assert (done["exitCode"], failed["id"], failed["exitCode"]) == (0, bad, 7)
    assert done["start"] <= done["exitTime"] <= done["end"]


def test_several_workers_on_one_machine_are_not_in_one_anothers_way(kelpie: KelpieWorld) -> None:
    program = kelpie.bash("touch $W/$KELPIE_JOB_ID; while ! test -e $W/go; do sleep 0.01; done")
    jobs = [kelpie.submit(program) for _ in range(2)]
    with (
        kelpie.worker(KELPIE_STATE_FILE="a.json", bare=True, name="a") as first,
        kelpie.worker(KELPIE_STATE_FILE="b.json", bare=True, name="b") as second,
    ):
        eventually(lambda: all((kelpie.folder / job).exists() for job in jobs), "both run at once")
        kelpie.tell("go")
        for job in jobs:
            kelpie.wait_status("completed", job)
        assert first.running
        assert second.running
    taken = [{event["job_id"] for event in worker.find("job_received")} for worker in (first, second)]
    assert taken[0] | taken[1] == set(jobs)
    assert not taken[0] & taken[1]


def test_what_has_no_effect_is_said_with_the_reason(kelpie: KelpieWorld) -> None:
    with kelpie.worker(MAX_RETRIES="3", KELPIE_COLOUR="red", KELPIE_LOG_LEVEL="trace") as worker:
        worker.wait_for("phase", phase="receive")
    said = {event["variable"]: event["reason"] for event in worker.find("variable_without_effect")}
    assert said.keys() == {"MAX_RETRIES", "KELPIE_COLOUR"}
    assert "for as long as the job is ours" in said["MAX_RETRIES"]


def test_the_deletion_cost_follows_the_job(kelpie: KelpieWorld) -> None:
    program = kelpie.bash("echo o > $OUTPUT_DIR/o; while ! test -e $W/go; do sleep 0.01; done")
    job = kelpie.submit(program, **kelpie.folders())
    costs = kelpie.server.imds("one").deletion_costs
    with kelpie.worker():
        eventually(lambda: any(cost == 1 for _, cost in costs), "it runs")
        kelpie.tell("go")
        kelpie.wait_status("completed", job)
        eventually(lambda: costs[-1][1] == 0, "idle again")
    assert {cost for _, cost in costs} <= {0, 1, 999_999_999}


def test_wrong_settings_are_one_line_with_the_name_of_the_variable(kelpie: KelpieWorld) -> None:
    base = kelpie.server.environment("one")
    elsewhere = {name: value for name, value in base.items() if not name.startswith("SALAD_")}
    cases = [
        ({**base, "KELPIE_API_KEY": "wrong"}, 64, "KELPIE_API_KEY"),
        ({**base, "KELPIE_API_URL": "kelpie.example"}, 64, "KELPIE_API_URL"),
        ({**elsewhere, "KELPIE_API_KEY": ""}, 64, "KELPIE_API_KEY"),
        (elsewhere, 64, "SALAD_CONTAINER_GROUP_ID"),
        ({**base, "KELPIE_API_KEY": "", "SALAD_API_KEY": "key"}, 64, "SALAD_PROJECT_NAME"),
        ({**elsewhere, "SALAD_CONTAINER_GROUP_ID": "", "KELPIE_RECREATE_BETWEEN_JOBS": "true"}, 64, "SALAD_CONTAINER"),
        ({**base, "KELPIE_RECREATE_BETWEEN_JOBS": "true", "HEELER_MAX_JOBS": "2"}, 64, "--max-jobs"),
        ({**base, "KELPIE_RECREATE_BETWEEN_JOBS": "maybe"}, 64, "KELPIE_RECREATE_BETWEEN_JOBS"),
        ({**base, "HEARTBEAT_INTERVAL_S": "often"}, 64, "HEARTBEAT_INTERVAL_S"),
        ({**base, "KELPIE_API_URL": "http://127.0.0.1:9", "HEELER_STARTUP_TIMEOUT": "0"}, 69, "http://127.0.0.1:9"),
    ]
    for environment, code, words in cases:
        env = kelpie.environment(**environment, HEELER_STATE_DIR=str(kelpie.folder / "s"), HEELER_CONTROL="off")
        told = heeler("kelpie", env=env, cwd=kelpie.folder)
        assert told.returncode == code, (environment, told.stderr)
        line = told.stderr.strip().splitlines()[-1]
        assert line.startswith("heeler: "), told.stderr
        assert words in line
        assert "kelpie-key" not in told.stderr
