"""Tells a URL how a job ended, signed the Standard Webhooks way (https://www.standardwebhooks.com, version 1.0.0).

Redirects are not followed, names are looked up in a thread that nobody waits for, and no error names more of a URL
than its host: paths, queries and passwords in it may be secrets.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from heeler import __version__
from heeler.app.http import retry_after
from heeler.errors import UsageError
from heeler.urls import check_webhook

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult

TRY_SECONDS = 15.0
"""How long one try may take, from the name's look-up to the answer's head: the least that the specification advises."""
_SECRET_PREFIX = "whsec_"  # noqa: S105 - no secret itself
_KEY_BYTES = range(24, 65)
_MESSAGE_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")
"""Without full stops: they part what is signed."""
_PASSING = (408, 425, 429)
_BODY_BYTES = 1 << 16
_BODY_SECONDS = 1.0


class WebhookError(Exception):
    """A try failed: what happened, and the host that it happened with.

    Attributes:
        final: Whether trying again is pointless.
        delay: Seconds that the receiver asks us to wait; 0 if it does not say.
    """

    def __init__(self, reason: str, *, final: bool = False, delay: float = 0.0) -> None:
        self.final = final
        self.delay = delay
        super().__init__(reason)


@dataclass(frozen=True)
class Event:
    """How a job ended.

    Attributes:
        id: The same for every try and every repetition; see `message_id`.
        type: `job.done`, `job.failed` or `job.cancelled`.
        timestamp: When it ended, in seconds since 1970.
        data: What the receiver is told: JSON.
    """

    id: str
    type: str
    timestamp: float
    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not _MESSAGE_ID.fullmatch(self.id):
            raise ValueError(f"{self.id!r} can't be a webhook's id: make it with message_id()")


def message_id(*parts: str) -> str:
    """An id for what these parts name: the same for the same parts, whatever characters they hold."""
    return f"msg_{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"


class Webhooks:
    """Sends events. Any number at a time."""

    def __init__(
        self, secret: str | None, *, timeout: float = TRY_SECONDS, wall: Callable[[], float] = time.time
    ) -> None:
        """Args: what signs (None: nothing is signed), seconds that a try may take, and seconds since 1970.

        Raises:
            UsageError: The secret is none.
        """
        self._key = None if secret is None else _key(secret)
        self._timeout = timeout
        self._wall = wall

    async def send(self, url: str, event: Event) -> None:
        """Try once.

        Raises:
            WebhookError: It did not get there, or was not taken.
        """
        body = _body(event)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"heeler/{__version__}",
            **signed(self._key, event.id, int(self._wall()), body),
        }
        await post(url, headers, body, timeout=self._timeout, proxied=True)


def signed(key: bytes | None, message: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of a message; without a key there is no signature."""
    headers = {"webhook-id": message, "webhook-timestamp": str(timestamp)}
    if key is not None:
        digest = hmac.new(key, f"{message}.{timestamp}.".encode() + body, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers


async def post(url: str, headers: Mapping[str, str], body: bytes, *, timeout: float, proxied: bool) -> None:
    """POST once; anything but a 2xx is an error.

    Args:
        url: Where to.
        headers: Besides those of HTTP itself.
        body: The body.
        timeout: Seconds until the answer's head is there.
        proxied: Whether to ask the proxy that the environment names.

    Raises:
        WebhookError: There was no answer, or none of 2xx.
    """
    where = _where(url)
    # 14 MB and 0.2 s that most workers never need; in a thread, for heartbeats go on.
    await anyio.to_thread.run_sync(import_module, "aiohttp", limiter=anyio.CapacityLimiter(1))
    with anyio.move_on_after(timeout) as scope:
        await _exchange(where, url, headers, body, _proxy(url) if proxied else None, scope)
        return
    raise WebhookError(f"{where} gave no answer in {timeout:g} s")


async def _exchange(
    where: str, url: str, headers: Mapping[str, str], body: bytes, proxy: str | None, scope: anyio.CancelScope
) -> None:
    import aiohttp  # noqa: PLC0415 - see `post`
    from yarl import URL  # noqa: PLC0415

    try:
        async with _session() as session:
            call = session.post(
                URL(url, encoded=True),
                data=body,
                headers=headers,
                skip_auto_headers=("Accept-Encoding",),
                allow_redirects=False,
                proxy=proxy,
            )
            async with call as answer:
                scope.deadline += _BODY_SECONDS  # the status decides: what comes after it may not change that
                await _drop(answer.content)
    except (aiohttp.ClientError, OSError) as error:
        raise WebhookError(f"{where}: {_words(error)}", final=isinstance(error, aiohttp.InvalidURL)) from None
    except ValueError as error:
        raise WebhookError(f"{where}: can't be asked ({type(error).__name__})", final=True) from None
    _judge(where, answer)


def _session() -> aiohttp.ClientSession:
    """For one call. It trusts the environment for proxies alone, and that is seen to by us: not for ~/.netrc."""
    import aiohttp  # noqa: PLC0415

    resolver = cast("AbstractResolver", _Resolver())
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        auto_decompress=False,
    )


class _Resolver:
    """Looks names up in threads of anyio's: asyncio would wait at its end for one of its own that hangs."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """As aiohttp wants it."""
        look = partial(_addresses, host, port, family)
        return await anyio.to_thread.run_sync(look, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))

    async def close(self) -> None:
        """As aiohttp wants it."""


def _addresses(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    return [
        {
            "hostname": host,
            "host": socket.getnameinfo(address, numeric)[0],  # with the zone of a link-local one
            "port": port,
            "family": found,
            "proto": protocol,
            "flags": socket.AI_NUMERICHOST,
        }
        for found, _, protocol, _, address in socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)
    ]


async def _drop(content: aiohttp.StreamReader) -> None:
    """Take in what the receiver sends, lest it take a reset for a fault; nothing depends on it."""
    import aiohttp  # noqa: PLC0415

    left = _BODY_BYTES
    with anyio.move_on_after(_BODY_SECONDS):
        try:
            while left > 0 and (chunk := await content.read(left)):
                left -= len(chunk)
        except (aiohttp.ClientError, OSError):
            return


def _judge(where: str, answer: aiohttp.ClientResponse) -> None:
    status = answer.status
    if 200 <= status < 300:
        return
    raise WebhookError(
        f"{where} answered {status}",
        final=300 <= status < 500 and status not in _PASSING,
        delay=retry_after(answer.headers, time.time()),
    )


def _words(error: Exception) -> str:
    """What happened, without the URL that aiohttp's own words may hold."""
    import aiohttp  # noqa: PLC0415

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is refused ({getattr(error.certificate_error, 'verify_message', 'no reason given')})"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy answered {error.status}"
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return "the proxy can't be reached"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError):
        return "the connection was closed before the answer"
    if isinstance(error, aiohttp.ClientSSLError):
        return "no TLS connection came about"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)  # a look-up's is negative
    return f"the answer is not HTTP ({type(error).__name__})"


def _where(url: str) -> str:
    try:
        parts = urlsplit(check_webhook(url))
    except ValueError as error:
        raise WebhookError(f"the webhook's URL {error}", final=True) from None
    return f"{parts.scheme}://{parts.netloc}"


def _proxy(url: str) -> str | None:
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _body(event: Event) -> bytes:
    moment = datetime.fromtimestamp(event.timestamp, timezone.utc).isoformat(timespec="milliseconds")
    told = {"type": event.type, "timestamp": moment.replace("+00:00", "Z"), "data": dict(event.data)}
    return json.dumps(told, separators=(",", ":")).encode()


def _key(secret: str) -> bytes:
    text = secret.strip().removeprefix(_SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) not in _KEY_BYTES:
        raise UsageError(
            "HEELER_WEBHOOK_SECRET is no signing secret: it must be 'whsec_' and base64 of 24 to 64 random bytes"
        )
    return key
