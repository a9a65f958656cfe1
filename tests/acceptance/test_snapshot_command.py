"""`heeler checkpoint` and POST /v1/checkpoint: they return when the generation is durable, or say why there is none."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tests.acceptance.snapshot_programs import NEVER, Prefix, snapshots
from tests.acceptance.world import BUCKET, World
from tests.support.s3 import Answer, Stall
from tests.support.worker import Worker, heeler

T = TypeVar("T")

CONTROL = ("--control", "127.0.0.1:0")

# Changes two files for ever, in place, and says so.
BUSY = (
    "import os, time\n"
    "folder = Path(env['CHECKPOINT_DIR'])\n"
    "for name in ('calm', 'busy'): (folder / name).write_text('0')\n"
    "tell('runs')\n"
    "number = 0\n"
    "while not (W / 'finish').exists():\n"
    "    number += 1\n"
    "    (folder / 'busy').write_text(str(number) * (number % 7 + 1))\n"
)


def post(worker: Worker) -> tuple[int, Any]:
    """POST /v1/checkpoint: status and body."""
    url = worker.wait_for("control_ready")["url"]
    try:
        request = urllib.request.Request(f"{url}/v1/checkpoint", method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_from_inside_the_program_it_returns_when_the_generation_is_durable_and_prints_its_number(world: World) -> None:
    prefix = Prefix(world.storage)
    # The first attempt kills its worker the moment that the second call has returned.
    program = world.bash(
        "cat $CHECKPOINT_DIR/* > $W/found-$HEELER_ATTEMPT 2>/dev/null\n"
        "test $HEELER_ATTEMPT = 1 || exit 0\n"
        "for step in 1 2; do\n"
        "  for name in a b c; do echo $step > $CHECKPOINT_DIR/$name; done\n"
        f"  {sys.executable} -m heeler checkpoint >> $W/printed 2>&1 || echo failed >> $W/printed\n"
        "done\n"
        "kill -9 $PPID; sleep 1000"
    )
    world.submit(program, sync=snapshots(), heartbeat_interval=0.5)
    with world.worker(*CONTROL, **NEVER) as first:
        assert first.wait(60) == -9
    assert world.told("printed") == "generation 1: 3 files, 6 bytes\ngeneration 2: 3 files, 6 bytes\n"
    with world.worker(*CONTROL, name="b", machine="other", **NEVER):
        world.wait_state("done")
    assert world.told("found-2") == "2\n2\n2\n"
    assert prefix.generation() == 2
    assert prefix.files(1) == dict.fromkeys("abc", b"1\n")


def test_from_outside_it_returns_only_after_storage_has_taken_the_head(world: World) -> None:
    prefix = Prefix(world.storage)
    environment = world.environment(HEELER_STATE_DIR=str(world.folder / "state-a"))
    world.submit(
        world.bash("echo 1 > $CHECKPOINT_DIR/state; touch $W/runs; while ! test -e $W/finish; do sleep 0.01; done"),
        sync=snapshots(),
    )
    with world.worker(*CONTROL, **NEVER) as worker:
        world.told("runs")
        hold = world.storage.faults.add(Stall(), operation="PutObject", key="*/head.json", count=1)
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(heeler, "checkpoint", "--json", env=environment)
            hold.wait_held(timeout=60)
            assert not asked.done()
            assert prefix.generation() == 0
            world.storage.faults.remove(hold)
            said = asked.result()
        assert said.returncode == 0, said
        assert json.loads(said.stdout) == {"generations": [{"number": 1, "files": 1, "bytes": 2}]}
        assert prefix.newest() == {"state": b"1\n"}
        # Nothing has changed since: the same generation is named again, and none is made.
        again = heeler("checkpoint", env=environment)
        assert (again.returncode, again.stdout) == (0, "generation 1: 1 files, 2 bytes\n"), again
        assert post(worker) == (200, {"generations": [{"number": 1, "files": 1, "bytes": 2}]})
        status = heeler("status", env=environment).stdout
        assert "kept      generation 1" in status
        assert "1 files, 2 bytes" in status
        world.tell("finish")
        world.wait_state("done")
    assert prefix.generation() == 1


def first(attempt: Callable[[], T], wanted: Callable[[T], bool]) -> T:
    """What the first of twenty attempts gives that is `wanted`; what the last gives if none is."""
    for _ in range(20):
        found = attempt()
        if wanted(found):
            break
    return found


def test_while_the_tree_is_being_changed_it_is_refused_by_the_name_of_a_file(world: World) -> None:
    environment = world.environment(HEELER_STATE_DIR=str(world.folder / "state-a"))
    world.submit(world.python(BUSY), sync=snapshots())
    with world.worker(*CONTROL, **NEVER) as worker:
        world.told("runs")
        # On a machine with other work the program may stand still for longer than a tick: then there is an instant.
        said = first(lambda: heeler("checkpoint", env=environment), lambda said: said.returncode != 0)
        assert (said.returncode, said.stdout) == (64, ""), said
        assert said.stderr.startswith("heeler: no checkpoint was taken: busy "), said
        status, body = first(lambda: post(worker), lambda answer: answer[0] != 200)
        assert status == 409
        assert body["error"].startswith("busy ")
        # It did no harm: once the tree is quiet it can be taken.
        world.tell("finish")
        world.wait_state("done")
    assert set(Prefix(world.storage).newest()) == {"busy", "calm"}


def test_without_a_job_or_a_runtime_it_says_so(world: World) -> None:
    environment = world.environment(HEELER_STATE_DIR=str(world.folder / "state-a"))
    said = heeler("checkpoint", env=environment)
    assert (said.returncode, said.stdout) == (69, ""), said
    assert "no runtime answers" in said.stderr
    with world.worker(*CONTROL) as worker:
        worker.wait_for("phase", phase="receive")
        assert post(worker) == (409, {"error": "no job is running here now"})
        said = heeler("checkpoint", env=environment)
        assert (said.returncode, said.stdout) == (64, ""), said
        assert said.stderr == "heeler: no checkpoint was taken: no job is running here now\n"


def test_when_storage_refuses_it_fails_and_names_the_storage_while_the_job_goes_on(world: World) -> None:
    environment = world.environment(HEELER_STATE_DIR=str(world.folder / "state-a"))
    world.submit(
        world.bash("echo 1 > $CHECKPOINT_DIR/state; touch $W/runs; while ! test -e $W/finish; do sleep 0.01; done"),
        sync=snapshots(),
    )
    with world.worker(*CONTROL, **NEVER) as worker:
        world.told("runs")
        world.storage.faults.add(Answer(403, "AccessDenied"), operation="PutObject", key="*/packs/*")
        said = heeler("checkpoint", env=environment)
        assert (said.returncode, said.stdout) == (69, ""), said
        assert f"s3://{BUCKET}/ck/" in said.stderr
        assert "403" in said.stderr
        status, body = post(worker)
        assert status == 503
        assert "403" in body["error"]
        world.storage.faults.clear()
        assert post(worker)[0] == 200
        world.tell("finish")
        world.wait_state("done")
    assert Prefix(world.storage).newest() == {"state": b"1\n"}


def test_a_job_without_snapshot_folders_has_nothing_to_keep(world: World) -> None:
    world.submit(world.bash("touch $W/runs; while ! test -e $W/finish; do sleep 0.01; done"), sync=world.checkpoints())
    with world.worker(*CONTROL) as worker:
        world.told("runs")
        assert post(worker) == (200, {"generations": []})
        world.tell("finish")
        world.wait_state("done")
