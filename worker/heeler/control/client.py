"""Asking the runtime on this machine, by its control API."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from heeler.control import ADDRESS_FILE, CONTROL_VARIABLE
from heeler.errors import UnavailableError, UsageError
from heeler.settings import Settings

_CONFLICT = 409
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _url(settings: Settings) -> str | None:
    """Where the API is: of the runtime that runs us, else of the state folder's."""
    if url := os.environ.get(CONTROL_VARIABLE):
        return url
    try:
        return (Path(settings.state_dir) / ADDRESS_FILE).read_text(encoding="ascii").strip()
    except OSError:
        return None


def ask(settings: Settings) -> dict[str, Any] | None:
    """All that the runtime knows of itself; None if none answers."""
    url = _url(settings)
    if url is None:
        return None
    try:
        with _OPENER.open(f"{url}/v1/status", timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except (urllib.error.URLError, OSError, ValueError):
        return None


def take_checkpoint(settings: Settings) -> list[dict[str, int]]:
    """Have the running job's checkpoints made durable as they are now; its newest generations.

    Raises:
        UnavailableError: No runtime answers, or storage is out of reach.
        UsageError: No job runs, or its checkpoints are being changed.
    """
    url = _url(settings)
    if url is None:
        where = settings.state_dir
        raise UnavailableError(f"no runtime answers for the state folder {where}; is HEELER_STATE_DIR right?")
    request = urllib.request.Request(f"{url}/v1/checkpoint", method="POST")  # noqa: S310 - a URL of ours
    try:
        # Without a limit: it takes as long as the uplink does, and a runtime that dies closes the connection.
        with _OPENER.open(request) as answer:
            found: list[dict[str, int]] = json.load(answer)["generations"]
            return found
    except urllib.error.HTTPError as error:
        kind = UsageError if error.code == _CONFLICT else UnavailableError
        raise kind(f"no checkpoint was taken: {_said(error)}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UnavailableError(f"the runtime at {url} does not answer: {getattr(error, 'reason', error)}") from None


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return str(error)
