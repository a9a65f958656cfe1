"""The job documents that `heeler submit` is given: read from a file, split, and completed. Nothing is sent here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from heeler.errors import UsageError
from heeler.job import InvalidJobError


def name_of(file: str) -> str:
    """What to call a file in a message; "-" is standard input."""
    return "standard input" if file == "-" else file


def read_text(file: str) -> str:
    """A file's text.

    Raises:
        UsageError: It can't be read, or is no UTF-8.
    """
    try:
        return read_bytes(file).decode()
    except ValueError as error:
        raise UsageError(f"{name_of(file)} can't be read: {error}") from None


def read_bytes(file: str) -> bytes:
    """A file's bytes.

    Raises:
        UsageError: It can't be read.
    """
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"{name_of(file)} can't be read: {error.strerror}") from None


def split_documents(text: str) -> list[bytes]:
    """The job documents in a text: one object, a list of objects, or one object a line.

    Raises:
        UsageError: It is none of these.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise UsageError("the job document is nested too deeply") from None
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or not lines[0].rstrip().endswith("}"):
            raise UsageError(f"the job document is not JSON: {error}") from None
        return [line.encode() for line in lines]
    documents = data if isinstance(data, list) else [data]
    if not documents:
        raise UsageError("the list of job documents is empty")
    return [json.dumps(document).encode() for document in documents]


def numbered(documents: Sequence[bytes], count: int, make_id: Callable[[], str]) -> list[bytes]:
    """Each document `count` times, with an index from 0 and an id that ends with it.

    Args:
        documents: The documents; what is none is left as it is, to be refused by name.
        count: How often.
        make_id: Gives an id for a document that has none.

    Raises:
        InvalidJobError: A document has an index of its own.
    """
    found: list[bytes] = []
    for document in documents:
        data = _fields(document)
        name = data.get("id") if data is not None else None
        if data is None or not isinstance(name, (str, type(None))):
            found.append(document)
            continue
        if data.get("index") is not None:
            raise InvalidJobError("index", "is there already, and --array gives each job its own: leave one out")
        name = make_id() if name is None else name
        found += [json.dumps({**data, "id": f"{name}-{index}", "index": index}).encode() for index in range(count)]
    return found


def with_run_id(document: bytes, run_id: str) -> bytes:
    """The document as one of that run; what is none is left as it is, to be refused by name."""
    data = _fields(document)
    return document if data is None else json.dumps({**data, "run_id": run_id}).encode()


def _fields(document: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(document)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
