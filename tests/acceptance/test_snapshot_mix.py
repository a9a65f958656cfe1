"""FAULTS.md, Kelpie 5: a checkpoint of several files, killed between them, is never restored as a mix of two steps."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.snapshot_programs import Prefix, own_world, saver, snapshots, step_of
from tests.acceptance.world import World, eventually
from tests.support.s3 import S3Server
from tests.support.worker import Worker

LAYOUTS = ("overwritten", "renamed", "folders", "rotation")
SEEDS = 20
AT_ONCE = 4
QUIET = 1.2


@dataclass(frozen=True)
class Story:
    """A job that is killed again and again while it saves."""

    seed: int
    layout: str
    names: tuple[str, ...]
    gap: float
    rest: float
    kills: int
    ready: bool

    @property
    def job_id(self) -> str:
        return f"job-{self.seed}"


def stories(seed: int) -> list[Story]:
    rng = random.Random(seed)
    found = []
    for number in range(SEEDS):
        long = number % 7 == 6
        gap = rng.uniform(1, 5) if long else rng.choice([0.0, 0.002, 0.02, 0.1, 0.4])
        names = (*"ABCD"[: 2 if long else rng.randint(2, 4)], "done")
        kills = 1 if long else 2
        found.append(Story(number, LAYOUTS[number % 4], names, gap, rng.uniform(0.2, 1.5), kills, ready=True))
    return found


def live(story: Story, folder: Path, storage: S3Server, **settings: str) -> str:
    """Kill workers of one job, each time on another machine; what became of it, for people."""
    rng = random.Random(f"kills {story.seed}")
    ready = {"overwritten": "done", "renamed": "done"}.get(story.layout, "*/done") if story.ready else None
    steps = []
    with own_world(folder, storage) as world:
        prefix = Prefix(storage, story.job_id)
        program = saver(world, story.layout, story.names, gap=story.gap, rest=story.rest, seed=story.seed)
        world.submit(program, story.job_id, sync=snapshots(ready), heartbeat_interval=0.3)
        for life in range(story.kills + 1):
            with world.worker(name=str(life), machine=f"machine-{life}", **settings) as worker:
                attempt = worker.wait_for("job_received", timeout=60)["attempt"]
                found = json.loads(world.told(f"found-{attempt}", 60))
                steps.append(step_of(found, story.layout, story.names))
                in_storage = {path: data.decode() for path, data in prefix.restored_by(worker).items()}
                assert found == in_storage, (story, sorted(found), sorted(in_storage))
                if life < story.kills:
                    kill_between_files(world, worker, story, attempt, rng)
        committed = {number: step_of(files, story.layout, story.names) for number, files in prefix.every().items()}
        prefix.referenced()
    assert steps == sorted(steps), steps
    assert steps[-1] > 0
    assert list(committed.values()) == sorted(committed.values()), committed
    return f"{story}: found {steps}, committed {committed}"


def kill_between_files(world: World, worker: Worker, story: Story, attempt: int, rng: random.Random) -> None:
    """Once it has committed something, and right after a file of the program's, or a random moment later."""
    worker.wait_for("committed", count=rng.choice([1, 1, 2]) if story.ready else 2, timeout=60)
    said = world.folder / f"said-{attempt}"
    before = len(said.read_text().splitlines())
    name = rng.choice(story.names)
    eventually(lambda: any(line.endswith(name) for line in said.read_text().splitlines()[before:]), name, 60)
    time.sleep(rng.uniform(0, story.gap or 0.01))
    worker.process.kill()
    worker.wait()


def test_with_ready_a_checkpoint_of_several_files_is_restored_whole_wherever_the_worker_was_killed(
    tmp_path: Path, storage: S3Server
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        lives = [pool.submit(live, story, tmp_path / story.job_id, storage) for story in stories(seed)]
        for each in lives:
            print(each.result())


def test_by_quiet_gaps_well_below_the_quiet_time_never_mix(tmp_path: Path, storage: S3Server) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    told = [
        Story(number, layout, ("A", "B", "C"), rng.choice([0.02, 0.2, 0.4]), rest=4.0, kills=1, ready=False)
        for number, layout in enumerate((*LAYOUTS, *LAYOUTS[:1]))
    ]
    settings = {"HEELER_CHECKPOINT_QUIET": f"{QUIET}", "HEELER_COMMIT_INTERVAL": "0"}
    with ThreadPoolExecutor(len(told)) as pool:
        lives = [pool.submit(live, story, tmp_path / story.job_id, storage, **settings) for story in told]
        for story, each in zip(told, lives, strict=True):
            try:
                print(each.result())
            except AssertionError:
                gaps = [float(path.read_text()) for path in (tmp_path / story.job_id).glob("longest-*")]
                print(f"{story}: gaps up to {max(gaps)} s")
                if max(gaps) < QUIET * 0.9:  # else the machine was too busy for the program to keep its promise
                    raise


def test_by_quiet_a_gap_longer_than_the_quiet_time_is_taken_for_the_end_of_a_checkpoint(world: World) -> None:
    # Why a checkpoint of several files needs `ready`: without it a generation may hold a new A beside an old B.
    world.submit(saver(world, "overwritten", ("A", "B"), gap=2.0, rest=1.0, seed=0), sync=snapshots())
    prefix = Prefix(world.storage)

    def mixed() -> bool:
        found = [{int(text.split()[0]) for text in files.values()} for files in prefix.every().values()]
        return any(len(steps) == 2 for steps in found)

    with world.worker(HEELER_CHECKPOINT_QUIET="0.3", HEELER_COMMIT_INTERVAL="0"):
        eventually(mixed, "a generation of two steps", 60)


def test_by_quiet_a_file_that_is_held_open_and_half_written_hinders_a_generation(world: World) -> None:
    program = world.python(
        "held = (Path(env['CHECKPOINT_DIR']) / 'held').open('w')\n"
        "held.write('half'); held.flush(); time.sleep(3)\n"
        "held.write(' and half'); held.close(); tell('over'); await_('never')\n"
    )
    world.submit(program, sync=snapshots())
    prefix = Prefix(world.storage)
    with world.worker(HEELER_CHECKPOINT_QUIET="0.3", HEELER_COMMIT_INTERVAL="0"):
        prefix.wait_generation(1)
    assert (world.folder / "over").exists()
    assert list(prefix.every().values()) == [{"held": b"half and half"}]


def test_by_quiet_a_program_that_saves_more_often_than_commits_may_come_is_committed_again_and_again(
    world: World,
) -> None:
    # Saves 2 s apart are no gaps inside a checkpoint, although one of them or two come before the next commit may.
    program = world.bash(
        "for step in $(seq 100000); do echo $step > $CHECKPOINT_DIR/state; echo $step > $W/step; sleep 2; done"
    )
    world.submit(program, sync=snapshots())
    prefix = Prefix(world.storage)
    with world.worker(HEELER_CHECKPOINT_QUIET="0.4", HEELER_COMMIT_INTERVAL="3"):
        prefix.wait_generation(4, timeout=30)
