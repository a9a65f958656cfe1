"""One page of a sorted listing: prefix, delimiter, marker and limit, as both ListObjects calls have them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

_LAST = 0x10FFFF


@dataclass(slots=True)
class Page:
    """Some keys and common prefixes, and from where to go on."""

    keys: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    truncated: bool = False
    last: str = ""
    """The last key or common prefix of the page: the marker of the next one."""


def list_page(keys: Sequence[str], *, prefix: str, delimiter: str, after: str, limit: int) -> Page:
    """The first `limit` entries that begin with `prefix` and come after `after`.

    A common prefix ends with its delimiter and counts as one entry; an `after` that is itself such a prefix
    skips all of its keys.
    """
    page = Page()
    if after and delimiter and after.startswith(prefix) and after[len(prefix) :].endswith(delimiter):
        index = _past(keys, after)
    elif after >= prefix and after:
        index = bisect_right(keys, after)
    else:
        index = bisect_left(keys, prefix)
    while index < len(keys) and keys[index].startswith(prefix):
        if len(page.keys) + len(page.prefixes) >= limit:
            page.truncated = limit > 0
            break
        key = keys[index]
        cut = key.find(delimiter, len(prefix)) if delimiter else -1
        if cut < 0:
            page.keys.append(key)
            page.last = key
            index += 1
        else:
            common = key[: cut + len(delimiter)]
            index = _past(keys, common)
            if common > after:
                page.prefixes.append(common)
                page.last = common
    return page


def _past(keys: Sequence[str], prefix: str) -> int:
    """Index of the first key after all that begin with a prefix."""
    while prefix:
        if ord(prefix[-1]) < _LAST:
            return bisect_left(keys, prefix[:-1] + chr(ord(prefix[-1]) + 1))
        prefix = prefix[:-1]
    return len(keys)
