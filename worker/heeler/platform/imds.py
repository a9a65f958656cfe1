"""SaladCloud's instance metadata service (IMDS), and whether there is one (PROTOCOLS 2).

It tells a machine when to take jobs and who it is, and moves it when it is no good.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

import anyio

from heeler.config import MASK
from heeler.errors import UsageError
from heeler.http import Answer, HttpClient, NoAnswerError, TooLargeError
from heeler.sources.base import SourceUnavailableError

_SILENCE = 5.0
_TOTAL = 15.0
"""Seconds for one call, however slowly its answer drips."""
_ANSWER_BYTES = 64 << 10
_REASON = 1000
"""The longest reason of a reallocation (PROTOCOLS 2). We count bytes: characters are never more."""
_INT32 = range(-(1 << 31), 1 << 31)
_TOKEN_MARGIN = 30.0
_GONE = 404
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""What may stand behind `Bearer` in a header (RFC 6750)."""
_JWT = re.compile(r"\beyJ[\w-]*\.[\w.-]*", re.ASCII)
_SET_BY_SALAD = ("SALAD_MACHINE_ID", "SALAD_CONTAINER_GROUP_ID")
_NAMES = "SALAD_METADATA_URI (or --metadata-uri)"


class InstanceGoneError(SourceUnavailableError):
    """The service says that this instance does not exist any more: we are to stop."""


@dataclass(frozen=True)
class InstanceStatus:
    """Whether the instance is to take work, and whether its container has started."""

    ready: bool
    started: bool


def on_saladcloud(environ: Mapping[str, str], *, uri_given: bool) -> bool:
    """Whether there is a metadata service: SaladCloud names the machine, or somebody named the service.

    Args:
        environ: The environment.
        uri_given: Whether the setting `metadata_uri` has another origin than "default".
    """
    return uri_given or any(environ.get(name) for name in _SET_BY_SALAD)


def find_imds(
    uri: str,
    environ: Mapping[str, str],
    *,
    uri_given: bool,
    on_event: Callable[[str], object],
    on_gone: Callable[[str], object],
    clean: Callable[[str], str],
) -> Imds | None:
    """The metadata service; None where there is none, which `on_event` is told as "not_on_saladcloud".

    Raises:
        UsageError: As `Imds`.
    """
    if on_saladcloud(environ, uri_given=uri_given):
        return Imds(uri, on_gone=on_gone, clean=clean)
    on_event("not_on_saladcloud")
    return None


class Imds:
    """Calls the metadata service. Implements `heeler.sources.base.Machine`. Nothing is tried again here.

    Every call raises `SourceUnavailableError` when there is no sensible answer, and `InstanceGoneError` when
    the instance does not exist any more.
    """

    def __init__(self, uri: str, *, on_gone: Callable[[str], object] = str, clean: Callable[[str], str] = str) -> None:
        """Args.

        uri: http://HOST:PORT.
        on_gone: Told the reason, each time that the service says that this instance is gone.
        clean: Takes the secrets out of a text.

        Raises:
            UsageError: The URI is none, or not of http.
        """
        host, port = _address(uri)
        self._shown = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._client = HttpClient(host, port, connect_timeout=_SILENCE)
        self._on_gone = on_gone
        self._clean = clean
        self._token: tuple[str, float] | None = None

    def __repr__(self) -> str:
        return f"Imds({self._shown!r})"

    async def status(self) -> InstanceStatus:
        """Whether the instance is ready and started."""
        found = await self._get("/v1/status")
        ready, started = found.get("ready"), found.get("started", False)
        if not isinstance(ready, bool) or not isinstance(started, bool):
            raise self._unusable("/v1/status")
        return InstanceStatus(ready, started)

    async def ready(self) -> bool:
        """As `Machine.ready`."""
        return (await self.status()).ready

    async def token(self, *, fresh: bool = False) -> str:
        """As `Machine.token`; kept until shortly before it expires."""
        if fresh:
            self._token = None
        if self._token is not None and time.time() < self._token[1]:
            return self._token[0]
        token = (await self._get("/v1/token")).get("jwt")
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise self._unusable("/v1/token")
        self._token = token, _good_until(token)
        return token

    async def deletion_cost(self) -> int:
        """What the instance counts for at scale-in: the lowest is deleted first."""
        cost = (await self._get("/v1/deletion-cost")).get("deletion_cost")
        if not isinstance(cost, int) or isinstance(cost, bool):
            raise self._unusable("/v1/deletion-cost")
        return cost

    async def set_deletion_cost(self, cost: int) -> None:
        """Change it; an int32.

        Raises:
            ValueError: It is none.
        """
        if cost not in _INT32:
            raise ValueError(f"deletion cost {cost} is no int32")
        await self._call("PUT", "/v1/deletion-cost", {"deletion_cost": cost})

    async def reallocate(self, reason: str) -> None:
        """Have the instance moved to another machine; this one is stopped soon."""
        await self._call("POST", "/v1/reallocate", {"reason": _short(self._clean(reason))})

    async def recreate(self) -> None:
        """Have the container made anew, on this machine."""
        await self._call("POST", "/v1/recreate")

    async def restart(self) -> None:
        """Have the container stopped and started, on this machine."""
        await self._call("POST", "/v1/restart")

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    async def _get(self, path: str) -> dict[str, Any]:
        answer = await self._call("GET", path)
        try:
            found = json.loads(answer.body)
        except (ValueError, RecursionError):
            raise self._unusable(path) from None
        if not isinstance(found, dict):
            raise self._unusable(path)
        return found

    async def _call(self, method: str, path: str, content: Mapping[str, object] | None = None) -> Answer:
        # A connection of its own each: the pause between two calls is about as long as servers keep idle ones open.
        headers = {"Metadata": "true", "Accept": "application/json", "Connection": "close"}
        body = b""
        if content is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps(content).encode()
        try:
            with anyio.fail_after(_TOTAL):
                answer = await self._client.call(
                    method, path, headers=headers, body=body, silence=_SILENCE, limit=_ANSWER_BYTES
                )
        except (NoAnswerError, TooLargeError) as error:
            raise self._unavailable(f"is out of reach: {error}") from None
        except TimeoutError:
            raise self._unavailable(f"is out of reach: no whole answer in {_TOTAL:g} s") from None
        if answer.status == _GONE:
            reason = f"the metadata service {self._shown} says that this instance does not exist any more"
            self._on_gone(reason)
            raise InstanceGoneError(f"{reason} (404 for {method} {path}); is {_NAMES} right?")
        if not 200 <= answer.status < 300:
            raise self._unavailable(f"answered {method} {path} with {answer.status}{self._problem(answer)}")
        return answer

    def _problem(self, answer: Answer) -> str:
        """What an `application/problem+json` says, which all errors should be (PROTOCOLS 2); never a token."""
        try:
            found = json.loads(answer.body)
            words = found.get("detail") or found.get("title")
        except (ValueError, RecursionError, AttributeError):
            return ""
        return f": {_short(_JWT.sub(MASK, self._clean(words)))[:200]}" if isinstance(words, str) and words else ""

    def _unusable(self, path: str) -> SourceUnavailableError:
        """The answer is never shown: it may hold the token."""
        return self._unavailable(f"gave no sensible answer to {path}")

    def _unavailable(self, words: str) -> SourceUnavailableError:
        return SourceUnavailableError(f"the metadata service {self._shown} {words}; it is set by {_NAMES}")


def _address(uri: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        UsageError: It is not http://HOST:PORT. The message shows no user name or password.
    """
    try:
        parts = urlsplit(uri)
        port = 80 if parts.port is None else parts.port
        if uri.isascii() and uri.isprintable() and " " not in uri and _is_bare(parts) and port:
            return parts.hostname or "", port
    except ValueError:  # a port or an address that is none
        pass
    shown = "" if "@" in uri else f" is {uri!r}, but"
    raise UsageError(f"{_NAMES}{shown} must be like http://169.254.169.254:80")


def _is_bare(parts: SplitResult) -> bool:
    """Whether it is plain http, with a host, and nothing but a port behind."""
    rest = (parts.query, parts.fragment, parts.username, parts.password)
    return parts.scheme == "http" and bool(parts.hostname) and parts.path in ("", "/") and not any(rest)


def _short(text: str) -> str:
    """One line of at most `_REASON` characters, by anybody's count of them; never empty."""
    line = " ".join(text.split()).encode("utf-8", "backslashreplace")[:_REASON].decode("utf-8", "ignore")
    return "".join(one if one.isprintable() else " " for one in line).strip() or "no reason given"


def _good_until(token: str) -> float:
    """When to ask for the next one, by the clock of `exp`: seconds since 1970. 0 if the token does not say."""
    try:
        claims = token.split(".")[1]
        expires = float(json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["exp"])
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError):
        return 0.0
    return expires - min(_TOKEN_MARGIN, 0.1 * max(0.0, expires - time.time()))
