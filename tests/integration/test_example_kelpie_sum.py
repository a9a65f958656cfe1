"""The program of `examples/kelpie-sum` by itself: killed at any write it goes on, and nothing of ours is in it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import heeler
import heeler_sync
from heeler.local.kelpie_model import SUBMISSION

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "kelpie-sum"
PROGRAM = EXAMPLE / "slow_sum.py"
NUMBERS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
SQUARES = sum(number * number for number in NUMBERS)
STEPS = 4

# Runs the program and dies of SIGKILL right before the file operation of that number.
DYING = """
import os, runpy, signal, sys
left = int(sys.argv.pop(1))
def operation(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def look(event, arguments):
    if event == "os.rename" or event == "open" and str(arguments[0]).endswith(".new"):
        operation()
fsync = os.fsync
os.fsync = lambda file: (operation(), fsync(file))
sys.addaudithook(look)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Runs the program and prints as JSON which files it opened, and which modules it wanted, whether they are there or not.
WATCHED = """
import json, runpy, sys
seen = {"open": [], "import": []}
sys.addaudithook(lambda event, arguments: seen[event].append(str(arguments[0])) if event in seen else None)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
print(json.dumps([seen["open"], seen["import"]]))
"""


def folders(folder: Path) -> dict[str, str]:
    return {f"{part}_DIR": str(folder / part.lower()) for part in ("INPUT", "CHECKPOINT", "OUTPUT")}


def run(folder: Path, *arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The program, with its folders in `folder`."""
    return subprocess.run(
        [sys.executable, *before, str(PROGRAM), *arguments],
        env={**os.environ, **folders(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def quick(folder: Path, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The whole sum without pauses."""
    return run(folder, str(STEPS), "--pause", "0", before=before)


def place(folder: Path, numbers: str = "\n".join(map(str, NUMBERS))) -> Path:
    """A machine with its input."""
    (folder / "input").mkdir(parents=True)
    (folder / "input" / "numbers.txt").write_text(numbers)
    return folder


def result(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / "output" / "sum.json").read_text())
    return found


def state(folder: Path) -> Path:
    return folder / "checkpoint" / "state.json"


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that it says."""
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("slow_sum.py: ")
    return line.removeprefix("slow_sum.py: ")


@pytest.mark.parametrize("steps", [1, 3, 10, 25])
def test_it_adds_up_in_any_number_of_steps(steps: int, tmp_path: Path) -> None:
    done = run(place(tmp_path), str(steps), "--pause", "0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"starting with 10 numbers\nsum {SQUARES}\n"
    assert result(tmp_path) == {"sum": SQUARES, "numbers": 10}
    assert json.loads(state(tmp_path).read_text()) == {"done": steps, "sum": SQUARES, "numbers": 10, "steps": steps}


def test_the_sum_of_nothing_is_0(tmp_path: Path) -> None:
    assert quick(place(tmp_path, "\n")).returncode == 0
    assert result(tmp_path) == {"sum": 0, "numbers": 0}


def test_killed_before_any_of_its_writes_it_ends_with_the_same_sum(tmp_path: Path) -> None:
    went_on = []
    for operation in range(1, 100):
        folder = place(tmp_path / str(operation))
        died = quick(folder, before=("-c", DYING, str(operation)))
        if died.returncode == 0:
            break
        assert died.returncode == -9, died.stderr
        saved = json.loads(state(folder).read_text())["done"] if state(folder).exists() else 0
        done = quick(folder)
        assert done.returncode == 0, done.stderr
        found = re.search(r"^going on after step (\d+) of 4$", done.stdout, re.MULTILINE)
        went_on.append(int(found[1]) if found else 0)
        assert went_on[-1] == saved
        assert result(folder)["sum"] == SQUARES
    # Three operations a file: open, fsync, rename. Four steps and the result.
    assert went_on == [done for done in (0, 1, 2, 3, 4) for _ in range(3)]


def test_a_finished_sum_that_is_asked_for_again_is_written_again(tmp_path: Path) -> None:
    quick(place(tmp_path))
    (tmp_path / "output" / "sum.json").unlink()
    assert "going on after step 4 of 4" in quick(tmp_path).stdout
    assert result(tmp_path)["sum"] == SQUARES


@pytest.mark.parametrize("length", [0, 1, 20, -1])
def test_half_a_checkpoint_is_named_and_costs_its_work_alone(length: int, tmp_path: Path) -> None:
    quick(place(tmp_path))
    state(tmp_path).write_text(state(tmp_path).read_text()[:length])
    done = quick(tmp_path)
    assert done.returncode == 0
    assert f"{state(tmp_path)} is damaged (" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.startswith("starting with 10 numbers")
    assert result(tmp_path)["sum"] == SQUARES


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"done": 2, "sum": 30}', '{"done": "x", "sum": 0}', "\0"])
def test_what_is_no_checkpoint_is_named_too(content: str, tmp_path: Path) -> None:
    place(tmp_path)
    state(tmp_path).parent.mkdir()
    state(tmp_path).write_text(content)
    done = quick(tmp_path)
    assert "state.json is damaged (" in done.stderr
    assert result(tmp_path)["sum"] == SQUARES


def test_a_checkpoint_with_bytes_that_are_no_text_is_named_too(tmp_path: Path) -> None:
    place(tmp_path)
    state(tmp_path).parent.mkdir()
    state(tmp_path).write_bytes(b"\xff\xfe\x00")
    assert "state.json is damaged (" in quick(tmp_path).stderr
    assert result(tmp_path)["sum"] == SQUARES


def test_the_checkpoint_of_another_sum_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    quick(place(tmp_path))
    before = state(tmp_path).read_bytes()
    done = run(tmp_path, "5", "--pause", "0")
    assert refusal(done) == f"{state(tmp_path)} is of 10 numbers in 4 steps, not of 10 in 5"
    assert state(tmp_path).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: STEPS"),
        (["ten"], "argument STEPS: invalid positive value: 'ten'"),
        (["0"], "argument STEPS: 0 is less than 1"),
        (["10", "11"], "unrecognized arguments: 11"),
        (["10", "--pause", "long"], "argument --pause: invalid seconds value: 'long'"),
        (["10", "--pause", "-1"], "argument --pause: -1 is no number of seconds"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    assert refusal(run(tmp_path, *arguments)) == said
    assert [*tmp_path.iterdir()] == []


def test_inputs_that_are_missing_or_no_numbers_are_one_clear_line(tmp_path: Path) -> None:
    assert refusal(quick(tmp_path)) == f"{tmp_path}/input/numbers.txt is missing"
    assert "numbers.txt holds more than whole numbers" in refusal(quick(place(tmp_path, "1 2 three")))
    assert not (tmp_path / "output").exists()


def test_sigterm_leaves_whole_checkpoints_and_it_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(STEPS), "--pause", "60"]
    environment = {**os.environ, **folders(place(tmp_path))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as stopped:
        assert stopped.stdout is not None
        assert stopped.stdout.readline() == "starting with 10 numbers\n"
        stopped.terminate()
        assert stopped.wait(30) == -15
    assert not (tmp_path / "output").exists()
    assert quick(tmp_path).returncode == 0
    assert result(tmp_path)["sum"] == SQUARES


def test_it_looks_where_kelpie_puts_things_if_the_environment_says_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in folders(tmp_path)}
    code = f"folder = __import__('runpy').run_path({str(PROGRAM)!r})['folder']"
    code += "; print(folder('input'), folder('checkpoint'), folder('output'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["/input", "/checkpoint", "/output"]


def test_nothing_of_ours_is_in_it_imported_by_it_or_read_by_it(tmp_path: Path) -> None:
    source = PROGRAM.read_text(encoding="utf-8")
    assert not [word for word in ("heeler", "kelpie", "boto", "queue", "s3") if word in source.lower()]
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names
    # Isolated: what the tests' environment brings into every Python of it is not the program's.
    done = quick(place(tmp_path), before=("-I", "-S", "-c", WATCHED))
    opened, modules = json.loads(done.stdout.splitlines()[-1])
    assert str(PROGRAM) in opened, "the hook sees what is opened"
    assert "argparse" in modules, "and what is imported"
    ours = [Path(str(package.__file__)).parent for package in (heeler, heeler_sync)]
    assert not [path for path in opened if any(Path(path).is_relative_to(folder) for folder in ours)]
    assert not [path for path in opened if Path(path).name.startswith(("heeler", ".heeler"))]
    assert not [module for module in modules if module.startswith("heeler")]


def test_its_job_is_one_that_the_api_takes_as_it_stands() -> None:
    text = (EXAMPLE / "job.json").read_text(encoding="utf-8")
    fields = SUBMISSION.validate_json(text).fields()
    given = json.loads(text)
    assert given == {name: value for name, value in fields.items() if name in given}
    assert (given["command"], given["arguments"][0]) == ("python", PROGRAM.name)
    assert given["container_group_id"] == "YOUR-CONTAINER-GROUP-ID"
