"""The runtime is killed and started again on the same machine: it goes on at once, and fetches only what differs."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.acceptance.snapshot_programs import Prefix, snapshots
from tests.acceptance.world import JOB, MIB, World
from tests.support.worker import Worker

LEASE = 300.0
FILES = 8
FILE_BYTES = 3 * MIB

# The first attempt saves a step of several large files, `done` last, then writes what belongs to no step. The second
# tells what it found.
PROGRAM = (
    "import hashlib, json\n"
    "folder = Path(env['CHECKPOINT_DIR'])\n"
    "found = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()\n"
    "         for path in folder.rglob('*') if path.is_file() and '.heeler' not in path.relative_to(folder).parts}\n"
    "tell('found-' + env['HEELER_ATTEMPT'], json.dumps(found))\n"
    "if env['HEELER_ATTEMPT'] == '1':\n"
    f"    for number in range({FILES}): (folder / f'part-{{number}}').write_bytes(os.urandom({FILE_BYTES}))\n"
    "    (folder / 'done').write_text('1')\n"
    "    await_('saved')\n"
    "    (folder / 'half-of-step-2').write_text('half')\n"
    "    (folder / 'part-0').write_bytes(b'new')\n"
    "    tell('newer'); await_('never')\n"
    "(folder / 'done').write_text('2')\n"
)


def killed_after_one_generation(world: World) -> tuple[Prefix, dict[str, bytes]]:
    """Run the job's first attempt up to a generation and some newer files, then kill the runtime."""
    prefix = Prefix(world.storage)
    world.submit(world.python(PROGRAM), sync=snapshots("done"), heartbeat_interval=LEASE / 3)
    with world.worker() as first:
        first.wait_for("committed")
        world.tell("saved")
        world.told("newer")
        first.process.kill()
        first.wait()
    files = prefix.files(1)
    assert len(files) == FILES + 1
    world.storage.stats.reset()
    return prefix, files


def goes_on_at_once(world: World, files: dict[str, bytes]) -> Worker:
    """Start the runtime again where it was: the job is done by its second attempt, from just these files."""
    with world.worker() as second:
        # The old lease lapses in minutes.
        assert second.wait_for("job_received", timeout=30)["attempt"] == 2
        record = world.wait_state("done", timeout=60)
    assert (record.attempts, record.failures, record.interruptions) == (2, 0, 1)
    import hashlib
    import json

    expected = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    assert json.loads(world.told("found-2")) == expected
    return second


def test_it_takes_its_job_up_at_once_and_downloads_only_the_file_that_was_changed_since(world: World) -> None:
    prefix, files = killed_after_one_generation(world)
    second = goes_on_at_once(world, files)
    restored = second.wait_for("folder_restored")
    assert (restored["generation"], restored["kept"], restored["downloaded"]) == (1, FILES, 1)
    # The one that the program had begun to overwrite; all else is on this disk.
    assert prefix.pack_reads() <= FILE_BYTES
    assert second.wait_for("committed")["generation"] == 2
    aside = world.path("ck/.heeler/aside")
    moved = {path.name for path in aside.rglob("*") if path.is_file()}
    assert "half-of-step-2" in moved
    assert not world.path("ck/half-of-step-2").exists()


def test_it_downloads_not_a_single_pack_when_nothing_was_changed(world: World) -> None:
    prefix, files = killed_after_one_generation(world)
    world.path("ck/part-0").write_bytes(files["part-0"])
    second = goes_on_at_once(world, files)
    assert prefix.pack_reads() == 0
    assert not [read for read in world.storage.stats.find("GetObject") if "/packs/" in read.key]
    assert second.wait_for("folder_restored")["kept"] == FILES + 1


@pytest.mark.parametrize("index", ["kept", "lost"])
def test_with_half_of_its_files_damaged_it_fetches_only_what_differs(world: World, index: str) -> None:
    prefix, files = killed_after_one_generation(world)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    damage(world.path("ck"), files, rng)
    if index == "lost":  # then it reads what is on disk
        for path in (world.folder / "state-a").glob("index.db*"):
            path.unlink()
    goes_on_at_once(world, files)
    # One chunk of 1 MiB of each of four files, and with it perhaps a few neighbours' bytes.
    assert MIB <= prefix.pack_reads() <= 5 * MIB
    assert not list(world.path("ck/.heeler/incoming").glob("*"))


def damage(folder: Path, files: dict[str, bytes], rng: random.Random) -> None:
    """One byte of half of the large files, their times as they were."""
    (folder / "part-0").write_bytes(files["part-0"])
    for number in rng.sample(range(FILES), FILES // 2):
        path = folder / f"part-{number}"
        before = path.stat()
        with path.open("r+b") as file:
            at = rng.randrange(FILE_BYTES)
            file.seek(at)
            file.write(bytes([files[path.name][at] ^ 1]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_on_the_same_machine_after_its_state_was_lost_it_waits_for_the_lease_and_still_downloads_nothing(
    world: World,
) -> None:
    prefix = Prefix(world.storage)
    world.submit(world.python(PROGRAM), sync=snapshots("done"), heartbeat_interval=1)
    with world.worker() as first:
        first.wait_for("committed")
        first.process.kill()
        first.wait()
    world.storage.stats.reset()
    with world.worker(name="new") as second:
        assert second.wait_for("job_received")["attempt"] == 2
        world.wait_state("done", timeout=60)
    assert prefix.pack_reads() == 0
    assert world.job(JOB).interruptions == 1
