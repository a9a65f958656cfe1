"""Which folders may be a job's: never one that others need."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from heeler.config import load
from heeler.files import JobFilesSettings, job_files
from heeler.folders import Files
from heeler.job import InvalidJobError, Job
from heeler.leftovers import Leftovers
from heeler.rooms import Rooms
from heeler.settings import Settings
from heeler_sync.snapshot.index import MemoryIndex
from heeler_sync.snapshot.session import Fences
from heeler_sync.snapshot.uploads import NoUploads
from tests.support.leases import ScriptedLease


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "work/here"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load({"state_dir": f"{tmp_path}/lib/state", "source": f"local:{tmp_path}/lib/queue"}, {}).settings


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/home", "/opt", "/root", "/srv", "/tmp", "/var", "/var/lib", "/run"),
        *("/usr", "/usr/share/x", "/usr/local/x", "/bin/x", "/sbin", "/lib/x", "/lib64/x", "/etc/x", "/proc/1/cwd"),
        *("/sys/x", "/dev/x", "/boot/x", "/usr/src", "/dev/shm"),
        *(sys.prefix, f"{sys.prefix}/lib", str(Path(sys.prefix).parent)),
        *(str(Path.home()), ".", "..", "../..", "{tmp}", "{tmp}/work", "{tmp}/work/here", "a/../../x"),
        *("{tmp}/lib", "{tmp}/lib/state", "{tmp}/lib/state/jobs", "{tmp}/lib/queue", "{tmp}/lib/queue/x"),
        *("{tmp}/link", "{tmp}/link/x", "{tmp}/circle/x"),
    ],
)
def test_a_folder_that_others_need_is_refused(settings: Settings, base: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "lib/state").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "lib/state")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(ValueError, match=r"can't be a job's folder|contains '\.\.'|can't be resolved"):
        Rooms(settings, base).folder(path.format(tmp=tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        *("/opt/data", "/var/data", "/tmp/x", "/input", "/mnt", "/data/x", "/home/user/ck", "/var/lib/x", "/workspace"),
        *("/dev/shm/x", "/usr/src/app/ck", "x", "x/y", "{tmp}/lib/statement", "{tmp}/lib/queue2", "{tmp}/other"),
    ],
)
def test_any_other_folder_is_taken(settings: Settings, base: Path, tmp_path: Path, path: str) -> None:
    path = path.format(tmp=tmp_path)
    assert Rooms(settings, base).folder(path) == Path(base, path)


def test_a_state_folder_behind_a_link_is_found(base: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rooms = Rooms(load({"state_dir": f"{tmp_path}/link/state"}, {}).settings, base)
    with pytest.raises(ValueError, match="holds heeler's state"):
        rooms.folder(f"{tmp_path}/real")


def entry(path: str) -> dict[str, str]:
    return {"bucket": "bucket", "prefix": path.replace("/", "-"), "local_path": path}


def open_files(settings: Settings, base: Path, sync: dict[str, Any]) -> Files:
    def none(*_: object) -> Any:
        raise AssertionError

    body = json.dumps({"command": "true", "sync": sync}).encode()
    permit: Any = None
    leftovers = Leftovers(base, none)
    context = JobFilesSettings(
        settings, none, none, "worker", Fences(none), MemoryIndex(), NoUploads(), leftovers, base=base
    )
    return job_files(ScriptedLease(job=Job("job", body)), permit, context)


def test_a_folder_inside_another_that_is_restored_is_refused_by_field(settings: Settings, base: Path) -> None:
    for order in (["a", "a/b"], ["a/b", "a"], ["x", "a", "a/b/c"]):
        with pytest.raises(InvalidJobError, match=r"lies inside .*name folders of their own") as caught:
            open_files(settings, base, {"before": [entry(name) for name in order]})
        inner = max(range(len(order)), key=lambda index: len(order[index]))
        assert caught.value.field == f"sync.before.{inner}.local_path"
    open_files(settings, base, {"before": [entry("a"), entry("ab")], "during": [entry("a")], "after": [entry("a/b")]})


def test_a_wrong_bucket_in_the_settings_is_named(base: Path) -> None:
    wrong = load({"checkpoints": "s3://UP_CASE!/x"}, {}).settings
    with pytest.raises(InvalidJobError, match=r"HEELER_CHECKPOINTS.*UP_CASE!"):
        open_files(wrong, base, {})
