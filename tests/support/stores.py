"""Wrappers round any store that fail as a test scripted, and what a test of sync needs besides."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import anyio
from blake3 import blake3

from heeler_sync.errors import TransientStoreError
from heeler_sync.store.base import DIGEST_KEY, Condition, ObjectInfo, ObjectStore, Reader, Sink
from heeler_sync.store.memory import MemoryStore
from heeler_sync.store.providers import PROVIDERS, Provider
from heeler_sync.store.retry import Backoff, RetryPolicy

KIB = 1 << 10

SMALL_PARTS = replace(PROVIDERS["s3"], name="small", part_bytes=64 * KIB)
"""A provider whose large files are small enough for tests."""

IMPATIENT = RetryPolicy(patience=5.0, backoff=lambda: Backoff(base=0.001, cap=0.002))


def transient(operation: str = "GetObject") -> TransientStoreError:
    """A failure that may pass."""
    return TransientStoreError(operation, "memory", "k", "503")


def digest(data: bytes) -> dict[str, str]:
    """The metadata of an object with these bytes."""
    return {DIGEST_KEY: blake3(data).hexdigest()}


class ScriptedStore:
    """Passes all on to a store, but for what is scripted per method.

    An entry of a script is an exception to raise instead, `("after", exception)` to do it and raise all the same, an
    async function to await before, or None to pass on. `calls` holds method and key.
    """

    def __init__(self, store: ObjectStore | None = None, **scripts: Sequence[object]) -> None:
        self.inner: ObjectStore = store or MemoryStore(provider=SMALL_PARTS)
        self.scripts = {name: list(entries) for name, entries in scripts.items()}
        self.calls: list[tuple[str, str]] = []
        self.conditions: list[Condition | None] = []
        self.at_once = 0
        self.most_at_once = 0

    @property
    def bucket(self) -> str:
        return self.inner.bucket

    @property
    def provider(self) -> Provider:
        return self.inner.provider

    def objects(self) -> dict[str, bytes]:
        """All that is stored in the `MemoryStore` at the bottom."""
        store = self.inner
        while isinstance(store, ScriptedStore):
            store = store.inner
        assert isinstance(store, MemoryStore)
        return store.objects()

    def count(self, method: str, key: str | None = None) -> int:
        """How often a method was called."""
        return sum(1 for name, asked in self.calls if name == method and key in (None, asked))

    async def _begin(self, method: str, key: str) -> BaseException | None:
        self.calls.append((method, key))
        script = self.scripts.get(method)
        entry = script.pop(0) if script else None
        if isinstance(entry, BaseException):
            raise entry
        if isinstance(entry, tuple):
            error: BaseException = entry[1]
            return error
        if callable(entry):
            await entry()
        return None

    async def _do(self, method: str, key: str, call: Callable[[], Awaitable[object]]) -> object:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            after = await self._begin(method, key)
            answer = await call()
            if after is not None:
                raise after
            return answer
        finally:
            self.at_once -= 1

    async def head(self, key: str) -> ObjectInfo:
        found = await self._do("head", key, lambda: self.inner.head(key))
        assert isinstance(found, ObjectInfo)
        return found

    async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
        await self._begin("list", prefix)
        async for page in self.inner.list(prefix):
            yield page

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        found = await self._do(
            "download", key, lambda: self.inner.download(key, sink, offset=offset, if_match=if_match)
        )
        assert isinstance(found, ObjectInfo)
        return found

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        found = await self._do("read", key, lambda: self.inner.read(key, offset=offset, length=length))
        assert isinstance(found, bytes)
        return found

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        self.conditions.append(condition)
        call = lambda: self.inner.put(key, data, metadata=metadata, condition=condition)  # noqa: E731
        return str(await self._do("put", key, call))

    async def upload(self, key: str, reader: Reader, *, metadata: Mapping[str, str] | None = None) -> str:
        return str(await self._do("upload", key, lambda: self.inner.upload(key, reader, metadata=metadata)))

    async def delete(self, key: str) -> None:
        await self._do("delete", key, lambda: self.inner.delete(key))


class CuttingStore(ScriptedStore):
    """Ends downloads early: each entry of `cuts` is how many bytes the next one brings; None means all."""

    def __init__(self, store: ObjectStore | None = None, cuts: Sequence[int | None] = ()) -> None:
        super().__init__(store)
        self.cuts = list(cuts)
        self.offsets: list[int] = []

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        self.offsets.append(offset)
        cut = self.cuts.pop(0) if self.cuts else None
        collected = bytearray()
        info = await self.inner.download(key, collected.extend, offset=offset, if_match=if_match)
        sink(bytes(collected[:cut]))
        if cut is not None:
            raise transient()
        return info


class Events:
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, object]]] = []

    def __call__(self, name: str, fields: Mapping[str, object]) -> None:
        self.seen.append((name, dict(fields)))

    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for a condition, looked at every few milliseconds."""
    with anyio.move_on_after(seconds):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event of its own
            await anyio.sleep(0.002)
    assert condition(), f"not so within {seconds} s"
