"""Ends a process of ours at one exact operation: a call of storage, a change of a file or of a journal.

A `Fuse` counts the operations of all that is wired to it, and blows at one of them. From then on everything that is
wired to it raises, so that no `finally` and no `except` of a dead process does more than a killed one could.
"""

from __future__ import annotations

import enum
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from heeler_sync.snapshot.head import Head
from heeler_sync.snapshot.holder import Adoptable
from heeler_sync.snapshot.index import FileIndex, Indexed
from heeler_sync.snapshot.packs import Pack
from heeler_sync.snapshot.uploads import Uploads
from heeler_sync.store.base import Condition, ObjectInfo, ObjectStore, Reader, Sink
from heeler_sync.store.providers import Provider


class CrashError(BaseException):
    """The process is dead."""


class When(enum.Enum):
    """Where in an operation the process ends."""

    BEFORE = "before it"
    AFTER = "after it took effect, before its answer"
    TORN = "in the middle of it"


class Fuse:
    """Counts operations, and blows at one of them: by number (from 0), by phase and name, or never."""

    def __init__(self, at: int | tuple[str, str] | None = None, when: When = When.BEFORE) -> None:
        self.operations: list[tuple[str, str]] = []
        """Phase and name of each, in the order of their beginnings."""
        self.phase = ""
        self.dead = False
        self._at = at
        self._when = when
        self._blown = "no operation"
        self._lock = threading.Lock()

    @property
    def last(self) -> str:
        """The operation that it blew at, for a failure's message."""
        return f"{self._blown}, {self._when.value}"

    def begin(self, name: str) -> When | None:
        """An operation begins; how it is to end the process, if it is to do so later than now."""
        with self._lock:
            self.check()
            self.operations.append((self.phase, name))
            if self._at not in (len(self.operations) - 1, self.operations[-1]):
                return None
            self._blown = f"{self.phase}: {name}"
            if self._when is When.BEFORE:
                self.dead = True
            self.check()
            return self._when

    def end(self, fate: When | None) -> None:
        """It took effect."""
        with self._lock:
            self.dead = self.dead or fate is not None
            self.check()

    def check(self) -> None:
        """Raises if the process is dead."""
        if self.dead:
            raise CrashError

    def around(self, name: str, call: Callable[[], Any], torn: Callable[[], object] | None = None) -> Any:
        """One blocking operation."""
        fate = self.begin(name)
        try:
            return torn() if fate is When.TORN and torn is not None else call()
        finally:
            self.end(fate)


class CrashingStore:
    """A store as one process sees it."""

    def __init__(self, inner: ObjectStore, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse

    @property
    def bucket(self) -> str:
        return self._inner.bucket

    @property
    def provider(self) -> Provider:
        return self._inner.provider

    @contextmanager
    def _one(self, name: str, key: str) -> Iterator[None]:
        fate = self._fuse.begin(f"{name} {key}")
        try:
            yield
        finally:
            self._fuse.end(fate)

    async def head(self, key: str) -> ObjectInfo:
        with self._one("head", key):
            return await self._inner.head(key)

    async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
        with self._one("list", prefix):
            pages = [page async for page in self._inner.list(prefix)]
        for page in pages:
            yield page

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        with self._one("download", key):
            return await self._inner.download(key, sink, offset=offset, if_match=if_match)

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        with self._one("read", key):
            return await self._inner.read(key, offset=offset, length=length)

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        with self._one("put", key):
            return await self._inner.put(key, data, metadata=metadata, condition=condition)

    async def upload(self, key: str, reader: Reader, *, metadata: Mapping[str, str] | None = None) -> str:
        with self._one("upload", key):
            return await self._inner.upload(key, reader, metadata=metadata)

    async def delete(self, key: str) -> None:
        with self._one("delete", key):
            await self._inner.delete(key)


class CrashingIndex:
    """A file index as one process sees it."""

    def __init__(self, inner: FileIndex, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse

    def load(self, root: Path) -> dict[str, Indexed]:
        found: dict[str, Indexed] = self._fuse.around("index load", lambda: self._inner.load(root))
        return found

    def update(self, root: Path, changed: Mapping[str, Indexed], gone: Iterable[str]) -> None:
        self._fuse.around("index update", lambda: self._inner.update(root, changed, gone))


class CrashingUploads:
    """A journal of uploads as one process sees it."""

    def __init__(self, inner: Uploads, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse

    def note(self, location: str, head: Head, pack: Pack) -> None:
        self._fuse.around("journal note", lambda: self._inner.note(location, head, pack))

    def clear(self, location: str) -> bool:
        return bool(self._fuse.around("journal clear", lambda: self._inner.clear(location)))

    def load(self, location: str, head: Head) -> Mapping[str, Adoptable]:
        found: Mapping[str, Adoptable] = self._fuse.around("journal load", lambda: self._inner.load(location, head))
        return found


_OF_OS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "symlink", "chmod", "utime", "ftruncate")
_OF_PATH = ("rename", "replace", "unlink", "rmdir", "mkdir", "symlink_to", "chmod", "write_bytes")


@contextmanager
def crashing_files(fuse: Fuse) -> Iterator[None]:
    """While the block runs, every change of a file or folder by Python code of this process is an operation of `fuse`.

    What one operation calls itself (`Path.unlink` calls `os.unlink`) is not counted again. `os.fsync` does nothing: a
    process that dies loses nothing that the kernel has.
    """
    inside = threading.local()

    def counted(name: str, real: Callable[..., Any], torn: Callable[..., object] | None = None) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if getattr(inside, "now", False):
                return real(*arguments, **options)
            inside.now = True
            try:
                cut = None if torn is None else lambda: torn(*arguments, **options)
                path = next((str(item) for item in arguments if isinstance(item, str | os.PathLike)), "")
                return fuse.around(f"{name} {Path(path).name}", lambda: real(*arguments, **options), cut)
            finally:
                inside.now = False

        return operation

    def torn_write(descriptor: int, data: Any, offset: int) -> None:
        view = memoryview(data)
        real_pwrite(descriptor, view[: len(view) // 2], offset)

    def opened(*arguments: Any, **options: Any) -> Any:
        flags = arguments[1] if len(arguments) > 1 else options["flags"]
        return (creating if flags & os.O_CREAT else real_open)(*arguments, **options)

    real_pwrite, real_open = os.pwrite, os.open
    creating = counted("create", real_open)
    with pytest.MonkeyPatch.context() as patch:
        for name in _OF_OS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        for name in _OF_PATH:
            patch.setattr(Path, name, counted(name, getattr(Path, name)))
        patch.setattr(os, "pwrite", counted("pwrite", real_pwrite, torn_write))
        patch.setattr(os, "open", opened)
        patch.setattr(os, "fsync", lambda _descriptor: fuse.check())
        yield
