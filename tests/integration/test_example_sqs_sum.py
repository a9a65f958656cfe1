"""The program of `examples/sqs-sum` by itself: killed at any write it goes on; what it can't do it says in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from heeler.documents import numbered, split_documents

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sqs-sum"
PROGRAM = EXAMPLE / "sum.py"
LAST, STEP = 1000, 250
SQUARES = LAST * (LAST + 1) * (2 * LAST + 1) // 6

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


def run(
    folder: Path, *arguments: str, before: tuple[str, ...] = (), index: int | str | None = None
) -> subprocess.CompletedProcess[str]:
    """The program, with its folders in `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "HEELER_"))}
    numbered_as = {} if index is None else {"AWS_BATCH_JOB_ARRAY_INDEX": str(index)}
    folders = {"CHECKPOINT_DIR": str(folder / "checkpoint"), "OUTPUT_DIR": str(folder / "output")}
    return subprocess.run(
        [sys.executable, *before, str(PROGRAM), *arguments],
        env={**kept, **numbered_as, **folders},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def quick(folder: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    """The whole sum in four steps."""
    return run(folder, str(LAST), "--step", str(STEP), "--pause", "0", **more)


def result(folder: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads((folder / "output" / "sum.json").read_text())
    return found


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that it says."""
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("sum.py: ")
    return line.removeprefix("sum.py: ")


def test_it_adds_up(tmp_path: Path) -> None:
    done = quick(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"1 to {LAST}: starting\n1 to {LAST}: {SQUARES}\n"
    assert result(tmp_path) == {"first": 1, "last": LAST, "sum": SQUARES}


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_the_parts_of_an_array_meet_without_gap_or_overlap(parts: int, tmp_path: Path) -> None:
    found = []
    for index in range(parts):
        folder = tmp_path / str(index)
        folder.mkdir()
        done = run(folder, "100", "--parts", str(parts), "--pause", "0", index=index)
        assert done.returncode == 0, done.stderr
        found.append(result(folder))
    assert [part["first"] for part in found] == [1, *(part["last"] + 1 for part in found[:-1])]
    assert found[-1]["last"] == 100
    assert sum(part["sum"] for part in found) == 338_350


def test_killed_before_any_of_its_writes_it_ends_with_the_same_sum(tmp_path: Path) -> None:
    went_on = []
    for operation in range(1, 100):
        folder = tmp_path / str(operation)
        folder.mkdir()
        died = quick(folder, before=("-c", DYING, str(operation)))
        if died.returncode == 0:
            break
        assert died.returncode == -9, died.stderr
        state = folder / "checkpoint" / "state.json"
        saved = json.loads(state.read_text())["next"] if state.exists() else 1
        done = quick(folder)
        assert done.returncode == 0, done.stderr
        went_on.append(int(found[1]) if (found := re.search(r"going on at (\d+)", done.stdout)) else 1)
        assert went_on[-1] == saved
        assert result(folder)["sum"] == SQUARES
    # Three operations a file: open, fsync, rename. Four steps and the result.
    assert went_on == [at for at in (1, 251, 501, 751, 1001) for _ in range(3)]


def test_a_finished_sum_that_is_asked_for_again_is_written_again(tmp_path: Path) -> None:
    quick(tmp_path)
    (tmp_path / "output" / "sum.json").unlink()
    assert "going on at 1001" in quick(tmp_path).stdout
    assert result(tmp_path)["sum"] == SQUARES


@pytest.mark.parametrize("length", [0, 1, 20, -1])
def test_a_truncated_checkpoint_is_named_and_costs_its_work_alone(length: int, tmp_path: Path) -> None:
    quick(tmp_path)
    state = tmp_path / "checkpoint" / "state.json"
    state.write_text(state.read_text()[:length])
    done = quick(tmp_path)
    assert done.returncode == 0
    assert f"1 to {LAST}: {state} is damaged (" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert result(tmp_path)["sum"] == SQUARES


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"next": 5, "sum": 30}', '{"next": "x", "sum": 0}'])
def test_what_is_no_checkpoint_is_named_too(content: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").write_text(content)
    done = quick(tmp_path)
    assert "state.json is damaged (" in done.stderr
    assert result(tmp_path)["sum"] == SQUARES


def test_the_checkpoint_of_another_range_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    quick(tmp_path)
    state = tmp_path / "checkpoint" / "state.json"
    before = state.read_bytes()
    done = run(tmp_path, "2000", "--pause", "0")
    assert refusal(done) == f"{state} is of 1 to {LAST}, not of 1 to 2000"
    assert state.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "index", "said"),
    [
        ([], None, "the following arguments are required: LAST"),
        (["ten"], None, "argument LAST: invalid positive value: 'ten'"),
        (["0"], None, "argument LAST: 0 is less than 1"),
        (["10", "11"], None, "unrecognized arguments: 11"),
        (["10", "--step", "0"], None, "argument --step: 0 is less than 1"),
        (["10", "--pause", "long"], None, "argument --pause: invalid seconds value: 'long'"),
        (["10", "--pause", "-1"], None, "argument --pause: -1 is no number of seconds"),
        (["10", "--parts", "11"], 0, "10 numbers can't be split into 11 parts"),
        (["10", "--parts", "2"], None, "AWS_BATCH_JOB_ARRAY_INDEX is '', but must be 0 to 1"),
        (["10", "--parts", "2"], 2, "AWS_BATCH_JOB_ARRAY_INDEX is '2', but must be 0 to 1"),
        (["10", "--parts", "2"], "-1", "AWS_BATCH_JOB_ARRAY_INDEX is '-1', but must be 0 to 1"),
        (["10"], 1, "AWS_BATCH_JOB_ARRAY_INDEX is '1', but must be 0 to 0"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str], index: int | str | None, said: str, tmp_path: Path
) -> None:
    assert refusal(run(tmp_path, *arguments, index=index)) == said
    assert [*tmp_path.iterdir()] == []


def test_sigterm_ends_it_with_the_code_that_means_again_and_it_goes_on(tmp_path: Path) -> None:
    environment = {**os.environ, "CHECKPOINT_DIR": str(tmp_path / "checkpoint"), "OUTPUT_DIR": str(tmp_path / "output")}
    environment.pop("AWS_BATCH_JOB_ARRAY_INDEX", None)
    command = [sys.executable, str(PROGRAM), str(LAST), "--step", str(STEP), "--pause"]
    with subprocess.Popen([*command, "60"], env=environment, stdout=subprocess.PIPE, text=True) as stopped:
        assert stopped.stdout is not None
        assert stopped.stdout.readline() == f"1 to {LAST}: starting\n"
        stopped.terminate()
        assert stopped.wait(30) == 75
    assert not (tmp_path / "output").exists()
    assert quick(tmp_path).returncode == 0
    assert result(tmp_path)["sum"] == SQUARES


def test_the_program_has_no_line_of_ours_and_none_of_a_queue() -> None:
    source = PROGRAM.read_text(encoding="utf-8").lower()
    assert not [word for word in ("heeler", "boto", "sqs", "queue", "s3") if word in source]


def test_submit_sends_what_heeler_submit_would(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    code = (EXAMPLE / "submit.py").read_text(encoding="utf-8")

    class Client:
        def send_message(self, **message: Any) -> None:
            sent.append(message)

    monkeypatch.setattr("boto3.client", lambda *_, **__: Client())
    monkeypatch.setenv("SQS_QUEUE_URL", "https://sqs/1/sums.fifo")
    module: dict[str, Any] = {"__name__": "submit", "__file__": str(EXAMPLE / "submit.py")}
    exec(compile(code, "submit.py", "exec"), module)  # its folder has a name that no module can have
    module["main"](3)
    documents = split_documents((EXAMPLE / "job.json").read_text(encoding="utf-8"))
    expected = [json.loads(document) for document in numbered(documents, 3, lambda: "")]
    assert [json.loads(message["MessageBody"]) for message in sent] == expected
    assert [message["MessageGroupId"] for message in sent] == ["sum-0", "sum-1", "sum-2"]
