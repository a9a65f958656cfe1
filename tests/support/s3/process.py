"""The server as a process of its own, commanded over its control path."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from .faults import ACTIONS, Action, Match, rule_as_json
from .server import ACCESS_KEY, SECRET_KEY
from .stats import Record, StatsSnapshot

_ROOT = Path(__file__).parents[3]


class ControlClient:
    """The control path of a server, wherever it runs."""

    def __init__(self, host: str, port: int, *, tls: bool = False) -> None:
        """Of the server at this address."""
        self._address = (host, port)
        self._tls = tls

    def call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """One control request.

        Raises:
            RuntimeError: the server refused it.
        """
        connection = (
            http.client.HTTPSConnection(*self._address, timeout=60, context=ssl._create_unverified_context())
            if self._tls
            else http.client.HTTPConnection(*self._address, timeout=60)
        )
        try:
            connection.request(method, f"/_control/{path}", body)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {data.decode(errors='replace')}")
        return data

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """One control request with JSON both ways."""
        return json.loads(self.call(method, path, None if body is None else json.dumps(body).encode()))


class RemoteRule:
    """A fault rule in force in another process."""

    def __init__(self, control: ControlClient, rule_id: int) -> None:
        """As `RemoteFaults.add` made it."""
        self._control = control
        self.rule_id = rule_id

    def _count(self, name: str) -> int:
        rules = self._control.json("GET", "faults")
        return next((int(rule[name]) for rule in rules if rule["id"] == self.rule_id), 0)

    @property
    def hits(self) -> int:
        """Requests that this rule was applied to; 0 once it is removed."""
        return self._count("hits")

    @property
    def held(self) -> int:
        """Requests that this rule stalls now."""
        return self._count("held")

    def wait_hits(self, count: int = 1, timeout: float = 10.0) -> None:
        """Block until the rule has hit `count` requests, at most `timeout` seconds.

        Raises:
            TimeoutError: it has not.
        """
        _poll(lambda: self.hits >= count, timeout, f"rule {self.rule_id} did not hit {count} requests")

    def wait_held(self, count: int = 1, timeout: float = 10.0) -> None:
        """Block until the rule stalls `count` requests at once, at most `timeout` seconds.

        Raises:
            TimeoutError: it does not.
        """
        _poll(lambda: self.held >= count, timeout, f"rule {self.rule_id} did not hold {count} requests")


class RemoteFaults:
    """The fault rules of a server in another process."""

    def __init__(self, control: ControlClient) -> None:
        """Through its control path."""
        self._control = control

    def add(self, action: Action, **match: str | float | None) -> RemoteRule:
        """Do this to the requests that fit; the names of `match` are the fields of `Match`."""
        rule = rule_as_json(Match(**match), action)  # type: ignore[arg-type]
        return RemoteRule(self._control, self._control.json("POST", "faults", rule)["id"])

    def rules(self) -> list[tuple[Match, Action, int]]:
        """Each rule with its hits."""
        found = []
        for rule in self._control.json("GET", "faults"):
            action = dict(rule["action"])
            kind = ACTIONS[action.pop("kind")]
            found.append((Match(**rule["match"]), kind(**action), int(rule["hits"])))
        return found

    def remove(self, rule: RemoteRule) -> None:
        """Take one rule away and let its stalled requests go on."""
        self._control.call("DELETE", f"faults/{rule.rule_id}")

    def release(self) -> None:
        """Let stalled requests go on."""
        self._control.call("POST", "faults/release")

    def clear(self) -> None:
        """Take all rules away and let stalled requests go on."""
        self._control.call("DELETE", "faults")


class RemoteStats:
    """The counts of a server in another process."""

    def __init__(self, control: ControlClient) -> None:
        """Through its control path."""
        self._control = control

    def snapshot(self, *, log: bool = True) -> StatsSnapshot:
        """All of it at this moment."""
        return StatsSnapshot.from_json(self._control.json("GET", "stats?log=1" if log else "stats"))

    def reset(self) -> None:
        """Forget all counts and the log."""
        self._control.call("DELETE", "stats")

    def wait_until(self, condition: Callable[[StatsSnapshot], bool], timeout: float = 10.0) -> StatsSnapshot:
        """Block until a condition holds, at most `timeout` seconds.

        Raises:
            TimeoutError: it did not hold in time.
        """
        _poll(lambda: condition(self.snapshot()), timeout, "the counts did not get there")
        return self.snapshot()

    @property
    def calls(self) -> dict[str, int]:
        """Requests by operation."""
        return self.snapshot(log=False).calls

    @property
    def bytes_in(self) -> int:
        """Body bytes received."""
        return self.snapshot(log=False).bytes_in

    @property
    def bytes_out(self) -> int:
        """Body bytes sent."""
        return self.snapshot(log=False).bytes_out

    @property
    def log(self) -> tuple[Record, ...]:
        """Every request since the last reset."""
        return self.snapshot().log

    def find(self, operation: str | None = None, key: str | None = None) -> list[Record]:
        """The logged requests of an operation, of a key, or of both."""
        return self.snapshot().find(operation, key)


def _poll(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} within {timeout} s")
        time.sleep(0.005)


class S3Process:
    """`python -m tests.support.s3` as a child. `with S3Process.start(buckets=["b"]) as server: ...`."""

    def __init__(self, process: subprocess.Popen[str], url: str, access_key: str, secret_key: str) -> None:
        """A child that listens: use `start`."""
        self._process = process
        self.url = url
        self.access_key = access_key
        self.secret_key = secret_key
        scheme, host, port = url.replace("//", "").split(":")
        self.port = int(port)
        self.control = ControlClient(host, self.port, tls=scheme == "https")
        self.faults = RemoteFaults(self.control)
        self.stats = RemoteStats(self.control)

    @classmethod
    def start(
        cls,
        *,
        rules: Iterable[str] = (),
        buckets: Iterable[str] = (),
        access_key: str = ACCESS_KEY,
        secret_key: str = SECRET_KEY,
        port: int = 0,
        certificate: Path | None = None,
    ) -> S3Process:
        """Start the child and wait until it listens; `rules` are texts such as `write_interval=0`.

        Raises:
            RuntimeError: it did not start.
        """
        command = [sys.executable, "-m", "tests.support.s3", "--port", str(port), "--until-stdin-closes"]
        command += ["--access-key", access_key, "--secret-key", secret_key]
        if certificate is not None:
            command += ["--certificate", str(certificate)]
        for rule in rules:
            command += ["--rule", rule]
        for bucket in buckets:
            command += ["--bucket", bucket]
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            _end(process)
            raise RuntimeError(f"the S3 server did not start; its exit code is {process.returncode}")
        return cls(process, url, access_key, secret_key)

    def __enter__(self) -> S3Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and self._process.returncode != 0:
            raise RuntimeError(f"the S3 server ended with exit code {self._process.returncode}")

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def stop(self) -> None:
        """End the child."""
        _end(self._process)

    def create_bucket(self, bucket: str) -> None:
        """Make a bucket."""
        self.control.call("PUT", f"buckets/{bucket}")

    def keys(self, bucket: str) -> list[str]:
        """Every key."""
        return list(self.control.json("GET", f"objects/{bucket}"))

    def get(self, bucket: str, key: str) -> bytes:
        """One object's bytes, uncounted."""
        return self.control.call("GET", f"object/{bucket}/{quote(key)}")

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Every key with its bytes, uncounted."""
        return {key: self.get(bucket, key) for key in self.keys(bucket)}

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object past limits and conditions, uncounted."""
        self.control.call("PUT", f"object/{bucket}/{quote(key)}", data)

    def uploads(self, bucket: str) -> list[dict[str, Any]]:
        """The unfinished multipart uploads: `key`, `upload_id` and the numbers of their `parts`."""
        found: list[dict[str, Any]] = self.control.json("GET", f"uploads/{bucket}")
        return found


def _end(process: subprocess.Popen[str]) -> None:
    """Close the child's stdin, on which it ends; kill it if it does not."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
