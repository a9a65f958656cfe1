"""Who of one machine's workers has a job: one at a time, until it lets go or is dead, and nobody else may meddle."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import pytest

from heeler.sources.kelpie_claims import Claims

_HOLDER = """
import sys
from pathlib import Path
from heeler.sources.kelpie_claims import Claims
claim = Claims("scope", Path(sys.argv[1])).claim(sys.argv[2])
print(claim is not None, flush=True)
sys.stdin.read()
if claim is not None:
    claim.release()
"""


@contextmanager
def process(folder: Path, job_id: str = "job") -> Iterator[tuple[subprocess.Popen[str], bool]]:
    """Another worker, and whether it has the job; it lets go when its standard input is closed."""
    arguments = [sys.executable, "-c", _HOLDER, str(folder), job_id]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            yield holder, holder.stdout.readline() == "True\n"
        finally:
            holder.kill()


def test_only_one_has_a_job(tmp_path: Path) -> None:
    ours = Claims("scope", tmp_path).claim("job")
    assert ours is not None
    assert Claims("scope", tmp_path).claim("job") is None
    assert Claims("scope", tmp_path).claim("other") is not None
    assert Claims("other scope", tmp_path).claim("job") is not None
    ours.release()
    again = Claims("scope", tmp_path).claim("job")
    assert again is not None
    ours.release()  # it is no longer ours to release
    assert Claims("scope", tmp_path).claim("job") is None


def test_no_two_processes_have_a_job(tmp_path: Path) -> None:
    with process(tmp_path) as (holder, has_it):
        assert has_it
        assert Claims("scope", tmp_path).claim("job") is None
        with process(tmp_path) as (_, second):
            assert not second
        assert holder.stdin is not None
        holder.stdin.close()
        holder.wait(10)
    assert not any(path.is_file() for path in tmp_path.rglob("*")), "nothing is left behind"
    with process(tmp_path) as (_, has_it):
        assert has_it


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    with process(tmp_path) as (holder, has_it):
        assert has_it
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        assert Claims("scope", tmp_path).claim("job") is not None, "although its file is still there"


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    claim = Claims("scope", tmp_path).claim("job")
    assert claim is not None
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        try:
            claim.release()
            assert Claims("scope", tmp_path).claim("job") is not None
        finally:
            child.kill()


def test_a_claim_that_nobody_keeps_is_let_go(tmp_path: Path) -> None:
    claim = Claims("scope", tmp_path).claim("job")
    del claim
    assert Claims("scope", tmp_path).claim("job") is not None


def test_many_who_want_it_at_once_have_it_one_after_the_other(tmp_path: Path) -> None:
    """The name goes with the lock: whoever opened the file just before must not keep one that nobody else sees."""
    holding = Counter[str]()
    most: list[int] = []

    def work() -> None:
        claims = Claims("scope", tmp_path)
        for _ in range(300):
            if (claim := claims.claim("job")) is not None:
                holding["job"] += 1
                most.append(holding["job"])
                holding["job"] -= 1
                claim.release()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) > 300
    assert max(most) == 1


def test_a_lock_whose_name_went_while_we_waited_for_it_is_not_taken_for_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Claims("scope", tmp_path).claim("job")
    assert before is not None
    locked = fcntl.flock

    def flock(file: FileIO, how: int) -> None:
        before.release()  # between our opening of the file and our lock
        locked(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    ours = Claims("scope", tmp_path).claim("job")
    assert ours is not None
    assert Claims("scope", tmp_path).claim("job") is None, "it is the one that others see"


def test_a_file_that_was_left_is_nobodys(tmp_path: Path) -> None:
    claims = Claims("scope", tmp_path)
    claims.prepare()
    (next(tmp_path.iterdir()) / "job").write_text("of a process long gone")
    assert claims.claim("job") is not None


def test_a_folder_that_goes_is_made_again_and_its_holder_can_still_let_go(tmp_path: Path) -> None:
    claim = Claims("scope", tmp_path / "room").claim("job")
    assert claim is not None
    for path in sorted((tmp_path / "room").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    claim.release()
    assert Claims("scope", tmp_path / "room").claim("job") is not None


def test_the_folder_is_ours_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Claims("scope", tmp_path / "room").prepare()
    finally:
        os.umask(before)
    for folder in (tmp_path / "room", *(tmp_path / "room").iterdir()):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    claims = Claims("scope", tmp_path)
    claims.prepare()
    victim = tmp_path / "victim"
    (next(tmp_path.iterdir()) / "job").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links") as caught:
        claims.claim("job")
    assert caught.value.errno == errno.ELOOP
    assert not victim.exists()


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "room").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError, match=r"it is no folder.*room"):
        Claims("scope", tmp_path / "room").claim("job")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "room").write_text("")
    with pytest.raises(NotADirectoryError, match=r"it is no folder.*room"):
        Claims("scope", tmp_path / "room").claim("job")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room").chmod(mode)
    with pytest.raises(PermissionError, match=r"others may write to it.*room"):
        Claims("scope", tmp_path / "room").claim("job")


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Claims("scope", tmp_path / "room").prepare()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match=r"another user's.*room"):
        Claims("scope", tmp_path / "room").claim("job")


def test_users_do_not_get_in_each_others_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    mine = str(Claims("scope")._room)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert str(Claims("scope")._room) != mine
    assert mine.startswith(str(tmp_path))
