"""Who calls Kelpie's API: by a key of its own, by Salad's key, or by the metadata service's token (PROTOCOLS.md 3)."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from starlette.datastructures import Headers

from heeler.local.kelpie_answers import Refusal
from heeler.local.kelpie_table import user_of
from heeler.local.tokens import TokenError, TokenIssuer

_BEARER = "Bearer "


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        user_id: The organization's user.
        kelpie_key: The key of Kelpie's own, or nothing if there was another way.
    """

    user_id: str
    kelpie_key: str = ""


class Access:
    """What is accepted; of several credentials, the first in this order counts alone."""

    def __init__(
        self, tokens: TokenIssuer, *, kelpie_key: str | None, api_key: str, organization: str, project: str | None
    ) -> None:
        """Describe it.

        Args:
            tokens: Who verifies the tokens; those of other organizations are other users'.
            kelpie_key: The organization's key for this API; None if it has none.
            api_key: The organization's Salad API key.
            organization: Its name.
            project: Its only project; None takes any name for one.
        """
        self._tokens = tokens
        self._kelpie_key = kelpie_key
        self._api_key = api_key
        self._organization = organization
        self._project = project

    def caller(self, headers: Headers) -> Caller:
        """Who sent these headers.

        Raises:
            Refusal: Nobody whom we know.
        """
        if (key := headers.get("X-Kelpie-Key")) is not None:
            if self._kelpie_key is None or not _same(key, self._kelpie_key):
                raise _forbidden("Invalid API Key")
            return Caller(user_of(self._organization), key)
        if (key := headers.get("Salad-Api-Key")) is not None:
            return self._by_api_key(headers, key)
        bearer = headers.get("Authorization", "")
        if bearer.startswith(_BEARER):
            return self._by_token(headers, bearer.removeprefix(_BEARER))
        raise Refusal(401, "Unauthorized", "API Key or Bearer Token Required")

    def _by_api_key(self, headers: Headers, key: str) -> Caller:
        organization, project = _named(headers, "Organization"), _named(headers, "Project")
        if not organization or not project:
            raise Refusal(400, "Bad Request", "Salad-Api-Key wants Salad-Organization and Salad-Project beside it")
        if not _same(key, self._api_key):
            raise _forbidden("Invalid API Key")
        if organization != self._organization:
            raise _forbidden("Invalid Organization Name")
        self._check(organization, project)
        return Caller(user_of(organization))

    def _by_token(self, headers: Headers, token: str) -> Caller:
        project = _named(headers, "Project")
        if not project:
            raise Refusal(400, "Bad Request", "A bearer token wants Salad-Project beside it")
        try:
            identity = self._tokens.verify(token)
        except TokenError as error:
            raise _forbidden(str(error)) from None
        self._check(identity.organization_name, project)
        return Caller(user_of(identity.organization_name))

    def _check(self, organization: str, project: str) -> None:
        if organization == self._organization and self._project not in (None, project):
            raise _forbidden(f"Invalid Project '{project}'")


def _named(headers: Headers, what: str) -> str:
    """`Salad-Organization` or `Salad-Project`, by either of its names."""
    return headers.get(f"Salad-{what}") or headers.get(f"Salad-{what}-Name") or ""


def _same(key: str, ours: str) -> bool:
    return hmac.compare_digest(key.encode(), ours.encode())


def _forbidden(message: str) -> Refusal:
    return Refusal(403, "Forbidden", message)
