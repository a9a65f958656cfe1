"""URLs that people give us, checked."""

from __future__ import annotations

from urllib.parse import urlsplit


def check_webhook(value: str) -> str:
    """The URL, if a webhook can be sent to it.

    Raises:
        ValueError: It can't.
    """
    try:
        parts = urlsplit(value)
        fit = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fit = False
    if not fit or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError("is no http or https URL")
    if parts.username is not None:
        raise ValueError("holds a user before an '@': sign webhooks with HEELER_WEBHOOK_SECRET instead")
    return value
