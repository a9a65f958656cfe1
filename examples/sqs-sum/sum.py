"""Adds up the squares of 1 to LAST, or one part of them, in steps, and goes on where it was stopped.

    python sum.py LAST [--parts N] [--step COUNT] [--pause SECONDS]

With `--parts N` it does the part that AWS_BATCH_JOB_ARRAY_INDEX names, from 0. After each step it writes into
CHECKPOINT_DIR/state.json how far it is; the sum goes to OUTPUT_DIR/sum.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

AGAIN = 75  # the exit code for "not done, not failed: run me again"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Print it, and end with 1."""
        sys.exit(f"sum.py: {message}")


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def seconds(text: str) -> float:
    """How long to pause."""
    number = float(text)
    if not 0 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return number


def part_of(last: int, parts: int) -> tuple[int, int]:
    """The first and the last number of our part."""
    index = os.environ.get("AWS_BATCH_JOB_ARRAY_INDEX", "0" if parts == 1 else "")
    if not index.isdecimal() or int(index) >= parts:
        sys.exit(f"sum.py: AWS_BATCH_JOB_ARRAY_INDEX is {index!r}, but must be 0 to {parts - 1}")
    if parts > last:
        sys.exit(f"sum.py: {last} numbers can't be split into {parts} parts")
    return last * int(index) // parts + 1, last * (int(index) + 1) // parts


def write(path: Path, data: dict[str, int]) -> None:
    """Write a file that is whole or not there at all: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def saved(path: Path, first: int, last: int) -> tuple[int, int]:
    """The next number and the sum so far. A damaged checkpoint costs its work; that of another range is not touched."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        at, total, theirs = int(state["next"]), int(state["sum"]), (state["first"], state["last"])
    except FileNotFoundError:
        return first, 0
    except (ValueError, KeyError, TypeError) as error:
        print(f"{first} to {last}: {path} is damaged ({error!r}), starting again", file=sys.stderr)
        return first, 0
    if theirs != (first, last):
        sys.exit(f"sum.py: {path} is of {theirs[0]} to {theirs[1]}, not of {first} to {last}")
    return at, total


def say(line: str) -> None:
    """Print a line in one piece, beside what other jobs print."""
    print(f"{line}\n", end="", flush=True)


def main() -> None:
    """Do it."""
    parser = Parser(description="Add up the squares of 1 to LAST.")
    parser.add_argument("last", type=positive, metavar="LAST")
    parser.add_argument("--parts", type=positive, default=1)
    parser.add_argument("--step", type=positive, default=25_000, help="numbers between two checkpoints")
    parser.add_argument("--pause", type=seconds, default=0.25, help="after each step: it stands for real work")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(AGAIN))
    first, last = part_of(asked.last, asked.parts)
    checkpoint = Path(os.environ.get("CHECKPOINT_DIR", "checkpoint")) / "state.json"
    at, total = saved(checkpoint, first, last)
    say(f"{first} to {last}: {'starting' if at == first else f'going on at {at}'}")
    while at <= last:
        end = min(at + asked.step, last + 1)
        total += sum(number * number for number in range(at, end))
        time.sleep(asked.pause)
        at = end
        write(checkpoint, {"first": first, "last": last, "next": at, "sum": total})
    write(Path(os.environ.get("OUTPUT_DIR", "output")) / "sum.json", {"first": first, "last": last, "sum": total})
    say(f"{first} to {last}: {total}")


if __name__ == "__main__":
    main()
