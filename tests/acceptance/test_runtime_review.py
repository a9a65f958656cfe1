"""What a hostile reading of the runtime found, with real processes."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pytest

from tests.acceptance.test_app_mode import AppWorld, answer
from tests.acceptance.world import BUCKET, World
from tests.support.worker import Worker

SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
HTTPServer(("127.0.0.1", 0), Handler).serve_forever()
"""


@pytest.fixture
def app(world: World) -> AppWorld:
    return AppWorld(world)


@pytest.mark.parametrize("field", ["prefix", "pattern"])
def test_half_a_character_in_an_apps_message_fails_that_job_and_not_the_worker(app: AppWorld, field: str) -> None:
    entry = {"bucket": BUCKET, "prefix": "a/", "local_path": "work", field: "a\ud800/"}
    message = json.dumps({"do": "echo", "sync": {"before": [entry]}})
    poisoned = app.world.desk.submit_message(message.encode())
    good = app.submit()
    with app.worker("--max-jobs", "2") as worker:
        assert worker.wait(20) == 0, worker.lines[-5:]
    record = app.world.job(poisoned)
    assert (record.state, record.attempts) == ("failed", 1)
    assert f"sync.before.0.{field}" in record.reason
    assert app.world.job(good).state == "done"


def test_the_port_of_an_app_that_drops_its_environment_is_found(app: AppWorld, tmp_path: Path) -> None:
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    app.argv = ["env", "-i", sys.executable, str(program)]
    job = app.submit()
    with app.worker():
        assert answer(app.done(job)) == (200, b"ok")


def test_the_one_job_of_an_app_keeps_its_line_ends_and_bytes(app: AppWorld, tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.write_bytes(b'{"do": "echo",\r\n"x": "\xff\\r"}\r')
    with Worker(
        *("--job", str(message), "--", *app.argv),
        state_dir=tmp_path / "state-once",
        env=app.world.environment(W=str(app.world.folder)),
        cwd=tmp_path,
    ) as worker:
        assert worker.wait() == 0, worker.lines[-5:]
    assert base64.b64decode(app.calls()[0]["body"]) == message.read_bytes()
