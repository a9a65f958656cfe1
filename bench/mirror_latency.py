"""From a closed file to a visible object, on loopback, beside the watcher that people write by hand.

Run it as `python -m bench.mirror_latency`.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict

from bench.common import BUCKET, Report, World, sync_entry, world

DEBOUNCE = 0.05
CASES = {"1 kB, closed": 40, "1 kB, renamed into place": 40, "30 MB, closed": 7}

PROGRAM = """
import os, random, sys, time
folders = {"ours": os.environ["CHECKPOINT_DIR"], "peer": sys.argv[1]}
small, large = os.urandom(1000), os.urandom(30_000_000)

def write(name, who, data, rename):
    path = os.path.join(folders[who], name)
    with open(path + ".tmp" if rename else path, "wb") as file:
        file.write(data)
    if rename:
        os.replace(path + ".tmp", path)
    print(f"stamp {who}/{name} {time.monotonic()}", flush=True)

def rounds(case, count, data, rename, rest):
    for number in range(-2, count):
        for who in random.sample(["ours", "peer"], 2):
            # The rest is random, lest it keeps step with somebody's clock.
            time.sleep(rest * random.uniform(1, 1.5))
            write(f"{case}.{number}", who, data, rename)

rounds(0, int(sys.argv[2]), small, False, 0.15)
rounds(1, int(sys.argv[3]), small, True, 0.15)
rounds(2, int(sys.argv[4]), large, False, 1.0)
time.sleep(2)
"""
"""The job: writes to our folder and to the peer's in turn, and says when each file was closed or in place."""

PEER = f"""
import sys, threading, time, boto3
from pathlib import Path
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

s3 = boto3.client("s3")
timers = {{}}

def upload(path):
    with open(path, "rb") as file:
        s3.put_object(Bucket={BUCKET!r}, Key="peer/" + Path(path).name, Body=file)

class Handler(FileSystemEventHandler):
    def later(self, path):
        if path in timers:
            timers[path].cancel()
        timers[path] = threading.Timer({DEBOUNCE}, upload, [path])
        timers[path].start()
    def on_closed(self, event):
        if not event.src_path.endswith(".tmp"):
            self.later(event.src_path)
    def on_moved(self, event):
        self.later(event.dest_path)

observer = Observer()
observer.schedule(Handler(), sys.argv[1])
observer.start()
print("ready", flush=True)
sys.stdin.read()
"""


def measure(here: World) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by case and by who. Both clocks are the machine's monotonic one."""
    folder = here.folder / "peer"
    folder.mkdir()
    program = [sys.executable, "-c", PROGRAM, str(folder), *(str(count) for count in CASES.values())]
    job = {"id": "ours", "command": program[0], "arguments": program[1:], "sync": {"during": [sync_entry("ck")]}}
    desk = here.queue("queue", [job])
    with here.peer(PEER, str(folder)) as peer:
        assert peer.stdout is not None
        assert peer.stdout.readline() == "ready\n"
        with here.worker("queue", "--max-jobs", "1", "--debounce", str(DEBOUNCE)) as worker:
            code = worker.wait(180)
            output = worker.stdout.decode()
    record = desk.show("ours")
    desk.close()
    assert code == 0, worker.lines
    assert record is not None
    assert record.state == "done", record
    return _latencies(output, _visible(here))


def _visible(here: World) -> dict[str, float]:
    """When each key became visible: the server logs a request when it is done, right before it answers."""
    found: dict[str, float] = {}
    for entry in here.storage.stats.log:
        if entry.operation in ("PutObject", "CompleteMultipartUpload") and entry.status == 200:
            found.setdefault(entry.key.replace("/ck/", "/"), entry.started + entry.seconds)
    return found


def _latencies(output: str, visible: dict[str, float]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {case: defaultdict(list) for case in CASES}
    for line in output.splitlines():
        _, key, stamp = line.split()
        who, name = key.split("/")
        case, number = name.split(".")
        if int(number) >= 0:  # the first two warm up
            found[list(CASES)[int(case)]][who].append((visible[key] - float(stamp)) * 1000)
    return found


def main() -> int:
    """Print all cases; the first has the target."""
    report = Report(
        "mirror latency in ms",
        f"a job's program closes files in turn in its own and in the peer's folder, debounce {DEBOUNCE * 1000:.0f} ms; "
        "until the S3 server's log says that the object is there",
        "a watchdog handler, threading.Timer and boto3's put_object, a process of its own, same server",
    )
    began = time.monotonic()
    with world() as here:
        found = measure(here)
    for case, by in found.items():
        report.row(f"{case} (n={len(by['ours'])})", by["ours"], by["peer"])
    print(f"(took {time.monotonic() - began:.0f} s; load now {os.getloadavg()[0]:.1f})")
    report.target("1 kB, closed", found["1 kB, closed"]["ours"], DEBOUNCE * 1000 + 100, "ms")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
