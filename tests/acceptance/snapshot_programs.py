"""What the tests of snapshots share: sync entries, a program that saves several files, and a reader of generations."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from heeler_sync.snapshot.chunks import unpack_chunk
from heeler_sync.snapshot.manifest import Manifest, decode
from tests.acceptance.world import BUCKET, JOB, World, eventually
from tests.support.s3 import Rules, S3Server
from tests.support.worker import Worker

QUICK = {"HEELER_CHECKPOINT_QUIET": "0.2", "HEELER_COMMIT_INTERVAL": "0.2"}
"""Settings under which a generation by quiet comes soon."""

NEVER = {"HEELER_CHECKPOINT_QUIET": "1000"}
"""Settings under which none comes by quiet while the program runs."""


T = TypeVar("T")


@contextmanager
def own_world(folder: Path, storage: S3Server) -> Iterator[World]:
    """A world of one's own, for tests that play in several at once."""
    folder.mkdir(parents=True)
    world = World(folder, storage)
    try:
        yield world
    finally:
        world.close()


def in_worlds(folder: Path, cases: Mapping[str, T], play: Callable[[World, T], None], at_once: int = 4) -> None:
    """Play each case in a world with a storage of its own, several at once; fails by the names of those that fail."""

    def one(number: int, name: str, case: T) -> str:
        try:
            with (
                S3Server.start(rules=Rules(keep_history=True), buckets=[BUCKET]) as storage,
                own_world(folder / str(number), storage) as world,
            ):
                play(world, case)
        except Exception:  # noqa: BLE001 - told below, with those of the others
            return f"{name}:\n{traceback.format_exc()}"
        return ""

    with ThreadPoolExecutor(at_once) as pool:
        played = [pool.submit(one, number, *case) for number, case in enumerate(cases.items())]
    failed = [said for each in played if (said := each.result())]
    assert not failed, "\n".join(failed)


def snapshots(ready: str | None = None, **fields: str) -> dict[str, Any]:
    """A sync that keeps CHECKPOINT_DIR as snapshots below `ck/{job_id}/`."""
    entry = {"bucket": BUCKET, "prefix": "ck/{job_id}/", "local_path": "work/{job_id}/ck", "mode": "snapshot", **fields}
    if ready is not None:
        entry["ready"] = ready
    return {"before": [entry], "during": [entry]}


class Prefix:
    """All that a job's prefix holds and ever held, read by the format and not by the code under test's own readers."""

    def __init__(self, storage: S3Server, job_id: str = JOB, prefix: str = "ck/{job_id}/") -> None:
        self._storage = storage
        self.prefix = prefix.replace("{job_id}", job_id)
        self.own = f"{self.prefix}.heeler/"
        self.head_key = f"{self.own}head.json"

    def heads(self) -> list[dict[str, Any]]:
        """Every version of the head, in order."""
        versions = self._storage.history(BUCKET, self.head_key)
        assert None not in versions, "the head was deleted"
        return [json.loads(version) for version in versions if version is not None]

    def head(self) -> dict[str, Any]:
        """The head as it is now."""
        return self.heads()[-1]

    def generation(self) -> int:
        """The newest generation's number; 0 if there is none."""
        heads = self.heads()
        return int(heads[-1]["generation"]) if heads else 0

    def kept(self) -> dict[int, dict[str, Any]]:
        """Every generation that a head ever listed."""
        return {kept["generation"]: kept for head in self.heads() for kept in head["kept"]}

    def files(self, generation: int) -> dict[str, bytes]:
        """The files of a generation, be it collected or not, every digest verified."""
        kept = self.kept()[generation]
        manifest = self._manifest(kept, self._ever(self._manifest_key(kept)))
        packs = {pack: self._ever(f"{self.own}packs/{pack}") for pack in manifest.packs}
        return _contents(manifest, packs)

    def newest(self) -> dict[str, bytes]:
        """The files of the newest generation; none if there is none."""
        number = self.generation()
        return self.files(number) if number else {}

    def restored_by(self, worker: Worker) -> dict[str, bytes]:
        """The files of the generation that a worker found newest when it acquired; fails if it restored another."""
        newest = worker.wait_for("acquired")["generation"]
        restored = [event["generation"] for event in worker.find("folder_restored") if "generation" in event]
        assert restored == ([newest] if newest else []), restored
        return self.files(newest) if newest else {}

    def every(self) -> dict[int, dict[str, bytes]]:
        """The files of each generation that ever was."""
        return {number: self.files(number) for number in self.kept()}

    def referenced(self) -> dict[str, bytes]:
        """The objects that the head needs, as they are now; fails if one is missing or damaged."""
        objects = self._storage.objects(BUCKET)
        found = {self.head_key: objects[self.head_key]}
        for kept in self.head()["kept"]:
            key = self._manifest_key(kept)
            found[key] = objects[key]
            manifest = self._manifest(kept, objects[key])
            packs = {pack: objects[f"{self.own}packs/{pack}"] for pack in manifest.packs}
            _contents(manifest, packs)
            found.update({f"{self.own}packs/{pack}": data for pack, data in packs.items()})
        return found

    def objects(self) -> dict[str, bytes]:
        """All objects below the prefix as they are now."""
        return {key: data for key, data in self._storage.objects(BUCKET).items() if key.startswith(self.prefix)}

    def packs(self) -> list[str]:
        """The keys of all packs that are there now."""
        return [key for key in self.objects() if key.startswith(f"{self.own}packs/")]

    def pack_reads(self) -> int:
        """Bytes of packs that storage handed out since its counts were reset."""
        reads = self._storage.stats.find("GetObject")
        return sum(read.bytes_out for read in reads if read.key.startswith(f"{self.own}packs/"))

    def wait_generation(self, least: int, timeout: float = 20.0) -> int:
        """Wait until the head lists a generation of at least that number."""
        return eventually(lambda: max(0, self.generation() - least + 1), f"generation {least}", timeout) + least - 1

    def _manifest_key(self, kept: Mapping[str, Any]) -> str:
        return f"{self.own}manifests/{kept['generation']}.{kept['manifest']}.json.zst"

    def _ever(self, key: str) -> bytes:
        versions = {version for version in self._storage.history(BUCKET, key) if version is not None}
        assert len(versions) == 1, f"{key} was {len(versions)} different objects"
        return versions.pop()

    @staticmethod
    def _manifest(kept: Mapping[str, Any], data: bytes) -> Manifest:
        assert blake3(data).hexdigest() == kept["digest"]
        return decode(data)


def _contents(manifest: Manifest, packs: Mapping[str, bytes]) -> dict[str, bytes]:
    assert {pack: len(data) for pack, data in packs.items()} == manifest.packs
    chunks = {
        digest: bytes(
            unpack_chunk(packs[at.pack][at.offset : at.offset + at.stored], at.codec, digest, at.size),
        )
        for digest, at in manifest.places.items()
    }
    return {path: b"".join(chunks[name] for name in entry.chunks) for path, entry in manifest.tree.files.items()}


# A program that saves steps, each in several files, with gaps between them and within them. It tells what it found
# at its start, then step and name of each file that it has closed.
_SAVER = """
import hashlib, json, random
layout, names, gap, rest, seed = json.loads({arguments!r})
folder, attempt = Path(env["CHECKPOINT_DIR"]), env["HEELER_ATTEMPT"]
rng = random.Random(f"{{seed}} {{attempt}}")
last = names[-1]

def content(step, name):
    unit = hashlib.sha256(f"{{step}} {{name}}".encode()).hexdigest()
    return f"{{step}} {{name}} " + unit * (step % 5 * 500 + 1)

found = {{
    path.relative_to(folder).as_posix(): path.read_text()
    for path in folder.rglob("*") if path.is_file() and ".heeler" not in path.relative_to(folder).parts
}}
tell(f"found-{{attempt}}", json.dumps(found))
said = os.open(W / f"said-{{attempt}}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
longest, changed = 0.0, time.monotonic()

def touched():
    global longest, changed
    now = time.monotonic()
    if now - changed > longest:
        longest = now - changed
        tell(f"longest-{{attempt}}", longest)
    changed = now

def save(path, text):
    if layout == "renamed":
        beside = path.with_name(f".{{path.name}}.tmp")
        beside.write_text(text)
        beside.replace(path)
    else:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
            file.flush()
            touched()
            time.sleep(rng.uniform(0, gap) if gap < 0.5 else 0)
            file.write(text[len(text) // 2 :])
    touched()

step = max((int(text.split()[0]) for path, text in found.items() if path.split("/")[-1] == last), default=0)
while True:
    step += 1
    base = folder / f"step-{{step}}" if layout in ("folders", "rotation") else folder
    base.mkdir(exist_ok=True)
    changed = time.monotonic()
    for name in names:
        if name != names[0]:
            time.sleep(gap if gap >= 0.5 else rng.uniform(0, gap))
        save(base / name, content(step, name))
        os.write(said, f"{{step}} {{name}}\\n".encode())
    if layout == "rotation":
        for old in folder.glob("step-*"):
            if old != base:
                for path in old.iterdir():
                    path.unlink()
                old.rmdir()
    time.sleep(rng.uniform(0.5, 1) * rest)
"""


def saver(world: World, layout: str, names: Sequence[str], *, gap: float, rest: float, seed: object) -> list[str]:
    """The program; `layout` is overwritten, renamed, folders or rotation, and the last name ends a step."""
    arguments = json.dumps([layout, list(names), gap, rest, str(seed)])
    return world.python(_SAVER.format(arguments=arguments))


def content(step: int, name: str) -> str:
    """What that program writes."""
    unit = hashlib.sha256(f"{step} {name}".encode()).hexdigest()
    return f"{step} {name} " + unit * (step % 5 * 500 + 1)


def step_of(files: Mapping[str, str | bytes], layout: str, names: Sequence[str]) -> int:
    """The one step that these files of the program are; 0 if there are none.

    Raises:
        AssertionError: They are of several steps, or not whole.
    """
    texts = {path: text.decode() if isinstance(text, bytes) else text for path, text in files.items()}
    steps = {}
    for path, text in texts.items():
        steps[path] = int(text.partition(" ")[0] or -1)
        assert text == content(steps[path], path.rpartition("/")[2]), f"{path} is half of a file: {steps}"
    if not steps:
        return 0
    newest = max(steps.values())
    if layout in ("overwritten", "renamed"):
        assert steps == dict.fromkeys(names, newest), f"files of several steps: {steps}"
        return newest
    assert all(path.startswith(f"step-{step}/") for path, step in steps.items())
    # In a rotation the older ones may be on their way out.
    whole = [newest] if layout == "rotation" else range(1, newest + 1)
    for step in whole:
        assert {f"step-{step}/{name}" for name in names} <= steps.keys(), f"step {step} is not whole: {steps}"
    return newest
