"""Names of objects that are written once: they carry the epoch that wrote them, and are never used twice."""

from __future__ import annotations

import re
import secrets

_ID = re.compile(r"([1-9][0-9]{0,17})-[0-9a-f]{32}")


def new_id(epoch: int) -> str:
    """A name that was never used: of a pack, or of a manifest."""
    return f"{epoch}-{secrets.token_hex(16)}"


def epoch_of(name: str) -> int | None:
    """The epoch in an id; None if it is no id of ours."""
    found = _ID.fullmatch(name)
    return int(found.group(1)) if found else None
