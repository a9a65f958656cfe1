"""Webhooks: what is signed and said, and when it is tried again, in virtual time."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.errors import UsageError
from heeler.webhook import Event, Webhooks, message_id, signed
from tests.support.virtual_time import VIRTUAL

URL = "https://example.com/hook?token=secret"
EVENT = Event(message_id("job-1", "run-1", "done"), "job.done", 1700000000.0, {"id": "job-1"})


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


# Signing.

VECTOR = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
"""With its signature below, in the tests of Standard Webhooks' own libraries."""


def test_the_signature_is_that_of_the_libraries_of_standard_webhooks() -> None:
    headers = signed(base64.b64decode(VECTOR), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def genuine(headers: dict[str, str], body: bytes, key: bytes) -> bool:
    """By the text of the specification, with an HMAC (RFC 2104) of our own."""
    block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
    message = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block) + message).digest()
    digest = hashlib.sha256(bytes(byte ^ 0x5C for byte in block) + inner).digest()
    assert digest == hmac.new(key, message, "sha256").digest()
    return headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


keys = st.binary(min_size=24, max_size=64)


@given(keys, st.text(), st.integers(0, 1 << 40), st.binary(max_size=300), st.data())
def test_what_is_signed_is_genuine_and_nothing_else_is(
    key: bytes, name: str, timestamp: int, body: bytes, data: st.DataObject
) -> None:
    headers = signed(key, message_id(name), timestamp, body)
    assert genuine(headers, body, key)
    assert not genuine({**headers, "webhook-timestamp": str(timestamp + 1)}, body, key)
    assert not genuine({**headers, "webhook-id": message_id(name, "")}, body, key)
    assert not genuine(headers, body + b" ", key)
    place = data.draw(st.integers(0, len(key) - 1))
    other = bytearray(key)
    other[place] ^= data.draw(st.integers(1, 255))
    assert not genuine(headers, body, bytes(other))


def test_without_a_key_there_is_no_signature() -> None:
    assert signed(None, "msg_1", 5, b"{}") == {"webhook-id": "msg_1", "webhook-timestamp": "5"}


# Secrets.


@given(keys)
def test_a_secret_is_base64_with_or_without_its_prefix_padding_and_line_end(key: bytes) -> None:
    text = base64.b64encode(key).decode()
    for secret in (text, f"whsec_{text}", f"whsec_{text}\n", text.rstrip("=")):
        assert Webhooks(secret)._key == key


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        "my-very-own-password",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
        "whsec_" + base64.b64encode(bytes(32)).decode()[:20] + "!" + "A" * 23,
        "whsec_" + base64.b64encode(bytes(24)).decode() + "A",
        "whsk_" + VECTOR,
        "whsec_whsec_" + VECTOR,
        "\u00e4" * 32,
    ],
)
def test_what_is_no_secret_is_refused_by_its_name_and_not_shown(secret: str) -> None:
    with pytest.raises(UsageError, match="HEELER_WEBHOOK_SECRET") as caught:
        Webhooks(secret)
    assert len(secret) < 10 or secret not in str(caught.value)


# Ids.

parts = st.lists(st.text(max_size=8), max_size=4).map(tuple)


@given(parts, parts)
def test_ids_are_the_same_for_the_same_parts_only(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert (message_id(*one) == message_id(*other)) == (one == other)
    Event(message_id(*one), "job.done", 0.0, {})


@pytest.mark.parametrize("bad", ["", "job.1", "a\nb", "a\r\nX: y", "a b", "\u00e4", "a" * 201])
def test_an_id_that_could_forge_what_is_signed_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="message_id"):
        Event(bad, "job.done", 0.0, {})
