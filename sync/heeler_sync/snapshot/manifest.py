"""What one generation holds: every file with its chunks, folders and links. Data and its one encoding; no I/O.

A manifest comes back from storage, which others may write: whatever would leave the folder, or be two things at once,
is refused when it is read. The format stands in docs/snapshot-format.md, to the byte.
"""

from __future__ import annotations

import itertools
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import zstandard

from heeler_sync.errors import SyncError
from heeler_sync.paths import is_own
from heeler_sync.snapshot.chunks import CHUNK_BYTES, DIGEST_BYTES, Codec, chunk_count
from heeler_sync.snapshot.ids import epoch_of

FORMAT = 1
_LEVEL = 3
_MAX_BYTES = 1 << 30
_MAX_NAME_BYTES = 255
_MOST = (1 << 63) - 1


class BadManifestError(SyncError):
    """An object is no manifest that can be used."""


class UnknownFormatError(SyncError):
    """An object was written in a format that this version does not know; a newer heeler can read it."""

    def __init__(self, what: str, found: object) -> None:
        super().__init__(f"{what} has format {found!r}, and this heeler knows {FORMAT}: use a newer heeler")


@dataclass(frozen=True)
class Place:
    """Where a chunk is stored.

    Attributes:
        pack: The pack's id.
        offset: Of its first byte in the pack.
        stored: Bytes there.
        size: Bytes of the chunk itself.
        codec: How it is stored.
    """

    pack: str
    offset: int
    stored: int
    size: int
    codec: Codec


@dataclass(frozen=True)
class FileEntry:
    """A file. `chunks` are the digests of its chunks in order; `mode` has the permission bits only."""

    path: str
    mode: int
    mtime_ns: int
    size: int
    chunks: tuple[bytes, ...]


@dataclass(frozen=True)
class Tree:
    """A folder at one instant.

    Attributes:
        files: By path.
        folders: Permission bits by path, of every folder below the root.
        links: Targets by path; each relative, and inside the root.
    """

    files: Mapping[str, FileEntry] = field(default_factory=dict)
    folders: Mapping[str, int] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def digests(self) -> set[bytes]:
        """All chunks that it needs."""
        return set(itertools.chain.from_iterable(entry.chunks for entry in self.files.values()))


@dataclass(frozen=True)
class Manifest:
    """One generation.

    Attributes:
        generation: Its number, from 1.
        epoch: The epoch that committed it.
        created: Seconds since 1970; for people only.
        tree: What it holds.
        places: Where each of its chunks is.
        packs: The size in bytes of each pack that `places` names.
        chunk_bytes: The chunk size of its files.
    """

    generation: int
    epoch: int
    created: float
    tree: Tree
    places: Mapping[bytes, Place]
    packs: Mapping[str, int]
    chunk_bytes: int = CHUNK_BYTES


def encode(manifest: Manifest) -> bytes:
    """The object's bytes."""
    packs = sorted(manifest.packs)
    number = {pack: index for index, pack in enumerate(packs)}
    placed = sorted(manifest.places.items(), key=lambda item: (number[item[1].pack], item[1].offset))
    row = {digest: index for index, (digest, _) in enumerate(placed)}
    tree = manifest.tree
    document = {
        "format": FORMAT,
        "generation": manifest.generation,
        "epoch": manifest.epoch,
        "created": manifest.created,
        "chunk_bytes": manifest.chunk_bytes,
        "packs": [[pack, manifest.packs[pack]] for pack in packs],
        "chunks": [
            [digest.hex(), number[place.pack], place.offset, place.stored, place.size, int(place.codec)]
            for digest, place in placed
        ],
        "folders": [[path, mode] for path, mode in sorted(tree.folders.items())],
        "links": [[path, target] for path, target in sorted(tree.links.items())],
        "files": [
            [entry.path, entry.mode, entry.mtime_ns, entry.size, _runs(row[digest] for digest in entry.chunks)]
            for _, entry in sorted(tree.files.items())
        ],
    }
    text = json.dumps(document, separators=(",", ":")).encode("ascii")
    return bytes(zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(text))


def _runs(rows: Iterable[int]) -> list[list[int]]:
    """Rows as runs of [first, count]."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][0] + runs[-1][1] == row:
            runs[-1][1] += 1
        else:
            runs.append([row, 1])
    return runs


def decode(data: bytes) -> Manifest:
    """The manifest in an object's bytes.

    Raises:
        UnknownFormatError: It was written by a newer heeler.
        BadManifestError: It is damaged, or names something that can't be.
    """
    try:
        if zstandard.get_frame_parameters(data).content_size > _MAX_BYTES:  # or not said, which is 2**64 - 1
            raise BadManifestError("unpacks to more than any manifest has")
        text = zstandard.ZstdDecompressor().decompress(data)
        document = json.loads(text)
    except (zstandard.ZstdError, ValueError, RecursionError, MemoryError) as error:
        raise BadManifestError(f"can't be read: {error}") from None
    if not isinstance(document, dict):
        raise BadManifestError("is not a JSON object")
    if document.get("format") != FORMAT:
        raise UnknownFormatError("the manifest", document.get("format"))
    try:
        return _manifest(document)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise BadManifestError(f"is not as it should be: {type(error).__name__} {error}") from None


def _manifest(document: Mapping[str, Any]) -> Manifest:
    chunk_bytes = _natural(document["chunk_bytes"], least=1)
    packs = {str(pack): _natural(size, least=1) for pack, size in document["packs"]}
    names = list(packs)
    if not all(epoch_of(name) for name in names):
        raise ValueError("a pack's id is none")
    table = [_chunk(row, names, packs, chunk_bytes) for row in document["chunks"]]
    files = [_file(row, table, chunk_bytes) for row in document["files"]]
    tree = Tree(
        files={entry.path: entry for entry in files},
        folders={path: _mode(mode) for path, mode in document["folders"]},
        links=dict(document["links"]),
    )
    if len(tree.files) + len(tree.folders) + len(tree.links) != sum(
        len(document[part]) for part in ("files", "folders", "links")
    ):
        raise ValueError("a path is listed twice")
    check_tree(tree)
    return Manifest(
        generation=_natural(document["generation"], least=1),
        epoch=_natural(document["epoch"], least=1),
        created=float(document["created"]),
        tree=tree,
        places=dict(table),
        packs=packs,
        chunk_bytes=chunk_bytes,
    )


def _natural(value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= _MOST:
        raise ValueError(f"{value!r} is not a whole number from {least} on")
    return value


def _mode(value: object) -> int:
    return _natural(value) & 0o777


def _chunk(row: Sequence[Any], names: Sequence[str], packs: Mapping[str, int], chunk_bytes: int) -> tuple[bytes, Place]:
    name, number, offset, stored, size, codec = row
    digest = bytes.fromhex(name)
    pack = names[_natural(number)]
    place = Place(pack, _natural(offset), _natural(stored, least=1), _natural(size, least=1), Codec(codec))
    if len(digest) != DIGEST_BYTES or size > chunk_bytes or place.offset + place.stored > packs[pack]:
        raise ValueError(f"chunk {name[:16]} can't be where it is said to be")
    return digest, place


def _file(row: Sequence[Any], table: Sequence[tuple[bytes, Place]], chunk_bytes: int) -> FileEntry:
    path, mode, mtime_ns, size, runs = row
    if sum(_natural(count) for _, count in runs) != chunk_count(_natural(size), chunk_bytes):
        raise ValueError(f"file {path!r} has another number of chunks than {size} bytes have")
    rows = list(_rows(runs, len(table)))
    for index, number in enumerate(rows):
        if table[number][1].size != min(chunk_bytes, size - index * chunk_bytes):
            raise ValueError(f"chunk {index} of file {path!r} has another size")
    if type(mtime_ns) is not int or not -_MOST <= mtime_ns <= _MOST:
        raise ValueError(f"file {path!r} has no time")
    return FileEntry(path, _mode(mode), mtime_ns, size, tuple(table[number][0] for number in rows))


def _rows(runs: Sequence[Sequence[int]], rows: int) -> Iterator[int]:
    for first, count in runs:
        if _natural(first) + _natural(count) > rows:
            raise ValueError("a file has a chunk that is not listed")
        yield from range(first, first + count)


def check_tree(tree: Tree) -> None:
    """Whether the tree can be made inside a folder, and only there.

    Raises:
        ValueError: A path leads out of it or nowhere, or is below something that is no folder.
    """
    for path in itertools.chain(tree.files, tree.folders, tree.links):
        _check_path(path)
    if tree.files.keys() & tree.folders.keys() or (tree.files.keys() | tree.folders.keys()) & tree.links.keys():
        raise ValueError("a path is two things at once")
    for path in itertools.chain(tree.files, tree.folders, tree.links):
        parent = posixpath.dirname(path)
        if parent and parent not in tree.folders:
            raise ValueError(f"{path!r} is not below a folder of the tree")
    for path, target in tree.links.items():
        if why := why_not_link(path, target):
            raise ValueError(f"link {path!r}: {why}")


def _check_path(path: object) -> None:
    if not isinstance(path, str):
        raise ValueError(f"{path!r} is no path")  # noqa: TRY004 - one kind of error for what comes from outside
    if "\0" in path or is_own(path) or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} can't be a path of the tree")
    if any(len(part.encode("utf-8", "surrogateescape")) > _MAX_NAME_BYTES for part in path.split("/")):
        raise ValueError(f"a part of {path!r} is longer than {_MAX_NAME_BYTES} bytes")


def why_not_link(path: str, target: object) -> str | None:
    """Why a symbolic link at `path` is no link inside the tree; None if it is one. Looks at names only."""
    if not isinstance(target, str) or not target or "\0" in target:
        return "it has no target"
    if target.startswith("/"):
        return "it leads out of the folder"
    parts = [part for part in target.split("/") if part not in ("", ".")]
    up = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    if up > path.count("/"):
        return "it leads out of the folder"
    if ".." in parts[up:]:  # behind a name that is itself a link, it may lead anywhere
        return "it has '..' behind a name"
    if is_own("/".join(parts)):
        return "it leads into heeler's own folder"
    return None
