"""Our S3 server's faults, counts, process and lifecycle, seen from the other end of the socket."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.s3 import (
    Answer,
    Corrupt,
    Cut,
    Delay,
    Rules,
    S3Server,
    Slow,
    Stall,
    Truncate,
)
from tests.support.s3_clients import obstore_store
from tests.support.s3_raw import Raw, call, code_in

OPEN = Rules.lenient(verify_signature=False)
BODY = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def shared() -> Iterator[S3Server]:
    with S3Server.start(rules=OPEN, buckets=["b"]) as started:
        yield started


@pytest.fixture
def server(shared: S3Server) -> Iterator[S3Server]:
    shared.put("b", "k", BODY)
    shared.stats.reset()
    yield shared
    shared.faults.clear()
    for key in shared.objects("b"):
        shared.delete("b", key)


# Answers.


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (500, None, "InternalError"),
        (503, None, "SlowDown"),
        (503, "ServiceUnavailable", "ServiceUnavailable"),
        (429, None, "TooManyRequests"),
        (403, None, "AccessDenied"),
    ],
)
def test_a_status_is_answered_and_nothing_is_done(server: S3Server, status: int, code: str | None, told: str) -> None:
    server.faults.add(Answer(status, code, retry_after=7), operation="PutObject")
    answered, data, headers = call(server, "PUT", "/b/new", b"x")
    assert (answered, code_in(data), headers["retry-after"]) == (status, told, "7")
    assert "new" not in server.objects("b")
    (record,) = server.stats.log
    assert (record.status, record.code, record.bytes_in) == (status, told, 1)


def test_an_answer_after_the_effect_hides_that_it_was_done(server: S3Server) -> None:
    server.faults.add(Answer(500, at="after"))
    assert call(server, "PUT", "/b/new", b"x")[0] == 500
    assert server.objects("b")["new"] == b"x"


def test_an_answer_to_head_has_no_body(server: S3Server) -> None:
    server.faults.add(Answer(503))
    with Raw(server) as raw:
        raw.send_head("HEAD", "/b/k", extra="Connection: close\r\n")
        data, _ = raw.read_to_end()
    assert data.startswith(b"HTTP/1.1 503 ")
    assert data.endswith(b"\r\n\r\n")


# Delays and stalls.


def test_a_delay_comes_before_the_effect_or_after_it(server: S3Server) -> None:
    for at, done in (("before", False), ("after", True)):
        rule = server.faults.add(Delay(0.15, at=at))  # type: ignore[arg-type]
        with ThreadPoolExecutor(1) as pool:
            began = time.monotonic()
            answer = pool.submit(call, server, "PUT", f"/b/{at}", b"x")
            rule.wait_hits()
            time.sleep(0.05)
            assert (at in server.objects("b")) is done
            assert answer.result()[0] == 200
        assert time.monotonic() - began >= 0.15
        server.faults.clear()


def test_a_stall_before_the_effect_lasts_until_it_is_released(server: S3Server) -> None:
    rule = server.faults.add(Stall())
    with Raw(server) as raw:
        raw.send_head("PUT", "/b/new", 1)
        raw.socket.sendall(b"x")
        rule.wait_held()
        assert raw.silent(0.05)
        assert "new" not in server.objects("b")
        rule.release()
        assert raw.socket.recv(12) == b"HTTP/1.1 200"
    assert server.objects("b")["new"] == b"x"


def test_a_stall_after_the_effect_ends_when_the_rules_are_cleared(server: S3Server) -> None:
    rule = server.faults.add(Stall(at="after"))
    with Raw(server) as raw:
        raw.send_head("PUT", "/b/new")
        rule.wait_held()
        assert raw.silent(0.05)
        assert "new" in server.objects("b")
        server.faults.clear()
        assert raw.socket.recv(12) == b"HTTP/1.1 200"


def test_a_stall_of_some_seconds_ends_by_itself(server: S3Server) -> None:
    server.faults.add(Stall(0.1))
    began = time.monotonic()
    assert call(server, "GET")[0] == 200
    assert time.monotonic() - began >= 0.1


def test_a_client_that_leaves_during_a_stall_is_counted_as_unanswered(server: S3Server) -> None:
    rule = server.faults.add(Stall())
    with Raw(server) as raw:
        raw.send_head("PUT", "/b/new")
        rule.wait_held()
    snapshot = server.stats.wait_until(lambda counted: bool(counted.log))
    assert [record.status for record in snapshot.log] == [0]
    assert "new" not in server.objects("b")


def test_a_stalled_upload_is_not_read_any_further(server: S3Server) -> None:
    rule = server.faults.add(Stall(at="request_body", after_bytes=1000))
    size = 64 << 20
    with Raw(server) as raw:
        raw.send_head("PUT", "/b/new", size)
        raw.socket.sendall(bytes(1001))
        rule.wait_held()
        sent = 1001 + raw.send_until_it_blocks(size - 1001)
        assert sent < size
        rule.release()
        raw.socket.sendall(bytes(size - sent))
        assert raw.socket.recv(12) == b"HTTP/1.1 200"
    assert server.object("b", "new").body.size == size


def test_a_small_upload_that_came_at_once_is_stalled_too(server: S3Server) -> None:
    rule = server.faults.add(Stall(at="request_body", after_bytes=2))
    with Raw(server) as raw:
        raw.send_head("PUT", "/b/new", 3)
        raw.socket.sendall(b"abc")
        rule.wait_held()
        assert raw.silent(0.05)
        assert "new" not in server.objects("b")
        rule.release()
        assert raw.socket.recv(12) == b"HTTP/1.1 200"


def test_a_download_stalls_after_some_bytes(server: S3Server) -> None:
    rule = server.faults.add(Stall(at="response_body", after_bytes=1000))
    with Raw(server) as raw:
        raw.send_head("GET", "/b/k", extra="Connection: close\r\n")
        snapshot = server.stats.wait_until(lambda counted: counted.bytes_out >= 1000)
        assert snapshot.bytes_out == 1000
        data = b""
        while not data.endswith(BODY[:1000]):
            data += raw.socket.recv(65536)
        assert raw.silent(0.05)
        rule.release()
        rest, _ = raw.read_to_end()
    assert (data + rest).endswith(b"\r\n\r\n" + BODY)


# Cuts.


@pytest.mark.parametrize(("at", "done"), [("before", False), ("after", True)])
def test_a_connection_is_reset_before_the_effect_or_after_it(server: S3Server, at: str, done: bool) -> None:
    server.faults.add(Cut(at=at))  # type: ignore[arg-type]
    with Raw(server) as raw:
        raw.send_head("PUT", "/b/new", 1)
        raw.socket.sendall(b"x")
        assert raw.read_to_end() == (b"", True)
    assert ("new" in server.objects("b")) is done
    assert [record.status for record in server.stats.log] == [0]


def test_an_upload_is_cut_after_some_bytes(server: S3Server) -> None:
    server.faults.add(Cut(at="request_body", after_bytes=5000))
    assert call(server, "PUT", "/b/small", bytes(5000))[0] == 200
    for size in (5001, 10_000_000):
        with pytest.raises(ConnectionError):
            call(server, "PUT", "/b/large", bytes(size))
    assert "large" not in server.objects("b")
    assert [record.status for record in server.stats.log] == [200, 0, 0]


@pytest.mark.parametrize("reset", [True, False])
def test_a_download_is_cut_after_some_bytes(server: S3Server, reset: bool) -> None:
    server.faults.add(Cut(at="response_body", after_bytes=1000, reset=reset))
    with Raw(server) as raw:
        raw.send_head("GET", "/b/k")
        data, was_reset = raw.read_to_end()
    head, _, body = data.partition(b"\r\n\r\n")
    assert f"content-length: {len(BODY)}".encode() in head.lower()
    assert (body, was_reset) == (BODY[:1000], reset)
    assert server.stats.bytes_out == 1000


def test_a_cut_loses_nothing_of_what_was_sent_before_it(server: S3Server) -> None:
    server.put("b", "big", bytes(1_000_000))
    server.faults.add(Cut(at="response_body", after_bytes=300_000))
    with Raw(server, receive_buffer=4096) as raw:
        raw.send_head("GET", "/b/big")
        server.stats.wait_until(lambda counted: counted.bytes_out == 300_000)
        data, was_reset = raw.read_to_end()
    assert (len(data.partition(b"\r\n\r\n")[2]), was_reset) == (300_000, True)


# Bodies.


def test_a_truncated_body_is_short_of_its_length(server: S3Server) -> None:
    server.faults.add(Truncate(100))
    with pytest.raises(http.client.IncompleteRead) as caught:
        call(server, "GET")
    assert caught.value.partial == BODY[:100]


def test_a_hidden_truncation_looks_whole(server: S3Server) -> None:
    server.faults.add(Truncate(100, hidden=True))
    status, data, headers = call(server, "GET")
    assert (status, data, headers["content-length"]) == (200, BODY[:100], "100")


@pytest.mark.parametrize("offset", [0, 5000, -1])
def test_one_byte_is_corrupted(server: S3Server, offset: int) -> None:
    server.faults.add(Corrupt(offset))
    data = call(server, "GET")[1]
    wrong = [index for index, (sent, got) in enumerate(zip(BODY, data, strict=True)) if sent != got]
    assert wrong == [offset % len(BODY)]
    part = call(server, "GET", Range="bytes=10-19")[1]
    assert sum(sent != got for sent, got in zip(BODY[10:20], part, strict=True)) == 1
    assert server.objects("b")["k"] == BODY


def test_a_slow_link_takes_its_time_both_ways(server: S3Server) -> None:
    server.faults.add(Slow(up=40_000, down=20_000))
    began = time.monotonic()
    assert call(server, "PUT", "/b/new", BODY)[0] == 200
    up = time.monotonic() - began
    assert call(server, "GET", "/b/new")[1] == BODY
    down = time.monotonic() - began - up
    assert up > 0.2
    assert down > 0.45
    assert max(up, down) < 5


# Which requests.


def test_a_rule_hits_only_what_it_matches(server: S3Server) -> None:
    wrong: list[dict[str, str | float | None]] = [
        {"method": "PUT"},
        {"operation": "HeadObject"},
        {"bucket": "c"},
        {"key": "x*"},
        {"key_regex": "^x"},
        {"part_number": 1},
    ]
    for match in wrong:
        server.faults.add(Answer(500), **match)
    assert call(server, "GET")[0] == 200
    right: list[dict[str, str | float | None]] = [
        {"method": "GET"},
        {"operation": "GetObject"},
        {"bucket": "b"},
        {"key": "a/*.txt"},
        {"key_regex": r"/b\."},
    ]
    server.put("b", "a/c/b.txt", b"")
    for match in right:
        server.faults.clear()
        server.faults.add(Answer(500), **match)
        assert call(server, "GET", "/b/a/c/b.txt")[0] == 500


def test_a_rule_hits_a_part_by_its_number(server: S3Server) -> None:
    upload = call(server, "POST", "/b/m?uploads")[1].decode().partition("<UploadId>")[2].partition("<")[0]
    server.faults.add(Answer(500), operation="UploadPart", part_number=2)
    path = f"/b/m?uploadId={upload}&partNumber="
    assert [call(server, "PUT", path + number, b"x")[0] for number in "123"] == [200, 500, 200]
    assert [record.part_number for record in server.stats.find("UploadPart", "m")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("match", "hit"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"nth": 2}, [2]),
        ({"count": 2}, [1, 2]),
        ({"nth": 2, "count": 3}, [2, 3, 4]),
    ],
)
def test_a_rule_hits_as_often_as_it_may(server: S3Server, match: dict[str, float], hit: list[int]) -> None:
    rule = server.faults.add(Answer(500), **match)
    statuses = [call(server, "GET")[0] for _ in range(5)]
    assert [index for index, status in enumerate(statuses, 1) if status == 500] == hit
    assert rule.hits == len(hit)


def test_a_probable_rule_hits_the_same_ones_for_the_same_seed(server: S3Server) -> None:
    def run(seed: int) -> list[int]:
        server.faults.clear()
        server.faults.add(Answer(500), probability=0.5, seed=seed)
        return [call(server, "GET")[0] for _ in range(40)]

    first = run(1)
    assert set(first) == {200, 500}
    assert run(1) == first != run(2)


def test_rules_act_together_and_can_be_taken_away_one_by_one(server: S3Server) -> None:
    delay = server.faults.add(Delay(0.1))
    error = server.faults.add(Answer(500))
    assert server.faults.rules() == (delay, error)
    began = time.monotonic()
    assert call(server, "GET")[0] == 500
    assert time.monotonic() - began >= 0.1
    server.faults.remove(error)
    assert call(server, "GET")[0] == 200
    assert (delay.hits, error.hits) == (2, 1)


def test_waiting_for_a_hit_that_does_not_come_times_out(server: S3Server) -> None:
    rule = server.faults.add(Answer(500))
    with pytest.raises(TimeoutError):
        rule.wait_hits(timeout=0.01)


# HTTP.


def test_continue_is_answered_only_if_the_rules_say_so() -> None:
    for answers in (True, False):
        with S3Server.start(rules=OPEN.but(answer_continue=answers), buckets=["b"]) as server, Raw(server) as raw:
            raw.send_head("PUT", "/b/k", 1, "Expect: 100-continue\r\n")
            assert raw.silent(0.05) is not answers
            raw.socket.sendall(b"x")
            first = raw.socket.recv(25)
            assert first.startswith(b"HTTP/1.1 100 " if answers else b"HTTP/1.1 200 ")


def test_requests_on_one_connection_are_answered_in_order(server: S3Server) -> None:
    server.faults.add(Delay(0.05), count=1)
    with Raw(server) as raw:
        raw.socket.sendall(
            b"GET /b/k HTTP/1.1\r\nHost: h\r\nRange: bytes=1-1\r\n\r\n"
            b"GET /b/k HTTP/1.1\r\nHost: h\r\nRange: bytes=2-2\r\nConnection: close\r\n\r\n"
        )
        data, _ = raw.read_to_end()
    assert [part[-1:] for part in data.split(b"HTTP/1.1 ")[1:]] == [BODY[1:2], BODY[2:3]]


def test_what_is_no_http_is_answered_400(server: S3Server) -> None:
    with Raw(server) as raw:
        raw.socket.sendall(b"nonsense\r\n\r\n")
        data, _ = raw.read_to_end()
    assert data.startswith(b"HTTP/1.1 400 ")
    assert call(server, "GET", "/b/%ff")[0] == 400


# Counts.


def test_calls_and_bytes_are_counted(server: S3Server) -> None:
    call(server, "PUT", "/b/n", b"12345")
    call(server, "GET", "/b/n")
    call(server, "GET", "/b/n", Range="bytes=0-1")
    call(server, "GET", "/b/none")
    stats = server.stats.snapshot()
    assert stats.calls == {"PutObject": 1, "GetObject": 3}
    assert stats.statuses == {200: 2, 206: 1, 404: 1}
    error = stats.log[-1]
    assert (error.key, error.code) == ("none", "NoSuchKey")
    assert (stats.bytes_in, stats.bytes_out - error.bytes_out, stats.connections) == (5, 7, 4)
    assert [record.bytes_out for record in server.stats.find("GetObject", "n")] == [5, 2]
    server.stats.reset()
    assert (server.stats.calls, server.stats.bytes_in, server.stats.bytes_out) == ({}, 0, 0)


def test_a_large_download_is_counted_whole(server: S3Server) -> None:
    server.put("b", "big", bytes(5_000_000))
    assert len(call(server, "GET", "/b/big")[1]) == 5_000_000
    assert server.stats.bytes_out == 5_000_000


def test_counts_hold_under_many_threads(server: S3Server) -> None:
    store = obstore_store(server, "b")

    def work(thread: int) -> None:
        for number in range(50):
            store.put(f"{thread}/{number}", b"x" * 10)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert server.stats.calls == {"PutObject": 400}
    assert server.stats.bytes_in == 4000
    assert len(server.objects("b")) == 401


def test_versions_are_kept_on_demand() -> None:
    with S3Server.start(rules=OPEN.but(keep_history=True), buckets=["b"]) as server:
        call(server, "PUT", "/b/k", b"1")
        call(server, "PUT", "/b/k", b"2")
        call(server, "DELETE", "/b/k")
        assert server.history("b", "k") == [b"1", b"2", None]
        assert server.history("b", "none") == []
