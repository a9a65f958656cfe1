"""Storage that fails while a job's generations are committed: the job ends done, and its head is complete and whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.acceptance.snapshot_programs import QUICK, Prefix, in_worlds, snapshots
from tests.acceptance.world import World
from tests.support.proxy import FaultProxy
from tests.support.s3 import Action, Answer, Cut, Stall

# Saves steps of a few files; each ends with `done`. All of them fit into 256 KiB: a larger pack that has no answer is
# waited for nine minutes (README, limits), whichever it is.
STEPS = """
folder, rng = Path(env["CHECKPOINT_DIR"]), __import__("random").Random(1)
for step in range(1, 5):
    (folder / f"{step}").mkdir()
    for name in ("a", "b", "done"):
        (folder / f"{step}" / name).write_bytes(f"{step} {name} ".encode() + rng.randbytes(20_000))
    time.sleep(0.5)
"""


def expected() -> dict[str, bytes]:
    """What it leaves."""
    rng = random.Random(1)
    return {
        f"{step}/{name}": f"{step} {name} ".encode() + rng.randbytes(20_000)
        for step in range(1, 5)
        for name in ("a", "b", "done")
    }


def ends_well(world: World, prefix: Prefix, **settings: str) -> None:
    """Run the job to its end: done at the first attempt, its head complete, nothing missing, nothing left over."""
    world.submit(world.python(STEPS), sync=snapshots("*/done"))
    with world.worker(**{**QUICK, **settings}):
        record = world.wait_state("done", timeout=90)
    assert (record.attempts, record.failures) == (1, 0)
    assert (prefix.head()["status"], prefix.head()["result"]) == ("complete", {"exit_code": 0, "signal": None})
    assert prefix.newest() == expected()
    whole_steps_only(prefix)
    prefix.referenced()


def whole_steps_only(prefix: Prefix) -> None:
    """No generation ever held a part of a step."""
    for number, files in prefix.every().items():
        steps = {path.partition("/")[0] for path in files}
        assert files == {path: data for path, data in expected().items() if path.partition("/")[0] in steps}, number


FAULTS: dict[str, Action] = {
    "500": Answer(500, "InternalError"),
    "503": Answer(503, "SlowDown"),
    "500 although it took effect": Answer(500, "InternalError", at="after"),
    "412 although it took effect": Answer(412, "PreconditionFailed", at="after"),
    "reset before": Cut(),
    "reset after it took effect": Cut(at="after"),
    "reset in the body": Cut(at="request_body", after_bytes=100),
    "no answer although it took effect": Stall(at="after"),
}


def test_a_head_whose_writes_fail_in_any_way_is_complete_in_the_end_and_nothing_is_half_committed(
    tmp_path: Path,
) -> None:
    in_worlds(tmp_path, {fault: fault for fault in FAULTS}, writes_of_the_head_fail)


def writes_of_the_head_fail(world: World, fault: str) -> None:
    prefix = Prefix(world.storage)
    if fault.startswith("412"):  # only of a write with a condition that held
        world.storage.faults.add(FAULTS[fault], operation="PutObject", key=prefix.head_key, nth=2, count=2)
    else:
        # The acquire, a commit, and the last one.
        for nth in (1, 3, 6):
            world.storage.faults.add(FAULTS[fault], operation="PutObject", key=prefix.head_key, nth=nth, count=1)
    ends_well(world, prefix, HEELER_S3_TIMEOUT="1")
    generations = [kept["generation"] for kept in prefix.kept().values()]
    assert generations == sorted(set(generations))
    assert {head["epoch"] for head in prefix.heads()} == {1}


@pytest.mark.parametrize("what", ["packs", "manifests"])
def test_packs_and_manifests_that_fail_at_random_are_sent_again(world: World, what: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    prefix = Prefix(world.storage)
    rng = random.Random(seed)
    for fault in FAULTS.values():
        if not isinstance(fault, Answer) or fault.status != 412:
            nth = rng.randint(1, 6)
            world.storage.faults.add(fault, operation="PutObject", key=f"*/{what}/*", nth=nth, count=1)
    ends_well(world, prefix, HEELER_S3_TIMEOUT="1")


def test_storage_that_is_gone_for_a_while_is_waited_for(world: World) -> None:
    prefix = Prefix(world.storage)
    world.submit(world.python(STEPS), sync=snapshots("*/done"), heartbeat_interval=0.5)
    with (
        FaultProxy("127.0.0.1", world.storage.port) as proxy,
        world.worker(**{**QUICK, "AWS_ENDPOINT_URL_S3": proxy.url, "HEELER_S3_TIMEOUT": "1"}) as worker,
    ):
        worker.wait_for("committed")
        proxy.set(refuse=True)
        proxy.reset_connections()
        worker.wait_for("phase", phase="upload")
        worker.wait_until(lambda: worker.find("storage_retried") or worker.find("commit_failed"), "a refusal")
        assert world.job().state == "running"
        assert prefix.head()["status"] == "open"
        proxy.clear()
        record = world.wait_state("done", timeout=90)
    assert (record.attempts, record.failures) == (1, 0)
    assert prefix.newest() == expected()
    whole_steps_only(prefix)


def test_a_slow_link_is_no_fault_and_what_is_committed_is_whole(world: World) -> None:
    prefix = Prefix(world.storage)
    with FaultProxy("127.0.0.1", world.storage.port) as proxy:
        proxy.set(rate=60_000, latency=0.02)
        ends_well(world, prefix, AWS_ENDPOINT_URL_S3=proxy.url)


def test_storage_that_refuses_the_commits_for_good_fails_the_job_and_never_says_done(world: World) -> None:
    prefix = Prefix(world.storage)
    world.storage.faults.add(Answer(403, "AccessDenied"), operation="PutObject", key="*/packs/*")
    world.submit(world.bash("echo 1 > $CHECKPOINT_DIR/state"), sync=snapshots(), max_failures=1)
    with world.worker(**QUICK):
        record = world.wait_state("failed", timeout=60)
    assert "403" in record.reason
    assert prefix.generation() == 0
    assert prefix.head()["status"] == "open"
    # The only copy is on disk.
    assert world.path("ck/state").read_text() == "1\n"


def test_under_r2s_one_write_per_key_and_second_a_job_that_saves_all_the_time_gets_no_429(world: World) -> None:
    prefix = Prefix(world.storage)
    program = world.python(
        "folder = Path(env['CHECKPOINT_DIR'])\n"
        "for step in range(50):\n"
        "    (folder / 'new').write_text(str(step)); (folder / 'new').rename(folder / 'state')\n"
        "    time.sleep(0.15)\n"
    )
    world.submit(program, sync=snapshots("state"))
    with world.worker(**QUICK) as worker:
        world.wait_state("done", timeout=60)
        assert len(worker.find("committed")) >= 4
    assert prefix.newest() == {"state": b"49"}
    assert [record for record in world.storage.stats.find() if record.status == 429] == []


def test_429s_of_another_writer_of_the_same_bucket_are_waited_out(world: World) -> None:
    prefix = Prefix(world.storage)
    world.storage.faults.add(
        Answer(429, "TooManyRequests", retry_after=1), operation="PutObject", probability=0.3, seed=random.randrange(99)
    )
    ends_well(world, prefix)


def test_a_full_disk_of_the_state_folder_or_a_lost_file_index_costs_no_generation(world: World) -> None:
    prefix = Prefix(world.storage)
    (world.folder / "state-a").mkdir()
    (world.folder / "state-a" / "index.db").mkdir()  # it can't be opened
    ends_well(world, prefix)
