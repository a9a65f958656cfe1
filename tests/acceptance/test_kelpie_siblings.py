"""Two workers on one machine, which are one machine to Kelpie's API, and an outage of that for both of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.acceptance.kelpie_world import KelpieWorld
from tests.acceptance.world import eventually
from tests.support.proxy import FaultProxy
from tests.support.worker import Worker

WAITS = "echo run >> $W/runs; touch $W/began; while ! test -e $W/go; do sleep 0.05; done; echo out > $OUTPUT_DIR/o"


@contextmanager
def siblings(kelpie: KelpieWorld) -> Iterator[tuple[Worker, Worker, FaultProxy, str]]:
    """The worker that has the job, its sibling, the link of both to the API, and the job."""
    sync = {"after": kelpie.sync()["after"]}
    job = kelpie.submit(kelpie.bash(WAITS), heartbeat_interval=1, sync=sync)
    others: dict[str, Any] = {
        f"{part}_DIR": str(kelpie.folder / f"other-{part}") for part in ("INPUT", "CHECKPOINT", "OUTPUT")
    }
    with ExitStack() as stack:
        link = stack.enter_context(FaultProxy("127.0.0.1", int(kelpie.server.url.rpartition(":")[2])))
        holder = stack.enter_context(kelpie.worker(name="a", KELPIE_API_URL=link.url))
        kelpie.told("began")
        other = stack.enter_context(kelpie.worker(name="b", KELPIE_API_URL=link.url, **others))
        other.wait_for("started")
        yield holder, other, link, job


@contextmanager
def stopped(worker: Worker) -> Iterator[None]:
    """Frozen, but not its program."""
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker.pid, signal.SIGCONT)


def check_once(kelpie: KelpieWorld, holder: Worker, job: str) -> None:
    """The program went on through all of it, and its result is the job's."""
    renewed = len(kelpie.server.faults.log)
    eventually(lambda: len(kelpie.server.faults.log) > renewed + 20, "both have gone on for a while")
    kelpie.tell("go")
    found = kelpie.wait_status("completed", job)
    assert found["num_failures"] == 0
    assert kelpie.told("runs") == "run\n"
    assert kelpie.events(job).count("completed") == 1
    holder.wait_for("job_settled", job_id=job, outcome="done")
    assert kelpie.keys("job/output/") == {"job/output/o": b"out\n"}
    assert [call.kind for call in kelpie.server.faults.log].count("completed") == 1


@pytest.mark.parametrize("back", ["sibling first", "together"])
def test_an_outage_for_both_workers_of_a_machine_costs_their_job_nothing(kelpie: KelpieWorld, back: str) -> None:
    with siblings(kelpie) as (holder, other, link, job):
        link.set(partition=True)
        holder.wait_for("lease_lapsed")
        time.sleep(3.0)  # then the job may be handed out anew
        if back == "sibling first":
            with stopped(holder):
                link.clear()
                other.wait_for("job_of_sibling", job_id=job)
        else:
            link.clear()
        holder.wait_for("lease_confirmed_again")
        check_once(kelpie, holder, job)
        assert kelpie.events(job).count("started") > (back == "sibling first")
        assert other.find("job_received") == []


def test_a_worker_that_was_stopped_goes_on_with_a_job_that_its_sibling_was_given(kelpie: KelpieWorld) -> None:
    with siblings(kelpie) as (holder, other, _link, job):
        with stopped(holder):
            other.wait_for("job_of_sibling", job_id=job)
        check_once(kelpie, holder, job)
        assert other.find("job_received") == []
