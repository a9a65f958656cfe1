"""Bare HTTP to an unsigned test S3 server, so that a test sees what happens on the socket."""

from __future__ import annotations

import http.client
import socket

from .s3 import S3Process, S3Server


def call(
    server: S3Server | S3Process, method: str, path: str = "/b/k", body: bytes | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, data, {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def code_in(data: bytes) -> str:
    return data.decode().partition("<Code>")[2].partition("</Code>")[0]


class Raw:
    """A bare connection."""

    def __init__(self, server: S3Server, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(10)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", server.port))

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send_head(self, method: str, path: str, length: int = 0, extra: str = "") -> None:
        head = f"{method} {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n{extra}\r\n"
        self.socket.sendall(head.encode())

    def read_to_end(self) -> tuple[bytes, bool]:
        """All that comes, and whether it ended by a reset."""
        data = b""
        while True:
            try:
                piece = self.socket.recv(65536)
            except ConnectionResetError:
                return data, True
            if not piece:
                return data, False
            data += piece

    def send_until_it_blocks(self, most: int) -> int:
        """How many bytes could be sent before nothing went for a while."""
        sent = 0
        self.socket.settimeout(0.3)
        try:
            while sent < most:
                sent += self.socket.send(bytes(min(1 << 20, most - sent)))
        except TimeoutError:
            pass
        finally:
            self.socket.settimeout(10)
        return sent

    def silent(self, seconds: float) -> bool:
        """Whether nothing comes for a while."""
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(10)
        return False
