"""Keys to relative paths and back, and nothing else: pure functions, no file is touched here.

An object key comes from outside. It becomes a path below a job's folder only if every part of it is a plain
name; anything else is refused by name (Kelpie wrote `../` keys outside the folder).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from heeler_sync.errors import BadLocationError, UnsafeKeyError

OWN_FOLDER = ".heeler"
"""The folder that belongs to heeler inside every synced folder and prefix; never mirrored."""

NOT_A_FILE_OF_THE_JOB = {OWN_FOLDER, "lost+found"}
"""Names at a folder's top that are neither mirrored nor moved; the second belongs to the file system."""

_MAX_NAME_BYTES = 255
"""Linux file systems' limit of one name (NAME_MAX), in bytes."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


@dataclass(frozen=True)
class Location:
    """A bucket and a prefix; the prefix is empty or ends in "/"."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def key(self, relative: str) -> str:
        """The key of the file at `relative` ("/"-separated, below the folder)."""
        return self.prefix + relative


def location(bucket: str, prefix: str) -> Location:
    """A checked `Location`; a prefix gets a "/" at its end.

    Raises:
        BadLocationError: The bucket is no bucket name, or the prefix has empty, "." or ".." parts.
    """
    if not _BUCKET.fullmatch(bucket):
        raise BadLocationError(f"{bucket!r} is not a bucket name")
    prefix = prefix.removeprefix("/")
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    if any(part in ("", ".", "..") for part in prefix.split("/")[:-1]):
        raise BadLocationError(f"prefix {prefix!r} has an empty, '.' or '..' part")
    return Location(bucket, prefix)


def parse_location(url: str) -> Location:
    """Parse "s3://bucket/prefix/".

    Raises:
        BadLocationError: It is not of that form.
    """
    scheme, separator, rest = url.partition("://")
    if scheme != "s3" or not separator:
        raise BadLocationError(f"{url!r} is not of the form s3://bucket/prefix/")
    bucket, _, prefix = rest.partition("/")
    return location(bucket, prefix)


def relative_path(key: str, prefix: str) -> str:
    """The path, below the folder that `prefix` stands for, of the object `key`.

    Raises:
        UnsafeKeyError: The key would leave the folder or can't be a file's name on this system.
    """
    if not key.startswith(prefix):
        raise UnsafeKeyError(key, f"it is not below the prefix {prefix!r}")
    relative = key[len(prefix) :]
    for part in relative.split("/"):
        if part in ("", ".", ".."):
            raise UnsafeKeyError(key, f"its part {part!r} leads out of its folder or nowhere")
        if why := why_no_key(part):
            raise UnsafeKeyError(key, why)
        if len(part.encode("utf-8", "surrogateescape")) > _MAX_NAME_BYTES:
            raise UnsafeKeyError(key, f"a part of it is longer than {_MAX_NAME_BYTES} bytes")
    return relative


def why_no_key(relative: str) -> str | None:
    """Why a local file's name can't be a key that every store and tool takes; None if it can."""
    try:
        relative.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    if any(ord(character) < 32 or ord(character) == 127 for character in relative):
        return "its name contains a control character"
    return None


def is_own(relative: str) -> bool:
    """Whether a relative path is heeler's own and so never mirrored."""
    return OWN_FOLDER in relative.split("/")
