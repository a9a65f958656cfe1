"""Where the metadata service is, what it is asked, and what its answers mean."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

import anyio
import pytest

from heeler.errors import UsageError
from heeler.http import Answer, NoAnswerError, TooLargeError
from heeler.platform.imds import Imds, InstanceGoneError, find_imds, on_saladcloud
from heeler.sources.base import Machine, SourceUnavailableError
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

URI = "http://169.254.169.254:80"


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Wire:
    """Stands in for `HttpClient`: gives what is scripted, and keeps what was asked."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[str, str, Mapping[str, str], bytes]] = []

    async def call(self, method: str, path: str, *, headers: Mapping[str, str], body: bytes, **_: object) -> Answer:
        self.calls.append((method, path, headers, body))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def says(content: object, status: int = 200) -> Answer:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Answer(status, {"content-type": "application/json"}, body)


def imds(monkeypatch: pytest.MonkeyPatch, *answers: Answer | Exception, **options: Any) -> tuple[Imds, Wire]:
    wire = Wire(*answers)
    monkeypatch.setattr("heeler.platform.imds.HttpClient", lambda *_args, **_options: wire)
    return Imds(URI, **options), wire


def jwt(**claims: object) -> str:
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJIUzI1NiJ9.{payload}.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("uri", "host", "port"),
    [
        (URI, "169.254.169.254", 80),
        ("http://169.254.169.254", "169.254.169.254", 80),
        ("http://localhost:8000/", "localhost", 8000),
        ("HTTP://[::1]:81", "::1", 81),
    ],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, uri: str, host: str, port: int) -> None:
    places: list[tuple[object, ...]] = []
    monkeypatch.setattr("heeler.platform.imds.HttpClient", lambda *args, **_options: places.append(args))
    Imds(uri)
    assert places == [(host, port)]


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "169.254.169.254:80",
        "https://169.254.169.254",
        "http://",
        "http://:80",
        "http://h:0",
        "http://h:65536",
        "http://h:x",
        "http://h/v1",
        "http://h?a=b",
        "http://h#a",
        "http://h\n:80",
        "http://h h",
        "http://[::1",
        "http://hö",
        "http://user:s3cret@h",
    ],
)
def test_a_place_that_is_none_is_refused_by_name_and_without_a_password(uri: str) -> None:
    with pytest.raises(UsageError, match=r"SALAD_METADATA_URI.*--metadata-uri") as caught:
        Imds(uri)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "uri_given", "there"),
    [
        ({}, False, False),
        ({"SALAD_MACHINE_ID": ""}, False, False),
        ({"SALAD_ORGANIZATION_NAME": "o", "SALAD_API_KEY": "k"}, False, False),
        ({"SALAD_MACHINE_ID": "m"}, False, True),
        ({"SALAD_CONTAINER_GROUP_ID": "g"}, False, True),
        ({}, True, True),
    ],
)
def test_whether_there_is_one(environ: dict[str, str], uri_given: bool, there: bool) -> None:
    assert on_saladcloud(environ, uri_given=uri_given) is there
    events: list[str] = []
    found = find_imds(URI, environ, uri_given=uri_given, on_event=events.append, on_gone=str, clean=str)
    assert (found is not None) is there
    assert events == ([] if there else ["not_on_saladcloud"])


async def test_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    done = Answer(204, {}, b"")
    machine, wire = imds(
        monkeypatch,
        says({"ready": True, "started": False, "more": 1}),
        says({"ready": False, "started": True}),
        says({"deletion_cost": -7}),
        *[done] * 4,
    )
    status = await machine.status()
    assert (status.ready, status.started) == (True, False)
    as_machine: Machine = machine
    assert await as_machine.ready() is False
    assert await machine.deletion_cost() == -7
    await machine.set_deletion_cost(2**31 - 1)
    await machine.reallocate("too slow")
    await machine.recreate()
    await machine.restart()
    assert [(method, path, body) for method, path, _, body in wire.calls] == [
        ("GET", "/v1/status", b""),
        ("GET", "/v1/status", b""),
        ("GET", "/v1/deletion-cost", b""),
        ("PUT", "/v1/deletion-cost", b'{"deletion_cost": 2147483647}'),
        ("POST", "/v1/reallocate", b'{"reason": "too slow"}'),
        ("POST", "/v1/recreate", b""),
        ("POST", "/v1/restart", b""),
    ]
    assert all(headers["Metadata"] == "true" for _, _, headers, _ in wire.calls)


@pytest.mark.parametrize("cost", [2**31, -(2**31) - 1])
async def test_a_deletion_cost_is_an_int32(monkeypatch: pytest.MonkeyPatch, cost: int) -> None:
    machine, wire = imds(monkeypatch)
    with pytest.raises(ValueError, match="int32"):
        await machine.set_deletion_cost(cost)
    assert wire.calls == []


@pytest.mark.parametrize(
    ("reason", "sent"),
    [
        ("", "no reason given"),
        (" \n\t\0", "no reason given"),
        ("two\nlines\x1b[31m", "two lines [31m"),
        ("x" * 1001, "x" * 1000),
        ("schön " * 300, None),
        ("🐑" * 999, "🐑" * 250),
        ("lone \ud800", "lone \\ud800"),
        ("the key is k3y", "the key is ***"),
    ],
)
async def test_a_reason_is_one_clean_line_of_1_to_1000_characters(
    monkeypatch: pytest.MonkeyPatch, reason: str, sent: str | None
) -> None:
    machine, wire = imds(monkeypatch, Answer(204, {}, b""), clean=lambda text: text.replace("k3y", "***"))
    await machine.reallocate(reason)
    got = json.loads(wire.calls[0][3])["reason"]
    assert sent in (got, None)
    assert 1 <= len(got) <= 1000
    assert len(got.encode("utf-16-le")) // 2 <= 1000


async def test_a_token_is_kept_until_shortly_before_it_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    first, second, third = (jwt(exp=now + seconds) for seconds in (3600, 7200, 7201))
    machine, wire = imds(monkeypatch, says({"jwt": first}), says({"jwt": second}), says({"jwt": third}))
    assert await machine.token() == await machine.token() == first
    now += 3569
    assert await machine.token() == first
    now += 2
    assert await machine.token() == second
    assert await machine.token(fresh=True) == third
    assert await machine.token() == third
    assert len(wire.calls) == 3


@pytest.mark.parametrize(
    "token",
    [
        "opaque",
        "a.b.c",
        "a.~~~.c",
        jwt(),
        jwt(exp="soon"),
        jwt(exp=None),
        jwt(exp=[1]),
        jwt(exp=0),
        jwt(exp=10**400),
        jwt(exp=float("nan")),
    ],
)
async def test_a_token_that_does_not_say_how_long_it_lives_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    machine, wire = imds(monkeypatch, says({"jwt": token}), says({"jwt": token}))
    assert await machine.token() == await machine.token() == token
    assert len(wire.calls) == 2


async def test_a_token_that_was_refused_is_not_given_again_when_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, _ = imds(monkeypatch, says({"jwt": jwt(exp=time.time() + 99)}), *[says(b"", 500)] * 2)
    await machine.token()
    for fresh in (True, False):
        with pytest.raises(SourceUnavailableError):
            await machine.token(fresh=fresh)


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"\xff", b"[" * 60_000, [], None, {}, {"ready": "yes"}, {"ready": 1, "started": True}],
)
async def test_an_answer_without_sense(monkeypatch: pytest.MonkeyPatch, content: object) -> None:
    for call in ("status", "token", "deletion_cost"):
        machine, _ = imds(monkeypatch, says(content))
        with pytest.raises(SourceUnavailableError, match=r"no sensible answer to /v1/.*SALAD_METADATA_URI"):
            await getattr(machine, call)()


@pytest.mark.parametrize("token", ["", "a b", "a\r\nEvil: 1", "schön", 7, None])
async def test_a_token_that_can_not_stand_in_a_header(monkeypatch: pytest.MonkeyPatch, token: object) -> None:
    machine, _ = imds(monkeypatch, says({"jwt": token}))
    with pytest.raises(SourceUnavailableError):
        await machine.token()


@pytest.mark.parametrize("cost", [True, 1.5, "1", None])
async def test_a_deletion_cost_that_is_none(monkeypatch: pytest.MonkeyPatch, cost: object) -> None:
    machine, _ = imds(monkeypatch, says({"deletion_cost": cost}))
    with pytest.raises(SourceUnavailableError):
        await machine.deletion_cost()


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (NoAnswerError("Connection refused", sent=False), "is out of reach: Connection refused"),
        (TooLargeError(200, 65536), "is out of reach: the answer"),
        (says(b"<html>", 500), "answered GET /v1/status with 500;"),
        (says({"title": "Busy", "detail": "come\nback"}, 503), "with 503: come back;"),
        (says({"title": "Busy"}, 503), "with 503: Busy;"),
        (says({"detail": 7}, 503), "with 503;"),
        (says(["detail"], 400), "with 400;"),
        (says(b"", 307), "with 307;"),
    ],
)
async def test_trouble_is_said_with_the_place_and_the_setting(
    monkeypatch: pytest.MonkeyPatch, trouble: Answer | Exception, words: str
) -> None:
    machine, _ = imds(monkeypatch, trouble)
    with pytest.raises(SourceUnavailableError) as caught:
        await machine.status()
    assert words in str(caught.value)
    assert f"the metadata service {URI} " in str(caught.value)
    assert "SALAD_METADATA_URI" in str(caught.value)
    assert not isinstance(caught.value, InstanceGoneError)


async def test_404_means_that_the_instance_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    machine, _ = imds(monkeypatch, says(b"", 404), on_gone=told.append)
    with pytest.raises(InstanceGoneError, match="does not exist any more"):
        await machine.ready()
    assert len(told) == 1
    assert "does not exist any more" in told[0]


async def test_an_answer_that_drips_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, wire = imds(monkeypatch)

    async def call(*_: object, **__: object) -> Answer:
        await anyio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(wire, "call", call)
    begun = anyio.current_time()
    with pytest.raises(SourceUnavailableError, match="out of reach"):
        await machine.status()
    assert anyio.current_time() - begun < 20


async def test_the_token_is_in_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    token = jwt(exp=time.time() + 99)
    machine, _ = imds(
        monkeypatch,
        says({"jwt": token}),
        says({"detail": f"bad token {token}"}, 401),
        says({"jwt": token + " "}),
    )
    assert await machine.token() == token
    shown = [repr(machine), str(machine)]
    for _ in range(2):
        with pytest.raises(SourceUnavailableError) as caught:
            await machine.token(fresh=True)
        shown += [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
    assert not any(part in text for text in shown for part in token.split("."))
