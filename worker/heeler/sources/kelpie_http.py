"""Kelpie's API over HTTP: how we say who we are, and what its answers mean (PROTOCOLS 3)."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import SplitResult, urlencode, urlsplit

import anyio

from heeler import __version__
from heeler.config import MASK
from heeler.errors import UsageError
from heeler.http import Answer, HttpClient, NoAnswerError, TooLargeError
from heeler.settings import Settings
from heeler.sources.base import Machine, SourceUnavailableError

_SILENCE = 10.0
_TOTAL = 15.0
"""Seconds for one call, however slowly its answer drips."""
_ANSWER_BYTES = 64 << 20
"""A page of jobs, or a thousand that were submitted, may be large."""
_SHOWN = 300
_NO_JOB = "job not found"
"""The API's own words, in small letters. Any other 404 is of somebody between us, or of another path."""
_REFUSED = (401, 403)
_LATER = (408, 425, 429)
_NAME = "KELPIE_API_URL (or --kelpie-url)"
_KEY_HEADERS = ("X-Kelpie-Key", "Salad-Api-Key", "Authorization")
_BEARER = "Bearer "


class NoSuchJobError(Exception):
    """The API knows no such job, or none of ours."""


class CallRefusedError(SourceUnavailableError):
    """The API will not do what it was asked, however often: 4xx.

    Attributes:
        status: Of the answer.
    """

    def __init__(self, words: str, status: int) -> None:
        self.status = status
        super().__init__(words)


class Credentials(Protocol):
    """How we say who we are."""

    async def headers(self, *, fresh: bool) -> Mapping[str, str]:
        """What goes with each call.

        Args:
            fresh: What went before was refused.

        Raises:
            SourceUnavailableError: They can't be had now.
        """
        ...


class KeyCredentials:
    """A key that never changes, in headers."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    async def headers(self, *, fresh: bool) -> Mapping[str, str]:
        """As `Credentials.headers`."""
        del fresh
        return self._headers


class SaladKeyCredentials:
    """A key of SaladCloud's, whose organization the machine tells."""

    def __init__(self, key: str, project: str, machine: Machine) -> None:
        self._key = key
        self._project = project
        self._machine = machine

    async def headers(self, *, fresh: bool) -> Mapping[str, str]:
        """As `Credentials.headers`."""
        organization = claims_of(await self._machine.token(fresh=fresh)).get("salad_organization_name")
        if not isinstance(organization, str) or not organization.isprintable() or not organization.isascii():
            raise SourceUnavailableError("the machine's token names no organization: set SALAD_ORGANIZATION_NAME")
        return _salad_headers(self._key, organization, self._project)


class TokenCredentials:
    """The token that SaladCloud gives to each machine."""

    def __init__(self, project: str, machine: Machine) -> None:
        self._project = project
        self._machine = machine

    async def headers(self, *, fresh: bool) -> Mapping[str, str]:
        """As `Credentials.headers`."""
        token = await self._machine.token(fresh=fresh)
        return {"Authorization": f"{_BEARER}{token}", "Salad-Project": self._project}


def credentials_of(settings: Settings, machine: Machine | None) -> Credentials:
    """The first way that applies: Kelpie's key, SaladCloud's key, the machine's token (PROTOCOLS 3).

    Raises:
        UsageError: None applies, or one can't be sent; the message says which variable is missing or wrong.
    """
    _check_headers(settings)
    if settings.kelpie_api_key is not None:
        return KeyCredentials({"X-Kelpie-Key": settings.kelpie_api_key})
    key, organization, project = settings.salad_api_key, settings.salad_organization, settings.salad_project
    if key is None and machine is None:
        raise UsageError(
            "source kelpie needs to say who it is: set KELPIE_API_KEY; or SALAD_API_KEY with SALAD_ORGANIZATION_NAME"
            " and SALAD_PROJECT_NAME; on SaladCloud's machines SALAD_PROJECT_NAME is enough"
        )
    if project is None:
        raise UsageError("source kelpie needs the name of your project on SaladCloud: set SALAD_PROJECT_NAME")
    if key is None and machine is not None:
        return TokenCredentials(project, machine)
    if key is not None and organization is not None:
        return KeyCredentials(_salad_headers(key, organization, project))
    if key is None or machine is None:
        raise UsageError("with SALAD_API_KEY Kelpie's API wants your organization, too: set SALAD_ORGANIZATION_NAME")
    return SaladKeyCredentials(key, project, machine)


def _check_headers(settings: Settings) -> None:
    """Raises `UsageError` for what no header can hold, such as the end of the line that a key was read from."""
    for name, value in (
        ("KELPIE_API_KEY", settings.kelpie_api_key),
        ("SALAD_API_KEY", settings.salad_api_key),
        ("SALAD_ORGANIZATION_NAME", settings.salad_organization),
        ("SALAD_PROJECT_NAME", settings.salad_project),
    ):
        if value is not None and not (value.isascii() and value.isprintable() and value == value.strip()):
            raise UsageError(f"{name} holds spaces at an end, or characters that HTTP's headers can't hold")


def _salad_headers(key: str, organization: str, project: str) -> dict[str, str]:
    return {"Salad-Api-Key": key, "Salad-Organization": organization, "Salad-Project": project}


def claims_of(token: str) -> dict[str, Any]:
    """What a machine's token says of it (PROTOCOLS 2); empty if it can't be read. It is not verified here."""
    try:
        part = token.split(".")[1]
        found = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (ValueError, IndexError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class KelpieClient:
    """Calls the API. Any number of calls at a time."""

    def __init__(self, url: str, credentials: Credentials) -> None:
        """Args: where it is, and how we say who we are.

        Raises:
            UsageError: The URL is none.
        """
        parts = _parts(url)
        self._base = parts.path.rstrip("/")
        self._shown = f"{parts.scheme}://{parts.netloc}{self._base}"
        self._credentials = credentials
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if self._secure else 80)

    @cached_property
    def _client(self) -> HttpClient:
        tls = ssl.create_default_context() if self._secure else None  # reads many files: only for who calls
        return HttpClient(self._host, self._port, connect_timeout=_SILENCE, tls=tls)

    @property
    def name(self) -> str:
        """For people."""
        return self._shown

    async def call(self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: object = None) -> Any:
        """Make one call, and once more with other credentials if those are refused; what it answers.

        Raises:
            NoSuchJobError: 404, in the API's own words.
            CallRefusedError: Any other 4xx.
            SourceUnavailableError: There was no answer, or none to go by. It may have taken effect.
        """
        credentials = await self._credentials.headers(fresh=False)
        answer = await self._send(method, path, query, body, credentials)
        if answer.status in _REFUSED and (others := await self._credentials.headers(fresh=True)) != credentials:
            credentials = others
            answer = await self._send(method, path, query, body, credentials)
        return self._judge(method, path, answer, credentials)

    def close(self) -> None:
        """Let go of connections."""
        if "_client" in self.__dict__:
            self._client.close()

    async def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: object,
        credentials: Mapping[str, str],
    ) -> Answer:
        headers = {
            "Accept": "application/json",
            "User-Agent": f"heeler/{__version__}",
            **credentials,
        }
        content = b""
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body).encode()
        target = f"{self._base}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            with anyio.fail_after(_TOTAL):
                return await self._client.call(
                    method, target, headers=headers, body=content, silence=_SILENCE, limit=_ANSWER_BYTES
                )
        except (NoAnswerError, TooLargeError) as error:
            raise self._unavailable(f"is out of reach: {error}") from None
        except TimeoutError:
            raise self._unavailable(f"is out of reach: no whole answer in {_TOTAL:g} s") from None

    def _judge(self, method: str, path: str, answer: Answer, credentials: Mapping[str, str]) -> Any:
        """The API's errors are JSON of the type text/plain (FAULTS): the type is not asked."""
        try:
            found = json.loads(answer.body) if answer.body else None
        except (ValueError, RecursionError):
            found = None
        if 200 <= answer.status < 300:
            if found is None:
                raise self._unavailable(f"gave no sensible answer to {method} {path}")
            return found
        said = f"answered {method} {path} with {answer.status}{_words(found, credentials)}"
        if answer.status == 404 and _is_no_job(found):
            raise NoSuchJobError(f"Kelpie's API at {self._shown} {said}")
        if answer.status == 404 or 300 <= answer.status < 400:  # of somebody else, who knows nothing of jobs
            raise CallRefusedError(f"Kelpie's API at {self._shown} {said}; is {_NAME} right?", answer.status)
        if answer.status in _REFUSED:
            raise CallRefusedError(
                f"Kelpie's API at {self._shown} {said}; check KELPIE_API_KEY, or SALAD_API_KEY with"
                " SALAD_ORGANIZATION_NAME and SALAD_PROJECT_NAME",
                answer.status,
            )
        if 400 <= answer.status < 500 and answer.status not in _LATER:
            raise CallRefusedError(f"Kelpie's API at {self._shown} {said}", answer.status)
        raise self._unavailable(said)

    def _unavailable(self, words: str) -> SourceUnavailableError:
        return SourceUnavailableError(f"Kelpie's API at {self._shown} {words}")


def _is_no_job(found: object) -> bool:
    words = found.get("message") if isinstance(found, dict) else None
    return isinstance(words, str) and words.casefold() == _NO_JOB


def _words(found: object, credentials: Mapping[str, str]) -> str:
    """What an error says: the API's own, or the first of what was wrong with a body. Never a key that it repeats."""
    if not isinstance(found, dict):
        return ""
    words = found.get("message") or found.get("error")
    errors = found.get("errors")
    if isinstance(errors, list) and errors and isinstance(errors[0], dict):
        where = errors[0].get("path")
        field = ".".join(str(part) for part in where) if isinstance(where, list) else str(where or "body")
        words = f"{field}: {errors[0].get('message')}"
    if not isinstance(words, str) or not words:
        return ""
    for key in (credentials.get(name, "").removeprefix(_BEARER) for name in _KEY_HEADERS):
        words = words.replace(key, MASK) if key else words
    return ": " + "".join(one if one.isprintable() else " " for one in words)[:_SHOWN]


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        bare = not (parts.query or parts.fragment or parts.username or parts.password)
        if known and bare and url.isascii() and url.isprintable() and " " not in url:
            return parts
    except ValueError:  # a port or an address that is none
        pass
    shown = "" if "@" in url else f" is {url!r}, but"
    raise UsageError(f"{_NAME}{shown} must be like https://kelpie.saladexamples.com")
