"""`heeler demo`, as a new user runs it."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.support.worker import clean_environment, heeler


def test_the_demo_shows_the_kill_and_the_resume_and_proves_the_same_result_within_a_minute(tmp_path: Path) -> None:
    began = time.monotonic()
    done = heeler("demo", "--seconds", "5", env=clean_environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 60
    killed = re.search(r"SIGKILL at step (\d+)", done.stdout)
    resumed = re.search(r"goes on from the checkpoint of step (\d+)", done.stdout)
    assert killed
    assert resumed
    assert 0 < int(resumed[1]) <= int(killed[1]) + 1
    digests = re.findall(r"sha256 ([0-9a-f]{64})", done.stdout)
    assert len(digests) == 2
    assert digests[0] == digests[1]
    assert "the same, to the last bit" in done.stdout
    assert list(tmp_path.iterdir()) == [], "the demo leaves nothing behind"
