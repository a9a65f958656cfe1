"""The local metadata service over real HTTP: Salad's published description of it, and the faults on command."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from heeler.local.tokens import ExpiredTokenError, ForeignTokenError, Identity, TokenIssuer
from tests.support.salad import Machine, SaladService

CALLS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/status", None),
    ("GET", "/v1/token", None),
    ("GET", "/v1/deletion-cost", None),
    ("PUT", "/v1/deletion-cost", {"deletion_cost": 7}),
    ("POST", "/v1/reallocate", {"reason": "no GPU"}),
    ("POST", "/v1/recreate", None),
    ("POST", "/v1/restart", None),
]


@pytest.fixture
def salad() -> Iterator[SaladService]:
    with SaladService() as service:
        yield service


def client(machine: Machine) -> httpx.Client:
    return httpx.Client(base_url=machine.url, headers={"Metadata": "true"}, trust_env=False)


@pytest.fixture
def http(salad: SaladService) -> Iterator[httpx.Client]:
    with client(salad.machine) as made:
        yield made


def problem(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    return str(answer.json()["detail"])


def test_status_is_what_the_test_says(salad: SaladService, http: httpx.Client) -> None:
    assert http.get("/v1/status").json() == {"ready": True, "started": True}
    salad.imds.ready = False
    assert http.get("/v1/status").json() == {"ready": False, "started": True}
    salad.imds.started = False
    assert http.get("/v1/status").json() == {"ready": False, "started": False}


@pytest.mark.parametrize("header", [None, "false", "True", "1"])
def test_no_call_passes_without_its_header(salad: SaladService, header: str | None) -> None:
    headers = {} if header is None else {"Metadata": header}
    for method, path, body in CALLS:
        answer = httpx.request(method, salad.machine.url + path, json=body, headers=headers, trust_env=False)
        assert "Metadata" in problem(answer, 403)
    assert not salad.imds.deletion_costs
    assert not salad.imds.reallocations
    assert not salad.imds.recreations
    assert not salad.imds.restarts


def test_every_call_fails_as_it_is_told_to_and_then_passes(salad: SaladService, http: httpx.Client) -> None:
    for method, path, body in CALLS:

        def status(call: tuple[str, str, Any] = (method, path, body)) -> int:
            answer = http.request(call[0], call[1], json=call[2])
            if answer.status_code >= 300:
                problem(answer, answer.status_code)
            return answer.status_code

        good = status()
        assert good in (200, 204)
        salad.imds.fail(503, 2)
        assert [status() for _ in range(3)] == [503, 503, good]
        salad.imds.fail(500)
        assert [status() for _ in range(5)] == [500] * 5
        salad.imds.heal()
        assert status() == good
        salad.imds.gone = True
        assert status() == 404
        salad.imds.gone = False
        seen = [call.status for call in salad.imds.calls if (call.method, call.path) == (method, path)]
        assert seen == [good, 503, 503, good, *[500] * 5, good, 404]


def test_deletion_costs_are_whole_numbers_of_32_bits(salad: SaladService, http: httpx.Client) -> None:
    path = "/v1/deletion-cost"
    assert http.get(path).json() == {"deletion_cost": 0}
    good = [0, 999_999_999, -(1 << 31), (1 << 31) - 1]
    began = time.monotonic()
    for cost in good:
        assert http.put(path, json={"deletion_cost": cost}).json() == {"deletion_cost": cost}
        assert http.get(path).json() == {"deletion_cost": cost}
    bad: list[Any] = [1 << 31, -(1 << 31) - 1, 1.5, "7", True, None]
    for cost in bad:
        assert "deletion_cost" in problem(http.put(path, json={"deletion_cost": cost}), 400)
    problem(http.put(path, json={}), 400)
    problem(http.put(path), 400)
    assert http.get(path).json() == {"deletion_cost": good[-1]}
    times, costs = zip(*salad.imds.deletion_costs, strict=True)
    assert list(costs) == good
    moments = [began, *times, time.monotonic()]
    assert moments == sorted(moments)


def test_a_reallocation_has_a_reason_of_up_to_1000_characters(salad: SaladService, http: httpx.Client) -> None:
    good = ["x", "é" * 1000]
    for reason in good:
        assert http.post("/v1/reallocate", json={"reason": reason}).status_code == 204
    bad: list[Any] = ["", "x" * 1001, 5, None]
    for reason in bad:
        assert "reason" in problem(http.post("/v1/reallocate", json={"reason": reason}), 400)
    problem(http.post("/v1/reallocate"), 400)
    assert [reason for _, reason in salad.imds.reallocations] == good


def test_recreations_and_restarts_are_noted_each_by_itself(salad: SaladService, http: httpx.Client) -> None:
    for path in ("/v1/restart", "/v1/restart", "/v1/recreate"):
        answer = http.post(path)
        assert (answer.status_code, answer.content) == (204, b"")
    assert (len(salad.imds.restarts), len(salad.imds.recreations)) == (2, 1)


def test_what_it_does_not_know_is_refused(http: httpx.Client) -> None:
    problem(http.get("/v1/secrets"), 404)
    problem(http.delete("/v1/token"), 405)


def test_each_machine_has_tokens_of_its_own(salad: SaladService, http: httpx.Client) -> None:
    salad.imds.token_lifetime = 120
    other = salad.add_machine("machine-2")
    token = http.get("/v1/token").json()["jwt"]
    assert len(token) <= 1000, "the limit of the published description"
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert claims["salad_machine_id"] == "machine-1"
    environment = salad.environment()
    assert environment["SALAD_MACHINE_ID"] == "machine-1"
    assert claims["salad_organization_name"] == environment["SALAD_ORGANIZATION_NAME"]
    assert claims["salad_organization_id"] == environment["SALAD_ORGANIZATION_ID"]
    assert claims["salad_workload_id"] == environment["SALAD_CONTAINER_GROUP_ID"]
    assert claims["salad_workload_name"] == environment["SALAD_CONTAINER_GROUP_NAME"]
    assert 100 < claims["exp"] - time.time() <= 120
    with client(other) as second:
        found = salad.tokens.verify(second.get("/v1/token").json()["jwt"])
    assert found == other.imds.identity
    assert found.machine_id == other.environment()["SALAD_MACHINE_ID"] == "machine-2"
    assert other.url != salad.machine.url


def test_a_service_that_was_away_is_back_on_its_port(salad: SaladService, http: httpx.Client) -> None:
    assert http.get("/v1/status").status_code == 200
    salad.machine.stop()
    with pytest.raises(httpx.ConnectError):
        http.get("/v1/status")
    salad.machine.start()
    assert http.get("/v1/status").status_code == 200
    assert str(http.base_url) == salad.machine.url


IDENTITY = Identity("machine", "org-id", "org", "group-id", "group")


def test_a_token_is_good_until_it_expires_or_is_revoked() -> None:
    now = [1000.0]
    issuer = TokenIssuer(wall=lambda: now[0])
    first, second = issuer.issue(IDENTITY, 60), issuer.issue(IDENTITY, 90)
    now[0] = 1059.9
    assert issuer.verify(first) == issuer.verify(second) == IDENTITY
    now[0] = 1060.0
    with pytest.raises(ExpiredTokenError):
        issuer.verify(first)
    assert issuer.verify(second) == IDENTITY
    issuer.revoke_all()
    with pytest.raises(ExpiredTokenError):
        issuer.verify(second)
    assert issuer.verify(issuer.issue(IDENTITY, 1)) == IDENTITY


def test_a_token_is_signed_as_rfc_7519_says_and_a_changed_one_is_foreign() -> None:
    key = b"k" * 32
    issuer = TokenIssuer(key=key)
    head, payload, signature = issuer.issue(IDENTITY, 60).split(".")
    assert json.loads(base64.urlsafe_b64decode(head + "==")) == {"alg": "HS256", "typ": "JWT"}
    digest = hmac.new(key, f"{head}.{payload}".encode(), hashlib.sha256).digest()
    assert base64.urlsafe_b64decode(signature + "==") == digest
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    claims["salad_machine_id"] = "another"
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    for wrong in (f"{head}.{forged}.{signature}", f"{head}.{payload}.", f"{head}.{payload}", "", "..", "ä.ö.ü"):
        with pytest.raises(ForeignTokenError):
            issuer.verify(wrong)
    with pytest.raises(ForeignTokenError):
        TokenIssuer().verify(f"{head}.{payload}.{signature}")
