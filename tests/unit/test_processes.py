"""What one start has left: found by its tag wherever it went, and ended to the last. Of several, each has its own."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from heeler.app import process as process_module
from heeler.app import processes as processes_module
from heeler.app import siblings as siblings_module
from heeler.app.process import CannotStartError, Child, Exit, MachineError, Started, child
from heeler.app.processes import (
    TAG_VARIABLE,
    OrphanReaper,
    Relative,
    UndyingError,
    become_reaper,
    descendants,
    kill_all,
    relatives,
    signal_group,
    signal_process,
    start_time,
    tagged,
)
from heeler.app.siblings import Sibling, Siblings

TREE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for wild in range(3):
    if os.fork() == 0:
        if wild == 1: os.setsid()
        if wild == 2: os.setpgid(0, 0)
        if os.fork() == 0:
            os.setsid()
        break
print("up", flush=True)
time.sleep(60)
"""


class Register:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Started]] = []

    def started(self, process: Started) -> None:
        self.calls.append(("started", process))

    def ended(self, process: Started) -> None:
        self.calls.append(("ended", process))

    def stuck(self, process: Started, pids: Sequence[int]) -> None:
        self.calls.append((f"stuck {[*pids]}", process))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def tree() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process with children that left its group and session, seven in all; none of them heeds SIGTERM."""
    tag = os.urandom(8).hex()
    environment = {**os.environ, TAG_VARIABLE: tag}
    process = subprocess.Popen([sys.executable, "-c", TREE], env=environment, start_new_session=True,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    wait_until(lambda: len(tagged(tag)) == 7)
    yield process, tag
    for pid in tagged(tag):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_every_process_of_a_start_is_found_and_ended(tree: tuple[subprocess.Popen[bytes], str]) -> None:
    process, tag = tree
    assert process.pid in tagged(tag)
    assert kill_all(tag, process.pid) >= 3
    assert tagged(tag) == []
    assert kill_all(tag, process.pid) == 0
    assert process.wait(5) == -signal.SIGKILL


def test_without_its_group_a_start_is_found_by_its_tag_alone(tree: tuple[subprocess.Popen[bytes], str]) -> None:
    _, tag = tree
    assert kill_all(tag) == 7


def test_other_tags_are_left_alone(tree: tuple[subprocess.Popen[bytes], str]) -> None:
    process, tag = tree
    assert kill_all(tag[:-1]) == 0
    assert kill_all("0" * 16) == 0
    assert process.poll() is None
    assert len(tagged(tag)) == 7


def test_a_process_is_told_from_a_later_one_of_the_same_pid() -> None:
    own = start_time(os.getpid())
    assert own is not None
    assert own == start_time(os.getpid())
    assert start_time(1) != own
    assert start_time(1 << 22) is None


def test_a_process_with_an_odd_name_has_a_start_time(tmp_path: Path) -> None:
    program = tmp_path / "a) R (b"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([str(program), "30"])
    try:
        found = start_time(process.pid)
        assert found is not None
        assert found >= (start_time(os.getpid()) or 0)
    finally:
        process.kill()
        process.wait()


def test_signals_to_what_is_gone_are_no_error() -> None:
    process = subprocess.Popen(["true"], start_new_session=True)
    process.wait()
    assert not signal_group(process.pid, signal.SIGTERM)
    signal_process(process.pid, signal.SIGTERM)


def test_orphans_are_collected_and_our_own_children_left_to_their_starters() -> None:
    """In a process of its own, since it collects whatever zombie it has."""
    code = """
import os, subprocess, sys, time
from heeler.app.processes import OrphanReaper, become_reaper, _own_zombies
become_reaper()
subprocess.run([sys.executable, "-c", "import os\\nif os.fork() == 0: os._exit(0)"])
own = subprocess.Popen(["true"])
while len(list(_own_zombies())) < 2: time.sleep(0.01)
reaper = OrphanReaper()
first = reaper.look()
own.wait()
print(first, reaper.look(), list(_own_zombies()), own.returncode)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout.strip() == "0 1 [] 0", done.stderr
    assert OrphanReaper().look() == 0


def test_a_childs_end_is_told_as_a_person_would() -> None:
    assert str(Exit(3, None)) == "exit code 3"
    assert str(Exit(None, signal.SIGKILL)) == "killed by SIGKILL"
    assert str(Exit(None, 35)) == "killed by signal 35"


async def _run(argv: list[str], register: Register, environment: dict[str, str] | None = None) -> tuple[Exit, bytes]:
    output = bytearray()
    inherited = {"PATH": os.environ["PATH"], **(environment or {})}
    async with child(argv, inherited, [output.extend], [output.extend], register) as running:
        how = await running.wait()
    return how, bytes(output)


@pytest.mark.parametrize(
    ("argv", "how", "output"),
    [
        (["sh", "-c", "echo out; echo err >&2; exit 7"], Exit(7, None), {b"out\n", b"err\n"}),
        (["sh", "-c", "kill -9 $$"], Exit(None, 9), set()),
        (["printf", "%s|", "a b", "", "*", "$HOME"], Exit(0, None), {b"a b||*|$HOME|"}),
    ],
)
def test_a_child_runs_without_a_shell_and_its_end_and_output_are_known(
    argv: list[str], how: Exit, output: set[bytes]
) -> None:
    register = Register()
    found, data = anyio.run(_run, argv, register)
    assert found == how
    assert all(part in data for part in output)
    assert [name for name, _ in register.calls] == ["started", "ended"]
    assert register.calls[0][1] == register.calls[1][1]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["no-such-program-here"], "No such file"),
        (["/etc/passwd"], "Permission denied"),
        (["/tmp"], "Permission denied"),
        (["true", "x" * 200_000], "too long"),
        (["true", *["x" * 100_000] * 40], "too long"),
    ],
    ids=["missing", "no program", "folder", "one argument too long", "all too long"],
)
def test_a_program_that_can_not_be_started_says_why_and_leaves_nothing(argv: list[str], why: str) -> None:
    register = Register()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CannotStartError, match=why):
        anyio.run(_run, argv, register)
    assert len(os.listdir("/proc/self/fd")) == before
    assert [name for name, _ in register.calls] in ([], ["started", "ended"])


def test_when_the_block_ends_no_descendant_is_left() -> None:
    register = Register()

    async def leave() -> None:
        with anyio.move_on_after(5):
            async with child([sys.executable, "-c", TREE], dict(os.environ), [seen.extend], [], register):
                while b"up" not in seen:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                raise LookupError

    seen = bytearray()
    with pytest.raises(LookupError):
        anyio.run(leave)
    assert tagged(register.calls[0][1].tag) == []


# Descendants that dropped their environment.

HIDING = """
import json, os, subprocess, sys, time
from pathlib import Path
from heeler.app.processes import become_reaper, descendants, kill_all
from heeler.app.siblings import Siblings
become_reaper()
def hidden():
    # Forked twice, with neither environment nor session of ours; it has a child of its own.
    code = "import os,sys,time; os.fork(); print(os.getpid(), flush=True); time.sleep(60)"
    start = ["env", "-i", "setsid", sys.executable, "-c", code]
    shell = subprocess.Popen(["sh", "-c", '"$@" & wait', "sh", *start], stdout=subprocess.PIPE, text=True)
    pids = [int(shell.stdout.readline()) for _ in range(2)]
    shell.kill()
    shell.wait()
    return pids
def alive(pids):
    states = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in pids
              if os.path.exists(f"/proc/{pid}")]
    return sum(state != "Z" for state in states)
daemon = hidden()
before = descendants()
job = hidden()
untold = kill_all("no-such-tag")
left = alive(job)
family = Siblings()
with family.join("no-such-tag", before) as child:
    killed = family.kill(child, 5)
print(json.dumps([untold, left, killed, alive(job), alive(daemon)]))
for pid in daemon:
    os.kill(pid, 9)
"""


def test_a_reaper_ends_descendants_that_hide_and_spares_what_ran_before() -> None:
    done = subprocess.run([sys.executable, "-c", HIDING], capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout.strip() == "[0, 2, 2, 0, 2]", done.stderr


def test_without_being_a_reaper_we_claim_no_descendants() -> None:
    assert os.getpid() != 1
    assert descendants() is None


# What is no fault of the program.


def test_a_process_that_does_not_die_is_told_once_and_stays_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    patience: list[float] = []

    def undying(_self: Siblings, sibling: Sibling, seconds: float) -> int:
        patience.append(seconds)
        raise UndyingError([sibling.group or 0])

    async def run() -> Exit:
        async with child(["sleep", "60"], dict(os.environ), [], [], register) as running:
            assert not running.stuck
            await running.kill()
            assert running.stuck
            with anyio.fail_after(5):
                how = await running.wait()
        took.append(time.monotonic() - began)
        os.killpg(running.started.group, signal.SIGKILL)
        with anyio.fail_after(5):
            await running._process.wait()
        return how

    monkeypatch.setattr(Siblings, "kill", undying)
    monkeypatch.setattr(process_module, "_DRAIN_OUTPUT_SECONDS", 0.1)
    register = Register()
    began = time.monotonic()
    took: list[float] = []
    assert anyio.run(run) == Exit(None, signal.SIGKILL)
    assert took[0] < 4
    group = register.calls[0][1].group
    assert [name for name, _ in register.calls] == ["started", f"stuck [{group}]"]
    assert patience[0] > 0
    assert set(patience[1:]) == {0.0}, "the drain must not wait again and again"


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("call", ["open_process", "pipe", "descendants"])
def test_a_machine_that_is_short_of_something_is_no_fault_of_the_program(
    monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def short(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    async def run() -> None:
        await anyio.lowlevel.checkpoint()
        where = {"open_process": anyio, "pipe": os, "descendants": process_module}
        monkeypatch.setattr(where[call], call, short)
        try:
            async with child(["true"], {}, [], [], register):
                raise AssertionError
        finally:
            monkeypatch.undo()

    register = Register()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MachineError, match=os.strerror(number)):
        anyio.run(run)
    assert register.calls == []
    assert len(os.listdir("/proc/self/fd")) <= before


def test_without_a_thread_to_watch_it_a_child_is_ended_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tags: list[str] = []

    async def half_started(argv: list[str], env: dict[str, str], **_: object) -> None:
        tags.append(env[TAG_VARIABLE])
        started.append(subprocess.Popen(["sleep", "60"], env=env))  # noqa: ASYNC220
        raise RuntimeError("can't start new thread")

    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(anyio, "open_process", half_started)
    with pytest.raises(MachineError, match="temporarily unavailable"):
        anyio.run(_run, ["true"], Register())
    assert tagged(tags[0]) == []
    assert started[0].wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("code", ["import sys; sys.exit(0)", "import os; os.kill(os.getpid(), 9)"])
def test_a_launcher_that_dies_before_the_program_is_no_exit_of_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str
) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(code)
    monkeypatch.setattr(process_module, "_LAUNCHER", launcher)
    register = Register()
    with pytest.raises(MachineError, match="'true' can't be started here"):
        anyio.run(_run, ["true"], register)
    assert [name for name, _ in register.calls] == ["started", "ended"]


def test_a_child_starts_and_ends_while_all_shared_threads_are_taken() -> None:
    async def run() -> Exit:
        go_on = threading.Event()
        shared = anyio.to_thread.current_default_thread_limiter()
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(int(shared.total_tokens)):
                    tasks.start_soon(partial(anyio.to_thread.run_sync, go_on.wait, 10))
                while shared.available_tokens:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                with anyio.fail_after(5):
                    how, _ = await _run(["true"], Register())
                go_on.set()
            return how
        finally:
            go_on.set()

    assert anyio.run(run) == Exit(0, None)


# Several children at once: whose is a process?

DAEMONS = {
    "plain": ["sh -c {} &"],
    "tagged": ["(setsid sh -c {} &)"],
    "in its session": ["(env -i sh -c {} &)"],
    "below it": ["env -i setsid sh -c {} &"],
    "below a tagged one": ["(setsid sh -c {} &)", "env -i setsid sh -c {} & exec sleep 1000"],
    "stranger": ["(env -i setsid sh -c {} &)"],
}
"""How a program starts each, from the outside in; they are told apart by what still says whose they are."""

BEFORE_ALL = frozenset[tuple[int, int]]()


@pytest.fixture
def reaper() -> Iterator[None]:
    """We are one for as long as the test runs, and it leaves nothing."""
    before = {*relatives()}
    become_reaper()
    yield
    for pid in {*relatives()} - before:
        signal_process(pid, signal.SIGKILL)
    ctypes.CDLL(None).prctl(processes_module._PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    orphans = OrphanReaper()
    orphans.look()
    orphans.look()


def running(pid: int) -> bool:
    """Whether a process runs; a look at all relatives can miss one that changes its parent meanwhile."""
    fields = processes_module._stat(pid)
    return fields is not None and fields[0] not in (b"Z", b"X")


class Job:
    """A running child with daemons of the named kinds."""

    def __init__(self, child: Child, pids: dict[str, int]) -> None:
        self.child = child
        self.pids = pids

    def living(self) -> set[str]:
        return {kind for kind, pid in self.pids.items() if running(pid)}


@asynccontextmanager
async def job(
    family: Siblings | None, folder: Path, name: str, kinds: Collection[str] = tuple(DAEMONS), end: str = "sleep 1000"
) -> AsyncIterator[Job]:
    files = {kind: folder / f"{name} {kind}" for kind in kinds}
    text = ""
    for kind, file in files.items():
        command = f'echo $$ > "{file}.new"; mv "{file}.new" "{file}"; exec sleep 1000'
        for how in reversed(DAEMONS[kind]):
            command = how.format(shlex.quote(command))
        text += f"{command}\n"
    text += "".join(f'while ! test -e "{file}"; do sleep 0.005; done\n' for file in files.values()) + end
    argv = ["sh", "-c", f"exec >/dev/null 2>&1\n{text}"]
    async with child(argv, dict(os.environ), [], [], Register(), family) as started:
        with anyio.fail_after(20):
            while not all(file.exists() for file in files.values()):  # noqa: ASYNC110
                await anyio.sleep(0.005)
        yield Job(started, {kind: int(file.read_text()) for kind, file in files.items()})


@pytest.mark.usefixtures("reaper")
def test_the_end_of_one_child_ends_all_that_is_surely_its_own_and_nothing_of_another(tmp_path: Path) -> None:
    async def run() -> None:
        family = Siblings()
        async with job(family, tmp_path, "other") as other:
            async with job(family, tmp_path, "one") as one:
                assert one.living() == {*DAEMONS}
            assert one.living() == {"stranger"}, "which may be the other's"
            assert other.living() == {*DAEMONS}
            assert running(other.child.started.group)
        assert one.living() == other.living() == set()

    anyio.run(run)


@pytest.mark.usefixtures("reaper")
def test_a_stranger_from_before_the_other_child_is_ended_with_its_own(tmp_path: Path) -> None:
    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            await up.wait()
            async with job(family, tmp_path, "other") as other:
                go_on.set()
                await over.wait()
                assert other.living() == {*DAEMONS}
            assert other.living() == set()

    async def first() -> None:
        async with job(family, tmp_path, "one") as one:
            up.set()
            await go_on.wait()
            assert one.living() == {*DAEMONS}
        assert one.living() == set()
        over.set()

    family = Siblings()
    up, go_on, over = anyio.Event(), anyio.Event(), anyio.Event()
    anyio.run(run)


@pytest.mark.usefixtures("reaper")
def test_a_child_that_runs_alone_ends_everything_and_knows_no_others(tmp_path: Path) -> None:
    async def run() -> None:
        async with job(None, tmp_path, "one") as one:
            pass
        assert one.living() == set()

    anyio.run(run)


@contextmanager
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process without a mark of anybody; as are our own children between fork and exec."""
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("reaper")
def test_what_is_just_being_started_is_spared_before_it_has_a_pid() -> None:
    family = Siblings()
    with family.join("one", descendants()) as one, family.join("next", descendants()) as other, stranger() as process:
        assert family.kill(one, 5) == 0
        assert process.poll() is None
        other.started(process.pid, start_time(process.pid) or 0)
        assert family.kill(one, 5) == 0
        assert process.poll() is None
        family.kill(other, 5)
        assert process.wait(5) == -signal.SIGKILL


@pytest.mark.usefixtures("reaper")
def test_what_is_started_during_a_look_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Siblings()
    before = descendants()
    late = family.join("late", before)

    def look() -> dict[int, Relative]:
        if not started:
            late.__enter__()
            started.append(subprocess.Popen(["sleep", "1000"], start_new_session=True))
        return relatives()

    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(siblings_module, "relatives", look)
    with family.join("one", before) as one:
        assert family.kill(one, 5) == 0
    assert started[0].poll() is None
    late.__exit__(None, None, None)
    started[0].kill()
    started[0].wait()


@pytest.mark.usefixtures("reaper")
def test_of_two_that_end_at_once_one_takes_the_strangers() -> None:
    family = Siblings()
    with family.join("one", descendants()) as one, family.join("other", descendants()) as other, stranger() as process:
        assert family.kill(one, 5) == 0
        assert family.kill(other, 5) == 1
        assert process.wait(5) == -signal.SIGKILL


@pytest.mark.usefixtures("reaper")
def test_a_child_started_later_does_not_keep_a_stranger_that_its_first_look_missed() -> None:
    family = Siblings()
    with family.join("one", descendants()) as one, family.join("later", BEFORE_ALL) as later, stranger() as process:
        later.started(os.getpid(), (start_time(process.pid) or 0) + 1)
        assert family.kill(one, 5) == 1
        assert process.wait(5) == -signal.SIGKILL


@pytest.mark.usefixtures("reaper")
def test_a_tag_in_the_environment_of_anothers_process_does_not_end_it() -> None:
    family = Siblings()
    with family.join("a" * 16, descendants()) as one, family.join("b" * 16, descendants()) as other:
        process = subprocess.Popen(["sleep", "1000"], env={TAG_VARIABLE: one.tag}, start_new_session=True)
        other.started(process.pid, start_time(process.pid) or 0)
        assert family.kill(one, 5) == 0
        assert process.poll() is None
        family.kill(other, 5)
        assert process.wait(5) == -signal.SIGKILL


@pytest.mark.usefixtures("reaper")
def test_a_process_that_one_has_given_up_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Siblings()
    with family.join("b" * 16, descendants()) as other:
        with family.join("a" * 16, descendants()) as one:
            process = subprocess.Popen(["sleep", "1000"], env={TAG_VARIABLE: one.tag}, start_new_session=True)
            wait_until(lambda: process.pid in tagged(one.tag))
            with monkeypatch.context() as patched:
                patched.setattr(processes_module, "signal_process", lambda *_: None)
                with pytest.raises(UndyingError, match=str(process.pid)):
                    family.kill(one, 0.05)
        assert family.kill(other, 5) == 0
        process.kill()
        process.wait()


@pytest.mark.usefixtures("reaper")
def test_a_number_that_the_kernel_gave_to_another_process_is_nobodys_group_any_more() -> None:
    with stranger() as process:
        family = Siblings()
        with family.join("one", descendants()) as one:
            one.started(process.pid, (start_time(process.pid) or 0) - 1)
            assert family.kill(one, 5) == 0
            assert process.poll() is None


@pytest.mark.parametrize(
    ("change", "may"),
    [
        ({}, True),
        ({"since": 5}, True),
        ({"since": 6}, False),
        ({"before": None}, True),
        ({"before": frozenset({(7, 5)})}, False),
        ({"before": frozenset({(7, 4)})}, True),
        ({"ending": True}, False),
    ],
)
def test_who_may_have_started_a_stranger(change: dict[str, Any], may: bool) -> None:
    one = Sibling("one", BEFORE_ALL)
    for name, value in change.items():
        setattr(one, name, value)
    assert one.may_have_started((7, 5)) is may


@pytest.mark.parametrize("mark", ["group", "session", "branch"])
def test_each_mark_of_the_kernel_is_enough(mark: str) -> None:
    one = Sibling("one", BEFORE_ALL)
    nobody = Relative(started=9, group=7, session=7, branch=7)
    assert not one.owns(nobody, {7: nobody})
    one.started(5, 3)
    assert not one.owns(nobody, {7: nobody})
    assert one.owns(nobody._replace(**{mark: 5}), {7: nobody})
    assert one.owns(nobody._replace(**{mark: 5}), {5: Relative(3, 5, 5, 5)})
    assert not one.owns(nobody._replace(**{mark: 5}), {5: Relative(4, 5, 5, 5)})


@pytest.mark.usefixtures("reaper")
def test_children_that_start_while_others_end_are_never_ended_before_their_time() -> None:
    async def lane(family: Siblings) -> None:
        for _ in range(12):
            async with child(["true"], dict(os.environ), [], [], Register(), family) as running:
                ends.append(await running.wait())

    async def run() -> None:
        family = Siblings()
        async with anyio.create_task_group() as lanes:
            for _ in range(6):
                lanes.start_soon(lane, family)

    ends: list[Exit] = []
    anyio.run(run)
    assert ends == [Exit(0, None)] * 72


@pytest.mark.usefixtures("reaper")
@pytest.mark.parametrize("seed", range(20))
def test_random_children_at_once_lose_nothing_while_they_run_and_leave_nothing(seed: int, tmp_path: Path) -> None:
    """Each lane's children have daemons of random kinds; some end by themselves, some are ended."""
    print(f"seed {seed}")

    async def lane(number: int) -> None:
        rng = random.Random(seed * 10 + number)
        for turn in range(2):
            await anyio.sleep(rng.uniform(0, 0.1))
            kinds = rng.sample([*DAEMONS], rng.randint(1, len(DAEMONS)))
            by_itself = "below it" not in kinds and rng.random() < 0.4
            end = "exit 0" if by_itself else "sleep 1000"
            async with job(family, tmp_path, f"{number}.{turn}", kinds, end) as one:
                for _ in range(rng.randint(1, 4)):
                    assert one.living() == {*kinds}
                    await anyio.sleep(rng.uniform(0, 0.05))
                if by_itself:
                    await one.child.wait()
                assert one.living() == {*kinds}
            assert one.living() <= {"stranger"}
            jobs.append(one)

    async def run() -> None:
        async with anyio.create_task_group() as lanes:
            for number in range(4):
                lanes.start_soon(lane, number)

    family = Siblings()
    before = descendants() or frozenset()
    jobs: list[Job] = []
    anyio.run(run)
    assert len(jobs) == 8
    assert not (descendants() or frozenset()) - before
