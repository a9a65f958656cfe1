"""What a session is made of: the folders of one job, and what snapshot folders need."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from heeler_sync.restore import SyncFolder
from heeler_sync.snapshot.committer import SnapshotTimes
from heeler_sync.snapshot.holder import Claim
from heeler_sync.snapshot.index import FileIndex, MemoryIndex
from heeler_sync.snapshot.session import Fences
from heeler_sync.snapshot.uploads import NoUploads, Uploads


@dataclass(frozen=True)
class Plan:
    """The folders of one job.

    Attributes:
        before: Downloaded by `restore`.
        during: Mirrored while `watching`.
        after: Uploaded by `publish`.
        spare: To be there and empty at the start, where nobody else uses them.
    """

    before: tuple[SyncFolder, ...] = ()
    during: tuple[SyncFolder, ...] = ()
    after: tuple[SyncFolder, ...] = ()
    spare: tuple[Path, ...] = ()

    def roots(self) -> list[Path]:
        """All local folders, each once."""
        return list(dict.fromkeys(folder.path for folder in (*self.before, *self.during, *self.after)))


@dataclass(frozen=True)
class Unsent:
    """What would be lost if the machine vanished now.

    Attributes:
        files: How many files have a state that is not durable.
        bytes: Their size.
        oldest: Seconds since the oldest of these changes was seen; 0 if there is none.
    """

    files: int
    bytes: int
    oldest: float


@dataclass(frozen=True)
class SnapshotSettings:
    """What snapshot folders need.

    Attributes:
        claim: Who holds their prefixes.
        fences: Knows which stores enforce conditions; shared by all sessions of a process.
        times: When to commit.
        keep: How many generations are kept.
        index: Keeps what was read of files.
        spool: A folder of our own for what waits for the uplink.
        uploads: The journal of what commits under way have uploaded.
    """

    claim: Claim = field(default_factory=Claim)
    fences: Fences | None = None
    times: SnapshotTimes = field(default_factory=SnapshotTimes)
    keep: int = 2
    index: FileIndex = field(default_factory=MemoryIndex)
    spool: Path | None = None
    uploads: Uploads = field(default_factory=NoUploads)
