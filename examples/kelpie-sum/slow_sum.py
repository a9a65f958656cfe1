"""Adds up the squares of the numbers in INPUT_DIR/numbers.txt in STEPS steps, and goes on where it was stopped.

    python slow_sum.py STEPS [--pause SECONDS]

After each step it writes into CHECKPOINT_DIR/state.json how far it is; the sum goes to OUTPUT_DIR/sum.json. The folders
are /input, /checkpoint and /output where the environment names no others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Print it, and end with 1."""
        sys.exit(f"slow_sum.py: {message}")


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


def folder(name: str) -> Path:
    """A folder of ours: input, checkpoint or output."""
    return Path(os.environ.get(f"{name.upper()}_DIR", f"/{name}"))


def numbers_in(path: Path) -> list[int]:
    """What is to be added up."""
    try:
        return [int(word) for word in path.read_text(encoding="utf-8").split()]
    except FileNotFoundError:
        sys.exit(f"slow_sum.py: {path} is missing")
    except ValueError as error:
        sys.exit(f"slow_sum.py: {path} holds more than whole numbers: {error}")


def write(path: Path, data: dict[str, int]) -> None:
    """Write a file that is whole or not there at all: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        json.dump(data, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def saved(path: Path, numbers: int, steps: int) -> tuple[int, int]:
    """The steps that are done and the sum so far. A damaged checkpoint costs its work; that of another sum is kept."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        done, total, theirs = int(state["done"]), int(state["sum"]), (int(state["numbers"]), int(state["steps"]))
    except FileNotFoundError:
        return 0, 0
    except (ValueError, KeyError, TypeError) as error:
        print(f"{path} is damaged ({error!r}), starting again", file=sys.stderr)
        return 0, 0
    if theirs != (numbers, steps):
        sys.exit(f"slow_sum.py: {path} is of {theirs[0]} numbers in {theirs[1]} steps, not of {numbers} in {steps}")
    return done, total


def main() -> None:
    """Do it."""
    parser = Parser(description="Add up the squares of the numbers in INPUT_DIR/numbers.txt.")
    parser.add_argument("steps", type=positive, metavar="STEPS")
    parser.add_argument("--pause", type=seconds, default=0.15, help="after each step: it stands for real work")
    asked = parser.parse_args()
    steps: int = asked.steps
    numbers = numbers_in(folder("input") / "numbers.txt")
    checkpoint = folder("checkpoint") / "state.json"
    done, total = saved(checkpoint, len(numbers), steps)
    print(f"going on after step {done} of {steps}" if done else f"starting with {len(numbers)} numbers", flush=True)
    while done < steps:
        part = numbers[len(numbers) * done // steps : len(numbers) * (done + 1) // steps]
        total += sum(number * number for number in part)
        time.sleep(asked.pause)
        done += 1
        write(checkpoint, {"done": done, "sum": total, "numbers": len(numbers), "steps": steps})
    write(folder("output") / "sum.json", {"sum": total, "numbers": len(numbers)})
    print(f"sum {total}", flush=True)


if __name__ == "__main__":
    main()
