"""The identity tokens of local machines: JSON Web Tokens, signed with a key of this process (HS256, RFC 7519).

Salad's own are signed with a key that nobody else has; a worker only passes them on, so the algorithm is ours.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Identity:
    """Who a token speaks for: its claims by the names of PROTOCOLS.md 2, without `salad_`.

    Attributes:
        machine_id: The machine.
        organization_id: The organization's id.
        organization_name: The organization's name.
        workload_id: The container group's id.
        workload_name: The container group's name.
    """

    machine_id: str
    organization_id: str
    organization_name: str
    workload_id: str
    workload_name: str


class TokenError(Exception):
    """A token that is not accepted; `expired` and `ForeignTokenError` say why."""


class ExpiredTokenError(TokenError):
    """It has expired, or was revoked."""


class ForeignTokenError(TokenError):
    """It is no token, or not signed with our key."""


class TokenIssuer:
    """Issues tokens and verifies them. Any thread may call it."""

    def __init__(self, *, key: bytes | None = None, wall: Callable[[], float] = time.time) -> None:
        """Args: the key, a random one if None; the clock, in seconds since the epoch."""
        self._key = key or secrets.token_bytes(32)
        self._wall = wall
        self._lock = threading.Lock()
        self._issued = 0
        self._revoked = 0

    def issue(self, identity: Identity, lifetime: float) -> str:
        """A token that is good for `lifetime` seconds."""
        with self._lock:
            self._issued += 1
            serial = self._issued
        now = self._wall()
        claims = {f"salad_{name}": value for name, value in vars(identity).items()}
        payload = {**claims, "iat": int(now), "exp": now + lifetime, "jti": str(serial)}
        head = _encode(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
        body = f"{head}.{_encode(json.dumps(payload).encode())}"
        return f"{body}.{_encode(self._sign(body))}"

    def revoke_all(self) -> None:
        """Refuse every token issued so far, as if it had expired."""
        with self._lock:
            self._revoked = self._issued

    def verify(self, token: str) -> Identity:
        """Whom a token speaks for.

        Raises:
            ExpiredTokenError: It has expired, or was revoked.
            ForeignTokenError: It is not of ours.
        """
        payload = self._payload(token)
        with self._lock:
            revoked = int(payload["jti"]) <= self._revoked
        if revoked or payload["exp"] <= self._wall():
            raise ExpiredTokenError("the token has expired")
        return Identity(**{name: payload[f"salad_{name}"] for name in Identity.__dataclass_fields__})

    def _payload(self, token: str) -> dict[str, Any]:
        body, _, signature = token.rpartition(".")
        try:
            genuine = hmac.compare_digest(_decode(signature), self._sign(body))
            payload: dict[str, Any] = json.loads(_decode(body.partition(".")[2])) if genuine else {}
        except ValueError:
            genuine = False
        if not genuine:
            raise ForeignTokenError("the token is not of this service")
        return payload

    def _sign(self, body: str) -> bytes:
        return hmac.new(self._key, body.encode(), hashlib.sha256).digest()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
