"""What snapshots refuse by name: another job's prefix, storage without conditions, damage; and what they take over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from tests.acceptance.snapshot_programs import QUICK, Prefix, in_worlds, snapshots
from tests.acceptance.world import BUCKET, JOB, World
from tests.support.backends import Server, rclone
from tests.support.worker import heeler

# Tells what it found, saves one step, ends.
STEP = (
    "cat $CHECKPOINT_DIR/state > $W/found-$HEELER_JOB_ID-$HEELER_ATTEMPT 2>/dev/null; echo x >> $W/runs\n"
    "echo $HEELER_JOB_ID $HEELER_ATTEMPT > $CHECKPOINT_DIR/state"
)

# The same with two generations, and then it waits for its worker's death.
TWO = (
    "cat $CHECKPOINT_DIR/state > $W/found-$HEELER_ATTEMPT 2>/dev/null; echo x >> $W/runs\n"
    "test $HEELER_ATTEMPT = 1 || exit 0\n"
    "echo 1 > $CHECKPOINT_DIR/state; while ! test -e $W/go; do sleep 0.01; done\n"
    "echo 2 > $CHECKPOINT_DIR/state; sleep 1000"
)


def test_another_jobs_prefix_is_refused_for_good_by_that_jobs_name_and_stays_as_it_was(world: World) -> None:
    sync = snapshots("state", prefix="shared/", local_path="work/{job_id}/ck")
    owner = Prefix(world.storage, prefix="shared/")
    world.submit(world.bash(STEP), "owner", sync=sync)
    with world.worker(**QUICK) as worker:
        world.wait_state("done", "owner")
        before = owner.objects()
        world.submit(world.bash(STEP), "thief", sync=sync)
        record = world.wait_state("failed", "thief")
        worker.wait_for("phase", phase="receive", count=3)
    assert "belongs to job owner" in record.reason or "checkpoints of job owner" in record.reason
    assert f"s3://{BUCKET}/shared/" in record.reason
    assert record.attempts == 1
    assert owner.objects() == before
    assert owner.head()["job_id"] == "owner"
    assert world.told("runs") == "x\n"


@pytest.mark.parametrize("provider", ["rclone", "s3"])
def test_storage_that_ignores_conditions_is_refused_by_name_and_used_when_that_is_asked_for(
    world: World, provider: str
) -> None:
    machine = world.folder / "rclone"
    machine.mkdir()
    with rclone(machine) as backend:
        backend.create(BUCKET)
        server = cast(Server, backend.create.__self__)  # type: ignore[attr-defined]
        settings = {
            **QUICK,
            "HEELER_S3_PROVIDER": provider,
            "AWS_ENDPOINT_URL_S3": server.url,
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
        }
        data = machine / "data" / BUCKET
        world.submit(world.bash(STEP), "refused", sync=snapshots())
        with world.worker(**settings):
            record = world.wait_state("failed", "refused")
        assert f"bucket {BUCKET} does not enforce If-Match" in record.reason
        assert "allow-unfenced" in record.reason
        assert (record.attempts, list(data.rglob("*.json")), list(data.rglob("probe-*"))) == (1, [], [])
        assert not (world.folder / "runs").exists()
        unfenced_works(world, data, settings)


def unfenced_works(world: World, data: Path, settings: dict[str, str]) -> None:
    """With the risk taken, a job is kept, killed, and goes on elsewhere; every status says what it lacks."""
    settings = {**settings, "HEELER_ALLOW_UNFENCED": "1"}
    world.submit(world.bash(TWO), sync=snapshots(), heartbeat_interval=0.5)
    with world.worker("--control", "127.0.0.1:0", **settings) as first:
        first.wait_for("committed")
        environment = world.environment(HEELER_STATE_DIR=str(world.folder / "state-a"))
        said = heeler("status", env=environment).stdout
        assert "unfenced  this storage can't keep" in said
        assert first.find("unfenced", bucket=BUCKET)
        world.tell("go")
        first.wait_for("committed", generation=2)
        first.process.kill()
        first.wait()
    with world.worker(name="b", machine="other", **settings):
        world.wait_state("done")
    assert world.told("found-2") == "2\n"
    head = json.loads((data / "ck" / JOB / ".heeler" / "head.json").read_text())
    assert (head["status"], head["epoch"]) == ("complete", 2)


def killed_after_two_generations(world: World) -> Prefix:
    """A job with two generations of one file, its worker dead."""
    prefix = Prefix(world.storage)
    world.submit(world.bash(TWO), sync=snapshots(), heartbeat_interval=0.5)
    with world.worker(**QUICK) as worker:
        worker.wait_for("committed")
        world.tell("go")
        worker.wait_for("committed", generation=2)
        worker.process.kill()
        worker.wait()
    return prefix


def test_a_head_that_cannot_be_read_fails_the_job_for_good_names_the_repair_and_never_starts_from_zero(
    tmp_path: Path,
) -> None:
    in_worlds(tmp_path, {str(damage): damage for damage in (b"{", b"", b"[]", b'{"format": 1}', None)}, head_damaged)


def head_damaged(world: World, damage: bytes | None) -> None:
    prefix = killed_after_two_generations(world)
    if damage is None:
        world.storage.delete(BUCKET, prefix.head_key)
    else:
        world.storage.put(BUCKET, prefix.head_key, damage)
    before = prefix.objects()
    with world.worker(name="b", machine="other", **QUICK) as second:
        record = world.wait_state("failed")
        second.wait_for("phase", phase="receive", count=2)
    assert f"heeler sync repair s3://{BUCKET}/{prefix.prefix}" in record.reason
    assert record.attempts == 2
    assert prefix.objects() == before
    assert world.told("runs") == "x\n"


def test_a_head_of_a_later_format_is_refused_and_left_as_it_is(world: World) -> None:
    prefix = killed_after_two_generations(world)
    later = {**prefix.head(), "format": 1000}
    world.storage.put(BUCKET, prefix.head_key, json.dumps(later).encode())
    before = prefix.objects()
    with world.worker(name="b", machine="other", **QUICK) as second:
        fault = second.wait_for("restore_failed")
        second.wait_for("job_settled")
    assert "1000" in fault["error"]
    assert prefix.objects() == before
    assert world.told("runs") == "x\n"


def test_a_damaged_generation_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    damages = [(what, how) for what in ("pack", "manifest") for how in ("a byte changed", "cut short", "gone")]
    in_worlds(tmp_path, {" ".join(damage): damage for damage in damages}, generation_damaged)


def generation_damaged(world: World, damage: tuple[str, str]) -> None:
    what, how = damage
    prefix = killed_after_two_generations(world)
    newest = prefix.head()["kept"][-1]
    key = f"{prefix.own}manifests/2.{newest['manifest']}.json.zst"
    if what == "pack":
        assert len(prefix.packs()) == 2
        used = {pack for pack in prefix.packs() if b"2\n" in world.storage.objects(BUCKET)[pack]}
        (key,) = used
    hurt(world, key, how)
    with world.worker(name="b", machine="other", **QUICK) as second:
        damaged = second.wait_for("generation_damaged")
        world.wait_state("done")
        assert second.wait_for("folder_restored")["generation"] == 1
    assert damaged["generation"] == 2
    assert key in damaged["error"] or newest["manifest"] in damaged["error"]
    assert world.told("found-2") == "1\n"
    assert prefix.head()["kept"][0]["generation"] == 1
    assert world.job().failures == 0


def hurt(world: World, key: str, how: str) -> None:
    """Damage one object."""
    data = world.storage.objects(BUCKET)[key]
    if how == "gone":
        world.storage.delete(BUCKET, key)
    elif how == "cut short":
        world.storage.put(BUCKET, key, data[:-1])
    else:
        world.storage.put(BUCKET, key, data[:-1] + bytes([data[-1] ^ 1]))


def test_after_a_damaged_generation_the_next_has_a_new_number_and_is_whole(world: World) -> None:
    prefix = Prefix(world.storage)
    program = world.bash(
        "cat $CHECKPOINT_DIR/state > $W/found-$HEELER_ATTEMPT 2>/dev/null\n"
        "echo $((HEELER_ATTEMPT * 10 + 1)) > $CHECKPOINT_DIR/state; while ! test -e $W/go; do sleep 0.01; done\n"
        "echo $((HEELER_ATTEMPT * 10 + 2)) > $CHECKPOINT_DIR/state\n"
        "test $HEELER_ATTEMPT != 1 || sleep 1000"
    )
    world.submit(program, sync=snapshots(), heartbeat_interval=0.5)
    with world.worker(**QUICK) as first:
        first.wait_for("committed")
        world.tell("go")
        first.wait_for("committed", generation=2)
        first.process.kill()
        first.wait()
    (key,) = (pack for pack in prefix.packs() if b"12\n" in world.storage.objects(BUCKET)[pack])
    hurt(world, key, "a byte changed")
    with world.worker(name="b", machine="other", **QUICK) as second:
        world.wait_state("done")
        assert [event["generation"] for event in second.find("generation_damaged")] == [2]
    assert world.told("found-2") == "11\n"
    assert prefix.generation() >= 3
    assert [kept["generation"] for kept in prefix.head()["kept"]] == [1, 3] or prefix.generation() > 3
    assert prefix.newest() == {"state": b"22\n"}
    prefix.referenced()


def test_when_every_generation_is_damaged_the_job_fails_for_good_and_never_starts_from_zero(world: World) -> None:
    prefix = killed_after_two_generations(world)
    for key in prefix.packs():
        world.storage.delete(BUCKET, key)
    with world.worker(name="b", machine="other", **QUICK):
        record = world.wait_state("failed")
    assert "has no generation that can be restored" in record.reason
    assert world.told("runs") == "x\n"


@pytest.mark.parametrize("older", ["heeler's mirror", "Kelpie"])
def test_plain_keys_of_an_older_worker_are_taken_over_and_kept_as_generations_from_then_on(
    world: World, older: str
) -> None:
    prefix = Prefix(world.storage)
    program = world.bash(
        "(cd $CHECKPOINT_DIR && cat state deep/er/more) > $W/found-$HEELER_ATTEMPT 2>/dev/null\n"
        "echo $HEELER_ATTEMPT > $CHECKPOINT_DIR/state; touch $W/wrote-$HEELER_ATTEMPT\n"
        "test $HEELER_ATTEMPT != 3 || exit 0; sleep 1000"
    )
    if older == "Kelpie":
        world.storage.put(BUCKET, f"{prefix.prefix}state", b"0\n")
        world.storage.put(BUCKET, f"{prefix.prefix}deep/er/more", b"more\n")
        world.submit(program, sync=snapshots(), heartbeat_interval=0.5)
    else:
        queue = world.folder / "queue-old"
        sync = {"during": [{"bucket": BUCKET, "prefix": prefix.prefix, "local_path": "work/old"}]}
        text = (
            "mkdir -p $CHECKPOINT_DIR/deep/er; echo 0 > $CHECKPOINT_DIR/state; echo more > $CHECKPOINT_DIR/deep/er/more"
        )
        document = {"id": JOB, "command": "bash", "arguments": ["-c", text], "sync": sync}
        said = heeler("submit", "--source", f"local:{queue}", "-", stdin=json.dumps(document))
        assert said.returncode == 0, said
        with world.worker("--source", f"local:{queue}", "--max-jobs", "1", name="old", machine="old") as old:
            assert old.wait() == 0
        world.submit(program, sync=snapshots(), heartbeat_interval=0.5)
    plain = {key: data for key, data in prefix.objects().items() if "/.heeler/" not in key}
    assert plain == {f"{prefix.prefix}state": b"0\n", f"{prefix.prefix}deep/er/more": b"more\n"}
    for life in (1, 2):
        with world.worker(name=f"b{life}", machine=f"machine-{life}", **QUICK) as worker:
            worker.wait_for("committed")
            worker.process.kill()
            worker.wait()
    with world.worker(name="c", machine="third", **QUICK):
        world.wait_state("done")
    assert [world.told(f"found-{attempt}") for attempt in (1, 2, 3)] == ["0\nmore\n", "1\nmore\n", "2\nmore\n"]
    assert prefix.newest() == {"state": b"3\n", "deep/er/more": b"more\n"}
    # They are somebody's: neither changed nor deleted.
    assert {key: data for key, data in prefix.objects().items() if "/.heeler/" not in key} == plain


def test_settings_alone_give_a_job_that_names_no_sync_its_generations(world: World) -> None:
    prefix = Prefix(world.storage)
    settings = {
        **QUICK,
        "HEELER_CHECKPOINTS": f"s3://{BUCKET}/ck/{{job_id}}/",
        "HEELER_CHECKPOINT_READY": "*/done",
        "HEELER_KEEP_GENERATIONS": "3",
    }
    program = world.bash(
        "ls $CHECKPOINT_DIR > $W/found-$HEELER_ATTEMPT; test $HEELER_ATTEMPT = 1 || exit 0\n"
        "for step in 1 2 3 4; do mkdir $CHECKPOINT_DIR/$step; echo $step > $CHECKPOINT_DIR/$step/state\n"
        "  touch $CHECKPOINT_DIR/$step/done; while ! test -e $W/go-$step; do sleep 0.01; done; done\n"
        "mkdir $CHECKPOINT_DIR/5; touch $W/half; sleep 1000"
    )
    world.submit(program, heartbeat_interval=0.5)
    with world.worker(CHECKPOINT_DIR=str(world.folder / "ck-1"), **settings) as first:
        for step in (1, 2, 3, 4):
            first.wait_for("committed", generation=step)
            world.tell(f"go-{step}")
        world.told("half")
        first.process.kill()
        first.wait()
    assert [kept["generation"] for kept in prefix.head()["kept"]] == [2, 3, 4]
    with world.worker(name="b", CHECKPOINT_DIR=str(world.folder / "ck-2"), **settings):
        world.wait_state("done")
    assert world.told("found-2").split() == ["1", "2", "3", "4"]
