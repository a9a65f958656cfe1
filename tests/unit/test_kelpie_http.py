"""How we say to Kelpie's API who we are, and what becomes of each of its answers; no sockets."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from heeler.errors import UsageError
from heeler.http import Answer, NoAnswerError, TooLargeError
from heeler.settings import Settings
from heeler.sources.base import SourceUnavailableError
from heeler.sources.kelpie_calls import Identity, KelpieCalls
from heeler.sources.kelpie_http import (
    CallRefusedError,
    KelpieClient,
    NoSuchJobError,
    claims_of,
    credentials_of,
)
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

KEY, SECRET = "kelpie-key-123", "salad-key-456"
URL = "http://kelpie.test:8080/base/"


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


def token(number: int = 1, **claims: object) -> str:
    body = base64.urlsafe_b64encode(json.dumps({"number": number, **claims}).encode()).decode().rstrip("=")
    return f"eyJhbGciOiJub25lIn0.{body}.c2ln"


class Machine:
    """A metadata service; a new token each time that the old one was no good."""

    def __init__(self, **claims: object) -> None:
        self.claims = claims
        self.number = 1
        self.asked: list[bool] = []

    async def ready(self) -> bool:
        return True

    async def token(self, *, fresh: bool = False) -> str:
        self.asked.append(fresh)
        self.number += fresh
        return token(self.number, **self.claims)


class Wire:
    """In the place of `HttpClient`: gives the scripted answers, the last one again and again."""

    def __init__(self, *script: Answer | Exception) -> None:
        self.script = list(script)
        self.sent: list[tuple[str, str, Mapping[str, str], bytes]] = []

    async def call(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes = b"", **_limits: Any
    ) -> Answer:
        self.sent.append((method, path, headers, body))
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, Exception):
            raise step
        return step

    def close(self) -> None:
        return


def answer(status: int, body: object = None, **headers: str) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status, {"content-type": "text/plain;charset=UTF-8", **headers}, content)


def client(*script: Answer | Exception, machine: Machine | None = None, **settings: Any) -> tuple[KelpieClient, Wire]:
    told = Settings(**(settings or {"kelpie_api_key": KEY}))
    made = KelpieClient(URL, credentials_of(told, machine))
    wire = Wire(*script)
    made.__dict__["_client"] = wire
    return made, wire


# Who we are.


async def test_kelpies_own_key_comes_before_all_others() -> None:
    kelpie, wire = client(
        answer(200, []), machine=Machine(), kelpie_api_key=KEY, salad_api_key=SECRET, salad_project="p"
    )
    assert await kelpie.call("GET", "/work", query={"machine_id": "a b"}) == []
    method, path, headers, body = wire.sent[0]
    assert (method, path, body) == ("GET", "/base/work?machine_id=a+b", b"")
    assert headers["X-Kelpie-Key"] == KEY
    assert not {"Authorization", "Salad-Api-Key"} & {*headers}


async def test_salads_key_comes_with_organization_and_project() -> None:
    settings = {"salad_api_key": SECRET, "salad_organization": "lab", "salad_project": "p"}
    kelpie, wire = client(answer(200, {}), machine=Machine(salad_organization_name="other"), **settings)
    await kelpie.call("POST", "/jobs/a/heartbeat", body={"machine_id": "m"})
    headers = wire.sent[0][2]
    assert (headers["Salad-Api-Key"], headers["Salad-Organization"], headers["Salad-Project"]) == (SECRET, "lab", "p")
    assert headers["Content-Type"] == "application/json"
    assert json.loads(wire.sent[0][3]) == {"machine_id": "m"}


async def test_the_organization_is_taken_from_the_token_if_nobody_names_it() -> None:
    machine = Machine(salad_organization_name="lab")
    kelpie, wire = client(answer(200, {}), machine=machine, salad_api_key=SECRET, salad_project="p")
    await kelpie.call("GET", "/jobs")
    assert wire.sent[0][2]["Salad-Organization"] == "lab"
    assert "Authorization" not in wire.sent[0][2]


@pytest.mark.parametrize("claims", [{}, {"salad_organization_name": 5}, {"salad_organization_name": "a\nb"}])
async def test_a_token_that_names_no_organization_is_said_to_name_none(claims: dict[str, object]) -> None:
    kelpie, wire = client(answer(200, {}), machine=Machine(**claims), salad_api_key=SECRET, salad_project="p")
    with pytest.raises(SourceUnavailableError, match="set SALAD_ORGANIZATION_NAME"):
        await kelpie.call("GET", "/jobs")
    assert wire.sent == []


async def test_without_a_key_the_machines_token_is_shown() -> None:
    kelpie, wire = client(answer(200, {}), machine=Machine(), salad_project="p")
    await kelpie.call("GET", "/jobs")
    assert wire.sent[0][2]["Authorization"] == f"Bearer {token()}"
    assert wire.sent[0][2]["Salad-Project"] == "p"


@pytest.mark.parametrize("status", [401, 403])
async def test_a_token_that_is_refused_is_fetched_anew_once(status: int) -> None:
    machine = Machine()
    kelpie, wire = client(answer(status, {"error": "x"}), answer(200, []), machine=machine, salad_project="p")
    assert await kelpie.call("GET", "/work") == []
    assert [sent[2]["Authorization"] for sent in wire.sent] == [f"Bearer {token(1)}", f"Bearer {token(2)}"]
    kelpie, wire = client(answer(status, {"error": "x"}), machine=machine, salad_project="p")
    with pytest.raises(CallRefusedError):
        await kelpie.call("GET", "/work")
    assert len(wire.sent) == 2


async def test_a_key_that_is_refused_is_not_shown_again() -> None:
    kelpie, wire = client(answer(403, {"error": "Forbidden", "message": "Invalid API Key"}))
    with pytest.raises(CallRefusedError, match="Invalid API Key; check KELPIE_API_KEY, or SALAD_API_KEY with") as error:
        await kelpie.call("GET", "/work")
    assert error.value.status == 403
    assert len(wire.sent) == 1


@pytest.mark.parametrize(
    ("settings", "machine", "words"),
    [
        ({}, None, "set KELPIE_API_KEY; or SALAD_API_KEY with SALAD_ORGANIZATION_NAME and SALAD_PROJECT_NAME"),
        ({}, Machine(), "SALAD_PROJECT_NAME"),
        ({"salad_api_key": SECRET}, Machine(), "SALAD_PROJECT_NAME"),
        ({"salad_api_key": SECRET, "salad_project": "p"}, None, "SALAD_ORGANIZATION_NAME"),
        ({"kelpie_api_key": KEY + "\n"}, None, "KELPIE_API_KEY holds"),
        ({"kelpie_api_key": "ключ"}, None, "KELPIE_API_KEY holds"),
        ({"salad_api_key": SECRET + " "}, None, "SALAD_API_KEY holds"),
        ({"salad_project": "a\r\nb"}, Machine(), "SALAD_PROJECT_NAME holds"),
        ({"salad_organization": "ä"}, Machine(), "SALAD_ORGANIZATION_NAME holds"),
    ],
)
def test_what_is_missing_or_can_not_be_sent_is_named(
    settings: dict[str, Any], machine: Machine | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as error:
        credentials_of(Settings(**settings), machine)
    assert KEY not in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("text", ["", "a", "a.b", "a.e30", "a.!!.c", "a." + "W10" + ".c", "a.bnVsbA.c", "..", "a.ä.c"])
def test_a_token_that_can_not_be_read_says_nothing(text: str) -> None:
    assert claims_of(text) == {}


@pytest.mark.parametrize(
    "url",
    [
        "",
        "kelpie.test",
        "ftp://kelpie.test",
        "http://",
        "http://:80",
        "http://a:b@kelpie.test",
        "http://kelpie.test:0",
        "http://kelpie.test:99999",
        "http://kelpie.test/?a=b",
        "http://kelpie.test/#a",
        "http://kel pie.test",
        "http://kelpie.test/ä",
        "http://[::1",
        "http://kelpie.test/\n",
    ],
)
def test_a_url_that_is_none_is_said_to_be_none(url: str) -> None:
    with pytest.raises(UsageError, match=r"KELPIE_API_URL \(or --kelpie-url\)") as error:
        KelpieClient(url, credentials_of(Settings(kelpie_api_key=KEY), None))
    assert "a:b" not in str(error.value)


# What its answers mean.


@pytest.mark.parametrize("kind", ["text/plain;charset=UTF-8", "application/json", "text/html"])
async def test_an_answer_is_json_whatever_it_calls_itself(kind: str) -> None:
    kelpie, _ = client(Answer(200, {"content-type": kind}, b'{"status": "running"}'))
    assert await kelpie.call("GET", "/x") == {"status": "running"}
    kelpie, _ = client(Answer(404, {"content-type": kind}, b'{"error": "Not Found", "message": "Job not found"}'))
    with pytest.raises(NoSuchJobError, match=r"http://kelpie.test:8080/base answered GET /x with 404: Job not found"):
        await kelpie.call("GET", "/x")


@pytest.mark.parametrize("body", [b"", b"null", b"<html>", b"{", b"[" * 100_000, b"\xff"])
async def test_an_answer_that_is_no_json_is_none(body: bytes) -> None:
    kelpie, _ = client(answer(200, body))
    with pytest.raises(SourceUnavailableError, match="gave no sensible answer to GET /x") as error:
        await kelpie.call("GET", "/x")
    assert not isinstance(error.value, CallRefusedError)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 100, 600])
async def test_what_may_pass_is_no_refusal(status: int) -> None:
    kelpie, wire = client(answer(status, b"<html>busy"))
    with pytest.raises(SourceUnavailableError, match=f"answered GET /x with {status}") as error:
        await kelpie.call("GET", "/x")
    assert not isinstance(error.value, CallRefusedError)
    assert len(wire.sent) == 1, "nothing is tried again here"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_and_the_setting_is_named(status: int) -> None:
    kelpie, wire = client(answer(status, b"", location="https://elsewhere.test/"))
    with pytest.raises(CallRefusedError, match=r"is KELPIE_API_URL \(or --kelpie-url\) right\?"):
        await kelpie.call("GET", "/x")
    assert len(wire.sent) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"<html>not here",
        b"",
        b'"gone"',
        b'{"error": "Route Not Found"}',
        b'{"message": "no Route matched with those values"}',
        b'{"error": "Not Found"}',
        b'{"error": "Job not found"}',
        b'{"message": ["Job not found"]}',
        b'{"message": "Job not found on this server"}',
    ],
)
async def test_a_404_of_somebody_else_says_nothing_of_a_job(body: bytes) -> None:
    kelpie, _ = client(answer(404, body))
    with pytest.raises(CallRefusedError, match="KELPIE_API_URL") as error:
        await kelpie.call("POST", "/jobs/a/heartbeat")
    assert error.value.status == 404


@pytest.mark.parametrize("words", ["Job not found", "job not found", "JOB NOT FOUND"])
async def test_that_there_is_no_such_job_only_the_api_says(words: str) -> None:
    kelpie, _ = client(answer(404, {"error": "Not Found", "message": words}))
    with pytest.raises(NoSuchJobError, match=words):
        await kelpie.call("POST", "/jobs/a/heartbeat")


GONE = answer(404, {"error": "Not Found", "message": "Job not found"})
THERE = answer(200, {"id": "a", "status": "running"})
CALLS: dict[str, Callable[[KelpieCalls], Awaitable[object]]] = {
    "heartbeat": lambda calls: calls.heartbeat("a"),
    "completed": lambda calls: calls.completed("a"),
    "failed": lambda calls: calls.failed("a"),
    "get": lambda calls: calls.job("a"),
}


@pytest.mark.parametrize("kind", sorted(CALLS))
async def test_that_a_job_is_gone_the_api_says_twice(kind: str) -> None:
    kelpie, wire = client(GONE)
    with pytest.raises(NoSuchJobError):
        await CALLS[kind](KelpieCalls(kelpie, Identity("m", "g")))
    assert [sent[:2] for sent in wire.sent[1:]] == [("GET", "/base/jobs/a")]


@pytest.mark.parametrize("kind", sorted(CALLS))
@pytest.mark.parametrize(
    "second", [answer(503), answer(404, {"message": "no Route matched"}), NoAnswerError("", sent=True)]
)
async def test_a_job_that_is_said_to_be_gone_once_is_in_doubt(kind: str, second: Answer | Exception) -> None:
    kelpie, _ = client(GONE, second)
    with pytest.raises(SourceUnavailableError):
        await CALLS[kind](KelpieCalls(kelpie, Identity("m", "g")))


@pytest.mark.parametrize("kind", sorted(CALLS))
async def test_a_job_that_is_shown_after_all_is_not_gone(kind: str) -> None:
    kelpie, wire = client(GONE, THERE)
    calls = KelpieCalls(kelpie, Identity("m", "g"))
    if kind == "get":
        assert (await calls.job("a")).status == "running"
    else:
        with pytest.raises(SourceUnavailableError, match="Job not found; but it shows that job"):
            await CALLS[kind](calls)
    assert len(wire.sent) == 2


async def test_what_is_wrong_with_a_body_is_told_by_its_field() -> None:
    errors = [{"code": "x", "message": "Required", "path": ["body", "command"]}, {"message": "more"}]
    kelpie, _ = client(answer(400, {"success": False, "errors": errors}))
    with pytest.raises(CallRefusedError, match=r"with 400: body\.command: Required$"):
        await kelpie.call("POST", "/jobs")


@pytest.mark.parametrize("errors", [[], [5], [{}], [{"path": 5, "message": 5}], "none", None])
async def test_odd_errors_are_no_trouble(errors: object) -> None:
    kelpie, _ = client(answer(400, {"errors": errors}))
    with pytest.raises(CallRefusedError, match="answered POST /jobs with 400"):
        await kelpie.call("POST", "/jobs")


async def test_long_or_unprintable_words_are_shortened_and_cleaned() -> None:
    kelpie, _ = client(answer(500, {"message": "a\x1b[31m\nb" + "c" * 10_000}))
    with pytest.raises(SourceUnavailableError) as error:
        await kelpie.call("GET", "/x")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("failure", [NoAnswerError("nobody is there", sent=False), TooLargeError(200, 5)])
async def test_no_answer_is_said_to_be_none(failure: Exception) -> None:
    kelpie, _ = client(failure)
    with pytest.raises(SourceUnavailableError, match=r"Kelpie's API at http://kelpie.test:8080/base is out of reach: "):
        await kelpie.call("GET", "/x")


@pytest.mark.parametrize(
    ("settings", "secret"),
    [
        ({"kelpie_api_key": KEY}, KEY),
        ({"salad_api_key": SECRET, "salad_organization": "lab", "salad_project": "p"}, SECRET),
        ({"salad_project": "p"}, token()),
    ],
)
async def test_an_api_that_repeats_a_key_does_not_have_us_show_it(settings: dict[str, Any], secret: str) -> None:
    for status in (400, 401, 403, 404, 500):
        kelpie, _ = client(answer(status, {"message": f"no such key: {secret}"}), machine=Machine(), **settings)
        if "salad_project" in settings and "salad_api_key" not in settings:
            kelpie._credentials._machine.token = _same  # type: ignore[attr-defined]
        with pytest.raises((SourceUnavailableError, NoSuchJobError), match="no such key") as error:
            await kelpie.call("GET", "/x")
        assert secret not in f"{error.value} {error.value!r}"
        assert secret not in f"{kelpie!r} {kelpie._credentials!r}"
        assert error.value.__cause__ is None


async def _same(*, fresh: bool = False) -> str:
    return token()
