"""`python -m tests.support.s3 --port 0 --bucket b`: prints the URL, serves until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from .rules import Rules
from .server import ACCESS_KEY, SECRET_KEY, S3Server


def main() -> int:
    """Serve; the exit code is 1 if the server itself failed at something."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.s3", description="A strict S3 server.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--bucket", action="append", default=[], help="made at the start; may be repeated")
    parser.add_argument("--rule", action="append", default=[], metavar="NAME=VALUE", help="see rules.py")
    parser.add_argument("--lenient", action="store_true", help="without R2's own limits")
    parser.add_argument("--access-key", default=ACCESS_KEY)
    parser.add_argument("--secret-key", default=SECRET_KEY)
    parser.add_argument("--certificate", type=Path, help="PEM file with key and certificate: speak https")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started us")
    options = parser.parse_args()
    try:
        rules = (Rules.lenient() if options.lenient else Rules()).with_texts(options.rule)
    except ValueError as error:
        parser.error(str(error))
    server = S3Server.start(
        rules=rules,
        buckets=options.bucket,
        access_key=options.access_key,
        secret_key=options.secret_key,
        host=options.host,
        port=options.port,
        certificate=options.certificate,
    )
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    print(server.url, flush=True)
    if options.until_stdin_closes:
        threading.Thread(target=_wait_for_stdin, args=(ended,), daemon=True).start()
    ended.wait()
    with server:
        pass
    return 0


def _wait_for_stdin(ended: threading.Event) -> None:
    sys.stdin.buffer.read()
    ended.set()


if __name__ == "__main__":
    sys.exit(main())
