"""The fault proxy, with the test at both of its ends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from obstore.exceptions import GenericError

from tests.support.proxy import FaultProxy, ProxyCounts, ProxyFaults
from tests.support.s3 import Rules, S3Server
from tests.support.s3_clients import boto3_client, obstore_store


class Ends:
    """A proxy, and the two ends of connections through it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self._sockets: list[socket.socket] = []
        self.proxy = FaultProxy("127.0.0.1", self._listener.getsockname()[1])

    def client(self, receive_buffer: int = 0) -> socket.socket:
        """The client's end alone."""
        client = self._keep(socket.socket())
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(("127.0.0.1", self.proxy.port))
        return client

    def accept(self) -> socket.socket:
        """The server's end of the next connection."""
        return self._keep(self._listener.accept()[0])

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """Both ends."""
        client = self.client()
        return client, self.accept()

    def _keep(self, kept: socket.socket) -> socket.socket:
        kept.settimeout(10)
        self._sockets.append(kept)
        return kept

    def close(self) -> None:
        for each in (*self._sockets, self._listener):
            each.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    with ends.proxy:
        yield ends
    ends.close()


def receive(end: socket.socket, size: int) -> bytes:
    """Just so many bytes, or fewer if the connection ends in order."""
    data = b""
    while len(data) < size and (piece := end.recv(size - len(data))):
        data += piece
    return data


def silent(end: socket.socket, seconds: float = 0.05) -> bool:
    """Whether nothing comes for a while, not even the end."""
    end.settimeout(seconds)
    try:
        end.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        end.settimeout(10)
    return False


def is_reset(end: socket.socket) -> bool:
    """Whether the connection ends by a reset."""
    try:
        while end.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def test_bytes_pass_both_ways_and_are_counted(ends: Ends) -> None:
    client, server = ends.connect()
    data = bytes(range(256)) * 4000
    with ThreadPoolExecutor(2) as pool:
        pool.submit(client.sendall, data)
        assert receive(server, len(data)) == data
        pool.submit(server.sendall, data[:500_000])
        assert receive(client, 500_000) == data[:500_000]
    assert ends.proxy.counts == ProxyCounts(connections=1, open_connections=1, bytes_up=len(data), bytes_down=500_000)


def test_one_way_ends_before_the_other(ends: Ends) -> None:
    client, server = ends.connect()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert receive(server, 100) == b"question"
    server.sendall(b"answer")
    server.close()
    assert receive(client, 100) == b"answer"
    counts = ends.proxy.wait_until(lambda counts: counts.open_connections == 0)
    assert counts.connections == 1


def test_a_reset_of_one_end_resets_the_other(ends: Ends) -> None:
    client, server = ends.connect()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert is_reset(server)


def test_latency_is_added_each_way(ends: Ends) -> None:
    client, server = ends.connect()
    ends.proxy.set(latency_up=0.3)
    began = time.monotonic()
    client.sendall(b"x")
    receive(server, 1)
    up = time.monotonic() - began
    server.sendall(b"y")
    receive(client, 1)
    down = time.monotonic() - began - up
    assert up >= 0.3 > down
    ends.proxy.set(latency=0.06, latency_up=0.0)
    began = time.monotonic()
    server.sendall(b"y")
    receive(client, 1)
    assert time.monotonic() - began >= 0.06


def test_latency_does_not_limit_the_rate(ends: Ends) -> None:
    client, server = ends.connect()
    ends.proxy.set(latency=0.1)
    size = 3_000_000
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(client.sendall, bytes(size))
        assert len(receive(server, size)) == size
    assert 0.1 <= time.monotonic() - began < 2


@pytest.mark.parametrize("way", ["up", "down"])
def test_the_rate_is_limited_each_way(ends: Ends, way: str) -> None:
    client, server = ends.connect()
    source, target = (client, server) if way == "up" else (server, client)
    rate: dict[str, Any] = {f"rate_{way}": 100_000}
    ends.proxy.set(**rate)
    began = time.monotonic()
    source.sendall(bytes(30_000))
    receive(target, 30_000)
    limited = time.monotonic() - began
    assert limited > 0.25
    target.sendall(bytes(30_000))
    receive(source, 30_000)
    assert time.monotonic() - began - limited < limited
    ends.proxy.set(rate=0)
    began = time.monotonic()
    source.sendall(bytes(30_000))
    receive(target, 30_000)
    assert time.monotonic() - began < limited


def test_new_connections_are_refused_and_old_ones_live(ends: Ends) -> None:
    client, server = ends.connect()
    ends.proxy.set(refuse=True)
    with pytest.raises(ConnectionRefusedError):
        ends.client()
    client.sendall(b"x")
    assert receive(server, 1) == b"x"
    ends.proxy.set(refuse=False)
    ends.connect()
    assert ends.proxy.counts.connections == 2


def test_connections_are_reset_on_both_sides(ends: Ends) -> None:
    pairs = [ends.connect() for _ in range(3)]
    assert ends.proxy.reset_connections() == 3
    assert all(is_reset(end) for pair in pairs for end in pair)
    assert ends.proxy.counts.open_connections == 0
    client, server = ends.connect()
    client.sendall(b"x")
    assert receive(server, 1) == b"x"


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_connection_is_cut_after_some_bytes(ends: Ends, way: str) -> None:
    client, server = ends.connect()
    source, target = (client, server) if way == "up" else (server, client)
    source.sendall(b"before")
    assert receive(target, 6) == b"before"
    cut: dict[str, Any] = {f"cut_{way}": 100_000}
    ends.proxy.set(**cut)
    source.sendall(bytes(40_000))
    assert len(receive(target, 40_000)) == 40_000
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(source.sendall, bytes(100_000))
        assert len(receive(target, 60_000)) == 60_000
        assert is_reset(target)
        sending.exception()
    ends.proxy.clear()
    client, server = ends.connect()
    client.sendall(bytes(200_000))
    assert len(receive(server, 200_000)) == 200_000


def test_a_cut_loses_nothing_of_what_passed_before_it(ends: Ends) -> None:
    client = ends.client(receive_buffer=4096)
    server = ends.accept()
    ends.proxy.set(cut_down=300_000)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(server.sendall, bytes(1_000_000))
        ends.proxy.wait_until(lambda counts: counts.bytes_down == 300_000)
        assert len(receive(client, 300_000)) == 300_000
        assert is_reset(client)
        sending.exception()


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_stall_holds_bytes_and_lets_them_go_in_order(ends: Ends, way: str) -> None:
    client, server = ends.connect()
    source, target = (client, server) if way == "up" else (server, client)
    ends.proxy.set(**{f"stall_{way}": True})
    source.sendall(b"abc")
    assert silent(target)
    source.sendall(b"def")
    target.sendall(b"x")
    assert receive(source, 1) == b"x"
    ends.proxy.set(stall=False)
    assert receive(target, 6) == b"abcdef"


def test_a_partition_is_silent_both_ways_and_hides_endings(ends: Ends) -> None:
    client, server = ends.connect()
    ends.proxy.set(partition=True)
    client.sendall(b"lost")
    server.sendall(b"lost")
    ends.proxy.wait_until(lambda counts: counts.dropped == 8)
    server.close()
    assert silent(client)
    ends.proxy.set(partition=False)
    assert is_reset(client)
    assert ends.proxy.counts.bytes_up == 0


def test_a_connection_that_was_quiet_outlives_a_partition(ends: Ends) -> None:
    client, server = ends.connect()
    ends.proxy.set(partition=True)
    ends.proxy.set(partition=False)
    client.sendall(b"x")
    assert receive(server, 1) == b"x"


def test_a_connection_made_in_a_partition_gets_through_when_it_heals(ends: Ends) -> None:
    ends.proxy.set(partition=True)
    client = ends.client()
    client.sendall(b"x")
    assert silent(client)
    ends.proxy.clear()
    server = ends.accept()
    assert receive(server, 1) == b"x"


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_interim_answer_is_swallowed_and_nothing_else(ends: Ends, pieces: int) -> None:
    interim, rest = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"
    client, server = ends.connect()
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ends.proxy.set(swallow_continue=True)
    if pieces == 1:
        server.sendall(interim + rest)
    else:
        for piece in (interim[:5], interim[5:20], interim[20:] + rest):
            server.sendall(piece)
            time.sleep(0.02)
    assert receive(client, len(rest)) == rest
    assert ends.proxy.counts.continues_swallowed == 1
    ends.proxy.clear()
    server.sendall(interim)
    assert receive(client, len(interim)) == interim


def test_an_upstream_that_is_not_there_resets_the_client() -> None:
    with socket.socket() as silent_port:
        silent_port.bind(("127.0.0.1", 0))
        with FaultProxy("127.0.0.1", silent_port.getsockname()[1]) as proxy:
            with pytest.raises(ConnectionResetError):
                socket.create_connection(("127.0.0.1", proxy.port), timeout=10).recv(1)
            assert proxy.counts.connections == 1


def test_clearing_heals_everything(ends: Ends) -> None:
    ends.proxy.set(latency=9, rate=1, stall=True, partition=True, refuse=True, cut_up=1, swallow_continue=True)
    ends.proxy.clear()
    assert ends.proxy.faults == ProxyFaults()
    client, server = ends.connect()
    client.sendall(b"xyz")
    assert receive(server, 3) == b"xyz"


def test_waiting_for_what_does_not_come_times_out(ends: Ends) -> None:
    with pytest.raises(TimeoutError):
        ends.proxy.wait_until(lambda counts: counts.connections == 1, timeout=0.01)


def test_a_closed_proxy_leaves_no_thread_and_no_socket() -> None:
    process = psutil.Process()
    threads, descriptors = threading.active_count(), process.num_fds()
    ends = Ends()
    with ends.proxy:
        client, server = ends.connect()
        ends.proxy.set(stall=True)
        client.sendall(b"x")
    assert is_reset(client)
    assert is_reset(server)
    ends.proxy.close()
    ends.close()
    FaultProxy("127.0.0.1", 1).close()
    assert (threading.active_count(), process.num_fds()) == (threads, descriptors)


# Real clients through it.


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server.start(rules=Rules.lenient(), buckets=["b"]) as server:
        yield server


def test_clients_work_through_the_proxy(s3: S3Server) -> None:
    with FaultProxy("127.0.0.1", s3.port) as proxy:
        obstore_store(s3, "b", url=proxy.url).put("k", b"x" * 1000)
        assert boto3_client(s3, url=proxy.url).get_object(Bucket="b", Key="k")["Body"].read() == b"x" * 1000
        assert proxy.counts.bytes_up > 1000 < proxy.counts.bytes_down


def test_obstore_survives_a_reset_of_its_connections(s3: S3Server) -> None:
    with FaultProxy("127.0.0.1", s3.port) as proxy:
        store = obstore_store(s3, "b", url=proxy.url, max_retries=3)
        store.put("k", b"1")
        proxy.reset_connections()
        store.put("k", b"2")
        assert s3.objects("b")["k"] == b"2"
        proxy.set(refuse=True)
        proxy.reset_connections()
        with pytest.raises(GenericError):
            store.put("k", b"3")


def test_boto3_sends_the_body_in_the_end_when_nobody_says_continue(s3: S3Server) -> None:
    with FaultProxy("127.0.0.1", s3.port) as proxy:
        proxy.set(swallow_continue=True)
        client = boto3_client(s3, url=proxy.url)
        began = time.monotonic()
        client.put_object(Bucket="b", Key="waited", Body=b"x")
        assert time.monotonic() - began >= 1
        assert proxy.counts.continues_swallowed == 1
        assert s3.objects("b")["waited"] == b"x"
