"""The Mandelbrot example as one runs it: queue, two workers, a kill; the picture is that of one undisturbed process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from examples.mandelbrot import run
from examples.mandelbrot.app import Tile, render
from tests.support.worker import clean_environment

SCRIPT = Path(run.__file__).resolve()
PIXELS, ITERATIONS = 12, 20_000
"""Of a tile. One within the set takes more than a tenth of a second, so that a worker can be killed in it."""


@contextmanager
def example(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The example with small tiles; ends by itself, by our signal, or after 60 s."""
    scratch = folder / "scratch"
    scratch.mkdir()
    sizes = ["--tile-pixels", str(PIXELS), "--iterations", str(ITERATIONS)]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *sizes, "--result", "picture.png", *arguments],
        cwd=folder,
        # Settings of the person who runs it must not get in the way.
        env=clean_environment(TMPDIR=str(scratch), HEELER_SOURCE="local:elsewhere", HEELER_APP_PATH="/elsewhere"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    too_long = threading.Timer(60, process.terminate)
    too_long.start()
    try:
        yield process
    finally:
        too_long.cancel()
        if process.poll() is None:
            process.terminate()
            process.communicate()
    left = started_below(scratch)
    for found in left:
        found.kill()
    assert left == [], "nothing that it started runs on"
    assert list(scratch.iterdir()) == [], "its temporary folder is gone"


def started_below(scratch: Path) -> list[psutil.Process]:
    """Processes that inherited this temporary folder from the example."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(scratch) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_with_a_worker_killed_in_a_tile_the_picture_is_that_of_one_process_byte_for_byte(tmp_path: Path) -> None:
    with example(tmp_path, "--kill") as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    killed = re.search(r"^--- the worker of machine-1 is killed \(SIGKILL\) in tile (\d+)$", said, re.MULTILINE)
    assert killed, said
    done = re.findall(r"^tile +(\d+) of 48: done by machine-([12]), try (\d+)(, though .*)?$", said, re.MULTILINE)
    assert [int(number) for number, *_ in done] == list(range(1, 49)), said
    assert {machine for _, machine, *_ in done} == {"1", "2"}, "both took part"
    assert [number for number, *_, though in done if though] == [killed[1]]
    assert {tries for _, _, tries, _ in done} == {"1"}, "a worker that comes back goes on with the try that it has"
    whole = Tile(x=-2.3, y=1.2, width=3.2, height=2.4, pixels=8 * PIXELS, iterations=ITERATIONS)
    assert (tmp_path / "picture.png").read_bytes() == run.png(whole.pixels, whole.rows, render(whole))
    assert [path.name for path in tmp_path.iterdir() if path.name != "scratch"] == ["picture.png"]


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    with example(tmp_path) as process:
        assert process.stdout is not None
        assert any(line.startswith("tile  1 ") for line in process.stdout)
        assert len(started_below(tmp_path / "scratch")) > 4, "the example, the queue, two workers, their apps"
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in said
    assert not (tmp_path / "picture.png").exists()
