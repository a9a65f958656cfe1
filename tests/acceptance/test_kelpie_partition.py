"""A worker cut off from Kelpie's API, or from storage too, or stopped, for so long that another has its job.

The API fences nobody. With snapshots storage does: the first changes nothing after the second has begun. Under plain
names the first one's changes wait once its lease has lapsed. Either way one result is reported, and it is one worker's.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.acceptance.kelpie_world import KelpieWorld
from tests.acceptance.snapshot_programs import Prefix
from tests.acceptance.world import BUCKET, alive, eventually
from tests.support.proxy import FaultProxy
from tests.support.worker import Worker

INTERVAL = 2
"""Of heartbeats; after two of them the API hands the job out again."""
SETTINGS: dict[str, Any] = {"HEELER_COMMIT_INTERVAL": "0.2"}

# Saves how far it is and who it is in several files, again and again, but for a pause that it is told to make, and
# ends when it is told to, with three outputs.
WHO = (
    "who=$SALAD_MACHINE_ID; echo $$ > $W/new-$who; mv $W/new-$who $W/pid-$who; cd $CHECKPOINT_DIR\n"
    "cat a b > $W/found-$who 2> /dev/null\n"
    "for number in $(seq 100000); do\n"
    "  for name in a b done; do echo $who $number > ../$name.new; mv ../$name.new $name; done; sleep 0.1\n"
    "  while test -e $W/pause-$who; do touch $W/paused-$who; sleep 0.02; done\n"
    "  if test -e $W/finish-$who; then break; fi\n"
    "done\n"
    "for name in 1 2 3; do echo by $who > $OUTPUT_DIR/$name; done; touch $W/ended-$who"
)


def writers(kelpie: KelpieWorld, key: str) -> list[str]:
    """Whose each state was that an object ever had."""
    versions = kelpie.storage.history(BUCKET, key)
    assert None not in versions
    return [version.decode().split()[-2] for version in versions if version]


def no_longer_by_one(found: list[str]) -> None:
    """Nothing is by the first worker after something was by the second."""
    assert "two" in found, found
    assert found == sorted(found), found


def generations(prefix: Prefix) -> list[str]:
    """Whose each generation was, in order; each is all of one save."""
    found = []
    for _, files in sorted(prefix.every().items()):
        assert set(files) == {"a", "b", "done"}, files
        assert len(set(files.values())) == 1, f"a mixture: {files}"
        found.append(files["a"].decode().split()[0])
    return found


@contextmanager
def machine_one(kelpie: KelpieWorld) -> Iterator[tuple[Worker, FaultProxy, FaultProxy]]:
    """The first worker, and its links to the API and to storage."""
    with ExitStack() as stack:
        port = int(kelpie.server.url.rpartition(":")[2])
        api = stack.enter_context(FaultProxy("127.0.0.1", port))
        storage = stack.enter_context(FaultProxy("127.0.0.1", kelpie.storage.port))
        environment: dict[str, Any] = {**SETTINGS, "KELPIE_API_URL": api.url, "AWS_ENDPOINT_URL_S3": storage.url}
        yield stack.enter_context(kelpie.worker(**environment)), api, storage


def check_once(kelpie: KelpieWorld, job: str, first: Worker) -> None:
    """The job was done once, by the second; the first has reported nothing, and takes jobs again."""
    found = kelpie.wait_status("completed", job)
    assert (found["machine_id"], found["num_failures"]) == ("two", 0)
    assert kelpie.events(job) == ["created", "started", "started", "completed"]
    assert [call.kind for call in kelpie.server.faults.log].count("completed") == 1
    assert [event["outcome"] for event in first.find("job_settled", job_id=job)] == ["lost"]
    assert first.process.poll() is None
    outputs = {key: data for key, data in kelpie.keys().items() if key.startswith("job/output/")}
    assert outputs == {f"job/output/{name}": b"by two\n" for name in (1, 2, 3)}
    assert all(kelpie.storage.history(BUCKET, key) == [b"by two\n"] for key in outputs)


@pytest.mark.parametrize("storage_too", [False, True], ids=["from the api", "from storage too"])
def test_with_snapshots_a_worker_that_is_cut_off_changes_nothing_after_another_has_its_job(
    kelpie: KelpieWorld, storage_too: bool
) -> None:
    prefix = Prefix(kelpie.storage, "", "job/checkpoint/")
    job = kelpie.submit(kelpie.bash(WHO), heartbeat_interval=INTERVAL, **kelpie.snapshots("done"))
    with machine_one(kelpie) as (first, api, storage):
        first.wait_for("committed")
        pid = kelpie.told_pid("pid-one")
        api.set(partition=True)
        if storage_too:
            storage.set(partition=True)
        with kelpie.worker(machine="two", **SETTINGS) as second:
            second.wait_for("job_received", job_id=job)
            second.wait_for("committed")
            api.clear()
            storage.clear()
            first.wait_for("job_settled", job_id=job, outcome="lost")
            assert not alive(pid)
            second.wait_for("committed", count=len(second.find("committed")) + 1)
            kelpie.tell("finish-two")
            check_once(kelpie, job, first)
            begun = prefix.restored_by(second)
    assert kelpie.told("found-two").encode() == begun["a"] + begun["b"]
    assert begun["a"].startswith(b"one ")
    no_longer_by_one(generations(prefix))


def test_with_snapshots_a_worker_that_was_stopped_changes_nothing_after_another_has_its_job(
    kelpie: KelpieWorld,
) -> None:
    prefix = Prefix(kelpie.storage, "", "job/checkpoint/")
    job = kelpie.submit(kelpie.bash(WHO), heartbeat_interval=INTERVAL, **kelpie.snapshots("done"))
    with kelpie.worker(**SETTINGS) as first:
        first.wait_for("committed")
        pid = kelpie.told_pid("pid-one")
        first.signal(signal.SIGSTOP)
        with kelpie.worker(machine="two", **SETTINGS) as second:
            second.wait_for("committed")
            assert alive(pid)
            kelpie.tell("finish-one")  # its program ends while nobody looks
            kelpie.told("ended-one")
            first.signal(signal.SIGCONT)
            first.wait_for("job_settled", job_id=job, outcome="lost")
            second.wait_for("committed", count=len(second.find("committed")) + 1)
            kelpie.tell("finish-two")
            check_once(kelpie, job, first)
    no_longer_by_one(generations(prefix))


@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "ends"])
def test_under_plain_names_a_worker_that_is_cut_off_waits_with_its_changes_and_reports_nothing(
    kelpie: KelpieWorld, ends: bool
) -> None:
    job = kelpie.submit(kelpie.bash(WHO), heartbeat_interval=INTERVAL, **kelpie.folders())
    with machine_one(kelpie) as (first, api, _storage):
        eventually(lambda: len(writers(kelpie, "job/checkpoint/done")) >= 2, "a checkpoint is stored")
        pid = kelpie.told_pid("pid-one")
        api.set(partition=True)
        first.wait_for("lease_lapsed")
        if ends:
            kelpie.tell("finish-one")
            kelpie.told("ended-one")
        with kelpie.worker(machine="two", **SETTINGS):
            eventually(lambda: writers(kelpie, "job/checkpoint/done").count("two") >= 2, "the second goes on")
            assert alive(pid) != ends
            api.clear()
            first.wait_for("job_settled", job_id=job, outcome="lost")
            assert not alive(pid)
            now = len(writers(kelpie, "job/checkpoint/done"))
            eventually(lambda: len(writers(kelpie, "job/checkpoint/done")) > now, "the second still goes on")
            kelpie.tell("finish-two")
            check_once(kelpie, job, first)
    for name in ("a", "b", "done"):
        no_longer_by_one(writers(kelpie, f"job/checkpoint/{name}"))
    assert not [key for key in kelpie.keys("") if ".heeler" in key]


def test_under_plain_names_a_worker_that_was_stopped_waits_with_its_changes_and_reports_nothing(
    kelpie: KelpieWorld,
) -> None:
    job = kelpie.submit(kelpie.bash(WHO), heartbeat_interval=INTERVAL, **kelpie.folders())
    with kelpie.worker() as first:
        kelpie.tell("pause-one")
        kelpie.told("paused-one")
        saved = {
            f"job/checkpoint/{name}": kelpie.place(f"checkpoint/{name}").read_bytes() for name in ("a", "b", "done")
        }
        # What is on its way when the worker is stopped may take effect at any time: plain names are not fenced.
        eventually(lambda: kelpie.keys() == saved, "the checkpoint is stored")
        pid = kelpie.told_pid("pid-one")
        first.signal(signal.SIGSTOP)
        (kelpie.folder / "pause-one").unlink()
        with kelpie.worker(machine="two"):
            eventually(lambda: writers(kelpie, "job/checkpoint/done").count("two") >= 2, "the second goes on")
            assert alive(pid)
            first.signal(signal.SIGCONT)
            first.wait_for("job_settled", job_id=job, outcome="lost")
            assert not alive(pid)
            kelpie.tell("finish-two")
            check_once(kelpie, job, first)
    for name in ("a", "b", "done"):
        no_longer_by_one(writers(kelpie, f"job/checkpoint/{name}"))
