"""Log lines: never a secret, never in anybody's way."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from typing import TextIO

import pytest

from heeler.log import logging_to

SECRETS = ["s3cr3t-value", 'with"quote\\and', "schlüssel-ß", "s3cr3t", "line\nbreak", "it's 'quoted'"]


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_an_event_is_one_json_line_with_time_level_and_fields() -> None:
    stream = io.StringIO()
    with logging_to(stream, "json", []) as log:
        log("warning", "upload_failed", {"key": "a/b", "bytes": 3, "odd": "a\nb"})
    (line,) = lines(stream)
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith(("Z", "+00:00"))
    assert entry == {"event": "upload_failed", "level": "warning", "key": "a/b", "bytes": 3, "odd": "a\nb"}


def test_text_is_for_people_and_auto_means_json_unless_on_a_terminal() -> None:
    stream = io.StringIO()
    with logging_to(stream, "text", []) as log:
        log("info", "started", {"source": "local"})
    assert "started" in stream.getvalue()
    with pytest.raises(ValueError):
        json.loads(stream.getvalue())
    stream = io.StringIO()
    with logging_to(stream, "auto", []) as log:
        log("info", "started", {})
    json.loads(stream.getvalue())


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_is_ever_written_in_whatever_form(log_format: str, secret: str) -> None:
    stream = io.StringIO()
    with logging_to(stream, log_format, SECRETS) as log:
        log("info", f"event {secret}", {"plain": secret, "inside": f"https://{secret}@host", "list": [{"x": secret}]})
        log("error", "bug", {"traceback": f"Traceback: {secret!r}"})
    written = stream.getvalue()
    for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]):
        assert form not in written
    assert "********" in written


def test_lines_stay_in_order_and_none_is_lost_at_the_end() -> None:
    stream = io.StringIO()
    with logging_to(stream, "json", []) as log:
        for number in range(2000):
            log("info", "line", {"number": number})
    assert [json.loads(line)["number"] for line in lines(stream)] == list(range(2000))


def test_a_reader_who_stopped_reading_blocks_nobody_and_what_is_lost_is_counted() -> None:
    reader, writer = os.pipe()
    stream: TextIO = os.fdopen(writer, "w")
    began = time.monotonic()
    with logging_to(stream, "json", []) as log:
        for _ in range(12_000):
            log("info", "line", {"filler": "x" * 100})
        assert time.monotonic() - began < 5
        collected = bytearray()
        enough = threading.Event()

        def read() -> None:
            while data := os.read(reader, 1 << 16):
                collected.extend(data)
                if b"the last line" in collected:
                    enough.set()
                    return

        thread = threading.Thread(target=read)
        thread.start()
        calls = 0
        while not enough.is_set():
            log("info", "the last line", {})
            calls += 1
            enough.wait(0.05)
        thread.join()
    stream.close()
    os.close(reader)
    events = [json.loads(line) for line in bytes(collected).decode().splitlines() if line.endswith("}")]
    lost = sum(event["lines"] for event in events if event["event"] == "log_lines_lost")
    written = sum(event["event"] == "line" for event in events)
    assert 12_000 <= lost + written <= 12_000 + calls, "some of the last lines may be lost too"
    assert lost > 0


def test_a_log_that_nobody_reads_ends_within_seconds() -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    began = time.monotonic()
    with logging_to(stream, "json", []) as log:
        for _ in range(2000):
            log("info", "line", {"filler": "x" * 100})
    assert time.monotonic() - began < 6
    os.close(reader)  # the writer's thread ends with a broken pipe
    try:
        stream.close()
    except BrokenPipeError:
        return


def test_a_closed_stream_is_no_error_of_the_caller() -> None:
    stream = io.StringIO()
    with logging_to(stream, "json", []) as log:
        stream.close()
        for _ in range(10):
            log("info", "line", {})


class FullDisk(io.StringIO):
    """Refuses to be written while it is full."""

    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_lines_on_a_full_disk_are_counted_and_later_ones_are_written() -> None:
    stream = FullDisk()
    with logging_to(stream, "json", []) as log:
        log("info", "first", {})
        deadline = time.monotonic() + 5
        while "first" not in stream.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stream.full = True
        for _ in range(7):
            log("info", "lost", {})
        time.sleep(0.3)
        stream.full = False
        log("info", "last", {})
    entries = [json.loads(line) for line in lines(stream)]
    assert [entry["event"] for entry in entries] == ["first", "log_lines_lost", "last"]
    assert entries[1]["lines"] == 7


def test_a_line_that_the_streams_encoding_has_not_is_lost_alone() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with logging_to(stream, "text", []) as log:
        log("info", "odd", {"name": "\u2603"})
        log("info", "plain", {})
    assert b"plain" in raw.getvalue()
