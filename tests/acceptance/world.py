"""One test's world: storage, a queue in a folder, programs, and workers that are the real command line."""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from heeler.sources.base import JobRecord
from heeler.sources.local import LocalDesk
from tests.support.s3 import S3Server
from tests.support.worker import Worker, clean_environment, storage_environment

BUCKET = "jobs"
JOB = "job-1"
MIB = 1 << 20
_MARK = "ACCEPTANCE_WORLD"

FAMILY = (
    "import subprocess\n"
    "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
    "    signal.signal(number, lambda *_: os._exit(0))\n"
    "here = str(W)\n"
    "sleeper = 'trap \"\" TERM INT HUP; echo $$ > {0}/{1}.new; mv {0}/{1}.new {0}/{1}; while :; do sleep 100; done'\n"
    "subprocess.Popen(['bash', '-c', sleeper.format(here, 'grandchild')])\n"
    "subprocess.Popen(['setsid', 'bash', '-c', sleeper.format(here, 'other_session')])\n"
    # Forked twice, with a session of its own, and without a parent.
    "daemon = 'setsid bash -c \"$0\" </dev/null >/dev/null 2>&1 &'\n"
    "subprocess.run(['bash', '-c', daemon, sleeper.format(here, 'daemon')])\n"
)
"""The start of a Python program with descendants that ignore every polite signal and hide from their parents."""

MEMBERS = ("pid", "grandchild", "other_session", "daemon")
"""The files with the process ids of such a program."""

T = TypeVar("T")


def eventually(condition: Callable[[], T | None], what: str, timeout: float = 20.0) -> T:
    """Wait until a condition is true and return what it was.

    Raises:
        AssertionError: It was not in time.
    """
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.005)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class World:
    """What a test plays with. Everything lies below `folder`; workers start there, so local paths are relative."""

    def __init__(self, folder: Path, storage: S3Server) -> None:
        self.folder = folder
        self.storage = storage
        self.queue = folder / "queue"
        self.desk = LocalDesk(self.queue)
        self.started: list[Worker] = []
        self._mark = secrets.token_hex(16)

    # Storage and folders.

    def entry(self, name: str) -> dict[str, str]:
        """A sync entry of a folder of the job."""
        return {"bucket": BUCKET, "prefix": f"{{job_id}}/{name}/", "local_path": f"work/{{job_id}}/{name}"}

    def checkpoints(self) -> dict[str, Any]:
        """A sync that restores and mirrors CHECKPOINT_DIR."""
        return {"before": [self.entry("ck")], "during": [self.entry("ck")]}

    def outputs(self) -> dict[str, Any]:
        """A sync that uploads OUTPUT_DIR at the end."""
        return {"after": [self.entry("out")]}

    def path(self, name: str, job_id: str = JOB) -> Path:
        """A path in a job's local folders."""
        return self.folder / "work" / job_id / name

    def key(self, name: str, job_id: str = JOB) -> str:
        """The key of that path."""
        return f"{job_id}/{name}"

    def stored(self, name: str, job_id: str = JOB) -> bytes | None:
        """What storage holds of that path."""
        return self.storage.objects(BUCKET).get(self.key(name, job_id))

    def versions(self, name: str, job_id: str = JOB) -> list[bytes | None]:
        """All that storage ever held of that path."""
        return self.storage.history(BUCKET, self.key(name, job_id))

    # Programs and jobs.

    def bash(self, text: str) -> list[str]:
        """A program in bash; `$W` is the world's folder. Its pid is in the file `pid` once it runs."""
        return ["bash", "-c", f"W={shlex.quote(str(self.folder))}; echo $$ > $W/pid.new; mv $W/pid.new $W/pid\n{text}"]

    def python(self, text: str) -> list[str]:
        """A program in Python; `W` is the world's folder as a Path, `env` the environment."""
        head = "import os, signal, sys, time\nfrom pathlib import Path\n"
        head += f"W, env = Path({str(self.folder)!r}), os.environ\n"
        head += "def tell(name, text=''):\n    (W / f'{name}.new').write_text(str(text))\n"
        head += "    (W / f'{name}.new').rename(W / name)\n"
        head += "def await_(name):\n    while not (W / name).exists(): time.sleep(0.005)\n"
        head += "tell('pid', os.getpid())\n"
        path = self.folder / f"program{len(list(self.folder.glob('program*.py')))}.py"
        path.write_text(head + text)
        return [sys.executable, "-I", "-S", str(path)]

    def submit(self, program: Sequence[str], job_id: str = JOB, **fields: Any) -> str:
        """Put a job into the queue."""
        document = {"id": job_id, "command": program[0], "arguments": list(program[1:]), **fields}
        return self.desk.submit([json.dumps(document).encode()])[0]

    def tell(self, name: str) -> None:
        """Make the file that a program waits for."""
        (self.folder / name).touch()

    def told(self, name: str, timeout: float = 20.0) -> str:
        """Wait for a file that a program makes, and its text."""
        path = self.folder / name
        eventually(path.exists, f"the program made {name}", timeout)
        return path.read_text()

    def told_pid(self, name: str = "pid") -> int:
        """As `told`, a process id."""
        return int(self.told(name))

    def job(self, job_id: str = JOB) -> JobRecord:
        """The job as the queue has it."""
        record = self.desk.show(job_id)
        assert record is not None
        return record

    def wait_state(self, state: str, job_id: str = JOB, timeout: float = 20.0) -> JobRecord:
        """Wait until the queue says so."""
        deadline = time.monotonic() + timeout
        while (record := self.job(job_id)).state != state:
            logs = "\n".join(line for worker in self.started for line in [str(worker.pid), *worker.lines[-40:]])
            assert time.monotonic() < deadline, f"not {state} within {timeout} s: {record}\n{logs}"
            time.sleep(0.01)
        return record

    # Workers.

    def environment(self, **extra: str) -> dict[str, str]:
        """Of a worker with this storage."""
        return clean_environment(**{**storage_environment(self.storage), _MARK: self._mark, **extra})

    @contextmanager
    def worker(
        self,
        *arguments: str,
        name: str = "a",
        machine: str = ".",
        wrapper: Sequence[str] = (),
        **environment: str,
    ) -> Iterator[Worker]:
        """A running worker with a state folder of its own name; ended with the block.

        `machine` is the folder below which its jobs' folders are: two of them are two machines, as far as files go.
        """
        place = self.folder / machine
        place.mkdir(exist_ok=True)
        with Worker(
            *("--source", f"local:{self.queue}", *arguments),
            state_dir=self.folder / f"state-{name}",
            env=self.environment(**environment),
            cwd=place,
            wrapper=wrapper,
        ) as worker:
            self.started.append(worker)
            yield worker

    def close(self) -> None:
        """Kill what a failed test left: only descendants of this world's workers carry its mark."""
        self.desk.close()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    process.send_signal(signal.SIGKILL)
