"""Whether a machine is fit for jobs: its disks, its link to storage, and a command of the user's."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from heeler.app.process import RegisterError, Started
from heeler.errors import UsageError
from heeler.platform import checks
from heeler.platform.checks import check_machine
from heeler.platform.link import figure, probe_place
from heeler.settings import Settings
from heeler.status import Status
from heeler_sync.errors import AccessDeniedError, NoSuchBucketError, StoreError, TransientStoreError
from heeler_sync.store.base import ObjectInfo, ObjectStore, Reader, Sink
from heeler_sync.store.memory import MemoryStore
from tests.support.virtual_time import VIRTUAL

MB = 1_000_000
MIB = 1 << 20


class Register:
    """Counts what is started and ended."""

    def __init__(self) -> None:
        self.running: set[Started] = set()
        self.count = 0

    def started(self, process: Started) -> None:
        self.running.add(process)
        self.count += 1

    def ended(self, process: Started) -> None:
        self.running.remove(process)

    def stuck(self, process: Started, pids: Sequence[int]) -> None:
        raise AssertionError(pids)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        state_dir=str(tmp_path / "state"),
        input_dir=str(tmp_path / "not" / "yet" / "{job_id}"),
        checkpoint_dir=str(tmp_path),
        output_dir=str(tmp_path / "output"),
        startup_timeout=5.0,
    )


@pytest.fixture
def status() -> Status:
    return Status(lambda *_: None, worker="w", source="s", mask=lambda text: text.replace("s3cret", "***"))


Fit = Callable[..., Awaitable[list[str]]]


@pytest.fixture
def fit(settings: Settings, status: Status) -> Fit:
    """Checks the machine with these settings, and sees that no process is left."""

    async def check(
        store: ObjectStore | None = None, environment: Mapping[str, str] | None = None, **changes: Any
    ) -> list[str]:
        register = Register()

        def open_store(bucket: str) -> ObjectStore:
            assert store is not None
            assert bucket == store.bucket
            return store

        asked = replace(settings, **changes)
        reasons = await check_machine(asked, open_store, environment or {"PATH": "/usr/bin:/bin"}, register, status)
        assert not register.running
        assert register.count == (asked.check_command is not None)
        return reasons

    return check


class TestDisk:
    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    async def test_nothing_asked_is_nothing_checked(self, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", None)
        assert await fit() == []

    async def test_enough_room(self, fit: Fit) -> None:
        assert await fit(check_disk=1) == []

    async def test_too_little_room_is_said_once_for_a_file_system(self, fit: Fit, tmp_path: Path) -> None:
        (reason,) = await fit(check_disk=10**18)
        assert reason.startswith(f"{tmp_path}/not/yet/{{job_id}} has ")
        assert reason.endswith(" GB free, at least 1000000000 GB asked for by --check-disk")

    async def test_each_file_system_is_looked_at(self, fit: Fit) -> None:
        reasons = await fit(check_disk=10**18, input_dir="/dev/shm/input", output_dir="/dev/shm/output")
        assert [reason.split(" has ")[0] for reason in reasons][:1] == ["/dev/shm/input"]
        assert len(reasons) == 2

    async def test_room_is_what_an_unprivileged_user_has(self, fit: Fit, tmp_path: Path) -> None:
        free = shutil.disk_usage(tmp_path).free
        assert await fit(check_disk=free // 2) == []
        assert len(await fit(check_disk=free * 2)) == 1


class TestCommand:
    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    async def test_a_fit_machine(self, fit: Fit) -> None:
        assert await fit(check_command="true") == []
        assert await fit(check_command="""sh -c 'test "$1" = "a b" && test -z "$HOME"' x 'a b'""") == []

    async def test_no_shell(self, fit: Fit) -> None:
        assert len(await fit(check_command="false || true")) == 1

    async def test_the_environment_is_the_programs(self, fit: Fit) -> None:
        assert await fit(check_command="sh -c 'test \"$GPU\" = 1'", environment={"GPU": "1", "PATH": "/bin"}) == []

    async def test_another_code_gives_its_last_words(self, fit: Fit) -> None:
        script = "echo begin; seq 10000; echo 'NVML: \033[31mno\0device' >&2; echo key s3cret; exit 9"
        (reason,) = await fit(check_command=f"sh -c {script!r}")
        assert reason.startswith("--check-command: 'sh' ended with exit code 9: ")
        assert "s3cret" not in reason
        assert "key ***" in reason
        assert "begin" not in reason
        assert reason.isprintable()
        assert len(reason) < 600

    async def test_silence_and_signals(self, fit: Fit) -> None:
        assert await fit(check_command="sh -c 'kill -SEGV $$'") == [
            "--check-command: 'sh' ended with killed by SIGSEGV"
        ]

    async def test_a_program_that_is_not_there(self, fit: Fit) -> None:
        (reason,) = await fit(check_command="/no/nvidia-smi -L")
        assert reason.startswith("--check-command: '/no/nvidia-smi' can't be started: No such file")

    async def test_one_that_hangs_is_ended_with_its_children(self, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks, "_COMMAND_SECONDS", 0.5)
        begun = time.monotonic()
        (reason,) = await fit(check_command="sh -c 'echo waiting for the driver; sleep 1000 & sleep 1000'")
        assert reason == "--check-command: 'sh' did not end in 0.5 s: waiting for the driver"
        assert time.monotonic() - begun < 8

    @pytest.mark.parametrize("command", ["", "  ", "sh -c 'open"])
    async def test_what_is_no_command(self, fit: Fit, command: str) -> None:
        with pytest.raises(UsageError, match="--check-command"):
            await fit(check_command=command)

    async def test_all_reasons_are_given(self, fit: Fit) -> None:
        assert len(await fit(check_disk=10**18, check_command=f"{sys.executable} -c 1/0")) == 2

    async def test_a_register_that_can_not_be_written(self, settings: Settings, status: Status) -> None:
        class Full(Register):
            def started(self, process: Started) -> None:
                raise RegisterError("no room")

            def ended(self, process: Started) -> None:
                return

        asked = replace(settings, check_command="true")
        assert await check_machine(asked, MemoryStore, {}, Full(), status) == ["--check-command: no room"]


class SlowStore(MemoryStore):
    """A bucket behind a link of so many bytes a second each way; one that fails as it is told."""

    def __init__(self, up: float, down: float, latency: float = 0.0) -> None:
        super().__init__("bucket")
        self.up = up
        self.down = down
        self.latency = latency
        self.sent = 0
        self.failures: dict[str, list[StoreError]] = {}
        self.keys: list[str] = []
        self._readers = 0

    def _fail(self, method: str) -> None:
        if self.failures.get(method):
            raise self.failures[method].pop(0)

    async def put(self, key: str, data: bytes, **options: Any) -> str:
        self.keys.append(key)
        self._fail("put")
        await anyio.sleep(self.latency + len(data) / self.up)
        self.sent += len(data)
        etag = await super().put(key, data, **options)
        self._fail("put_after")
        return etag

    async def upload(self, key: str, reader: Reader, *, metadata: Mapping[str, str] | None = None) -> str:
        parts = []
        while part := reader.read(8 * MIB):
            parts.append(part)
        return await self.put(key, b"".join(parts))

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        self._fail("download")
        data = self.objects()[key]
        await anyio.sleep(self.latency)
        self._readers += 1
        try:
            for start in range(0, len(data), 65_536):
                chunk = data[start : start + 65_536]
                await anyio.sleep(len(chunk) * self._readers / self.down)
                sink(chunk)
        finally:
            self._readers -= 1
        return await super().head(key)

    async def delete(self, key: str) -> None:
        self._fail("delete")
        await super().delete(key)


class TestLink:
    pytestmark = pytest.mark.anyio

    @pytest.fixture
    def anyio_backend(self) -> object:
        return VIRTUAL

    @pytest.fixture(autouse=True)
    def _bucket(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        object.__setattr__(settings, "check_bucket", "s3://bucket/some/place/")

    @pytest.mark.parametrize("rate", [0.02, 0.3, 2, 30, 120])
    @pytest.mark.parametrize("latency", [0.0, 0.1])
    async def test_an_uplink_just_fast_enough_and_just_not(self, fit: Fit, rate: float, latency: float) -> None:
        store = SlowStore(rate * MB, 1e12, latency)
        begun = anyio.current_time()
        assert await fit(store, check_uplink=round(rate * MB * 0.75)) == []
        (reason,) = await fit(store, check_uplink=round(rate * MB * 1.1))
        assert reason.endswith(f" MB/s, at least {figure(rate * 1.1)} MB/s asked for by --check-uplink")
        assert rate * 0.75 <= float(reason.split()[1]) <= rate * 1.001
        assert anyio.current_time() - begun < 40
        assert store.objects() == {}

    @pytest.mark.parametrize("rate", [0.02, 0.3, 2, 30, 120])
    @pytest.mark.parametrize("up", [0.5, 5.0, 100.0])
    async def test_a_downlink_just_fast_enough_and_just_not(self, fit: Fit, rate: float, up: float) -> None:
        store = SlowStore(up * MB, rate * MB, 0.05)
        assert await fit(store, check_downlink=round(rate * MB * 0.6)) == []
        (reason,) = await fit(store, check_downlink=round(rate * MB * 1.1))
        assert reason.startswith("downlink ")
        assert reason.endswith(f" MB/s, at least {figure(rate * 1.1)} MB/s asked for by --check-downlink")
        assert store.objects() == {}

    async def test_the_figures_are_events(self, fit: Fit, status: Status) -> None:
        assert await fit(SlowStore(MB, MB), check_uplink=1000, check_downlink=1000) == []
        assert status.events["uplink_measured"] == status.events["downlink_measured"] == 1

    async def test_a_good_link_costs_little(self, fit: Fit) -> None:
        store = SlowStore(100 * MB, 100 * MB)
        begun = anyio.current_time()
        assert await fit(store, check_uplink=MB, check_downlink=MB) == []
        assert store.sent <= MIB // 4
        assert anyio.current_time() - begun < 5

    async def test_probes_have_unique_keys_at_the_place(self, fit: Fit) -> None:
        store = SlowStore(MB * 100, MB * 100)
        for _ in range(2):
            assert await fit(store, check_uplink=20 * MB, check_downlink=20 * MB) == []
        assert len(set(store.keys)) == len(store.keys) > 2
        assert all(key.startswith("some/place/.heeler/probe-") for key in store.keys)

    async def test_the_link_is_not_measured_on_a_machine_that_is_unfit_anyway(self, fit: Fit) -> None:
        assert len(await fit(MemoryStore("bucket"), check_uplink=1, check_disk=10**18)) == 1

    @pytest.mark.parametrize("error", [AccessDeniedError, NoSuchBucketError])
    @pytest.mark.parametrize("method", ["put", "download"])
    async def test_a_bucket_that_refuses_is_named(
        self, fit: Fit, status: Status, method: str, error: type[StoreError]
    ) -> None:
        store = SlowStore(MB, MB)
        store.failures[method] = [error("PutObject", "bucket", "some/place/.heeler/probe-1", "403 Forbidden")]
        with pytest.raises(UsageError, match=r"s3://bucket/some/place/\.heeler/probe-1: 403.*--check-bucket"):
            await fit(store, check_uplink=1, check_downlink=1)
        assert store.objects() == {}
        assert status.events["probe_left"] == 0

    @pytest.mark.parametrize("method", ["put", "put_after", "download", "delete"])
    async def test_a_hiccup_of_storage_is_passed_over(self, fit: Fit, method: str, status: Status) -> None:
        store = SlowStore(100 * MB, 100 * MB)
        store.failures[method] = [TransientStoreError("X", "bucket", "k", "503")] * 2
        assert await fit(store, check_uplink=1, check_downlink=1) == []
        assert store.objects() == {}
        assert status.events["storage_retried"] == 2

    async def test_a_link_that_carries_nothing_is_a_reason(self, fit: Fit) -> None:
        store = SlowStore(MB, MB)
        store.failures["put_after"] = [TransientStoreError("PutObject", "bucket", "k", "timed out")] * 1000
        (reason,) = await fit(store, check_uplink=1)
        assert reason == "no probe of the link to storage came through: PutObject s3://bucket/k: timed out"
        assert store.objects() == {}

    async def test_a_probe_that_can_not_be_deleted_is_a_fault(self, fit: Fit, status: Status) -> None:
        store = SlowStore(MB, MB)
        store.failures["delete"] = [AccessDeniedError("DeleteObject", "bucket", "some/place/.heeler/probe-1", "403")]
        assert await fit(store, check_uplink=1) == []
        assert status.events["probe_left"] == 1
        assert "s3://bucket/some/place/.heeler/probe-1" in str(status.faults)

    async def test_a_drain_ends_it_and_leaves_no_probe(self, fit: Fit) -> None:
        store = SlowStore(MB * 100, 1000)
        with anyio.move_on_after(1) as scope:
            await fit(store, check_downlink=MB)
        assert scope.cancelled_caught
        assert store.keys
        assert store.objects() == {}


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"check_bucket": "s3://bb/p", "checkpoints": "s3://cc/{job_id}/"}, "s3://bb/p/"),
        ({"check_bucket": "s3://bb"}, "s3://bb/"),
        ({"checkpoints": "s3://cc/a/{job_id}/x/", "outputs": "s3://oo/"}, "s3://cc/a/"),
        ({"checkpoints": "s3://cc/run-{job_id}/"}, "s3://cc/"),
        ({"checkpoints": "s3://cc/a/run-{job_id}"}, "s3://cc/a/"),
        ({"inputs": "s3://ii/x", "outputs": "s3://oo/y/{job_id}"}, "s3://oo/y/"),
        ({"inputs": "s3://ii/x"}, "s3://ii/x/"),
    ],
)
def test_where_probes_are_written(changes: dict[str, Any], place: str) -> None:
    assert str(probe_place(Settings(**changes))) == place


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "--check-bucket"),
        ({"check_bucket": "http://b/"}, "--check-bucket.*s3://bucket/prefix/"),
        ({"check_bucket": "s3://bb/../"}, "--check-bucket"),
        ({"checkpoints": "c"}, "HEELER_CHECKPOINTS"),
    ],
)
def test_no_place_for_probes(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        probe_place(Settings(**changes))
