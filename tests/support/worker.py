"""The real command line as a process: `heeler run` started, listened to, signalled and ended by its pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_WAIT_SECONDS = 30.0


def clean_environment(**extra: str) -> dict[str, str]:
    """Our environment without any name that heeler would read, and `extra`."""
    prefixes = ("HEELER_", "AWS_", "R2_", "SQS_", "SALAD_", "KELPIE_", "FILE_WATCHER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def storage_environment(server: Any) -> dict[str, str]:
    """The names that point a worker at an `S3Server` or `S3Process`."""
    return {
        "AWS_ENDPOINT_URL_S3": server.url,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_REGION": "us-east-1",
    }


def heeler(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str = "",
    timeout: float = 60.0,
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "heeler", *arguments],
        env=dict(env) if env is not None else clean_environment(),
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class Worker:
    """A running `heeler run`. Its log lines are parsed as they come; `with` ends it, come what may."""

    def __init__(
        self,
        *arguments: str,
        state_dir: Path,
        env: Mapping[str, str],
        cwd: Path,
        control: str | None = "off",
        wrapper: Sequence[str] = (),
        command: str = "run",
    ) -> None:
        """Start it; `wrapper` is put before the command (as `unshare ...`). No control: as the defaults say."""
        given = [] if control is None else ["--control", control]
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "heeler", command, *given, *arguments],
            env={**env, "HEELER_STATE_DIR": str(state_dir)},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.events: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.stdout = b""
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read_log, daemon=True),
            threading.Thread(target=self._read_output, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """The runtime's process."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for raw in self.process.stderr:
            line = raw.decode(errors="replace").rstrip("\n")
            try:
                event = json.loads(line[line.index("{") :])
            except ValueError:
                event = None
            with self._changed:
                self.lines.append(line)
                if isinstance(event, dict) and "event" in event:
                    self.events.append({**event, "_seen": time.monotonic()})
                self._changed.notify_all()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 65536):
            with self._changed:
                self.stdout += data
                self._changed.notify_all()

    def find(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of that name so far that have these fields."""
        with self._changed:
            return [
                entry
                for entry in self.events
                if entry["event"] == event and all(entry.get(name) == value for name, value in fields.items())
            ]

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = _WAIT_SECONDS) -> Any:
        """Wait for a condition on what the worker has said; asked again at each line and every 50 ms."""
        deadline = time.monotonic() + timeout
        while True:
            if found := condition():
                return found
            with self._changed:
                if time.monotonic() > deadline:
                    raise AssertionError(f"no {what} within {timeout} s; log:\n" + "\n".join(self.lines[-60:]))
                self._changed.wait(0.05)

    def wait_for(self, event: str, *, count: int = 1, timeout: float = _WAIT_SECONDS, **fields: Any) -> dict[str, Any]:
        """Wait until an event of that name with these fields was logged `count` times; the last of them."""

        def seen() -> list[dict[str, Any]]:
            found = self.find(event, **fields)
            return found if len(found) >= count else []

        found: list[dict[str, Any]] = self.wait_until(seen, f"event {event} {fields}", timeout)
        return found[count - 1]

    def phase(self) -> str:
        """The phase it last said that it is in."""
        phases = self.find("phase")
        return str(phases[-1]["phase"]) if phases else "start"

    def signal(self, number: int) -> None:
        """Send a signal to the runtime alone."""
        self.process.send_signal(number)

    def wait(self, timeout: float = _WAIT_SECONDS) -> int:
        """Its exit code (negative for a signal), once it and its output have ended."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {timeout} s; log:\n" + "\n".join(self.lines[-60:])) from None
        for thread in self._threads:
            thread.join(5)
        return code

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
