"""The commands for people: submit, jobs, cancel, status, config."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.acceptance.world import World
from tests.support.worker import clean_environment, heeler

Said = subprocess.CompletedProcess[str]


class Desk:
    """Commands against one queue."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = clean_environment(HEELER_SOURCE="local:queue", HEELER_STATE_DIR=str(folder / "state"))

    def say(self, *arguments: str, stdin: str = "") -> Said:
        """One command."""
        return heeler(*arguments, env=self.environment, cwd=self.folder, stdin=stdin)

    def good(self, *arguments: str, stdin: str = "") -> str:
        """One command that succeeds: what it printed."""
        said = self.say(*arguments, stdin=stdin)
        assert (said.returncode, said.stderr) == (0, ""), said
        return said.stdout

    def refused(self, *arguments: str, stdin: str = "", code: int = 64) -> str:
        """One command that is refused: its one line."""
        said = self.say(*arguments, stdin=stdin)
        assert said.returncode == code, said
        assert said.stdout == ""
        assert said.stderr.startswith("heeler: ")
        assert said.stderr.count("\n") == 1, said.stderr
        return said.stderr

    def states(self) -> dict[str, str]:
        """All jobs' states by id, from the JSON form."""
        return {job["id"]: job["state"] for job in json.loads(self.good("jobs", "--json"))}


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_submit_takes_one_document_a_list_and_lines_from_a_file_or_standard_input(desk: Desk) -> None:
    (desk.folder / "one.json").write_text('{"id": "one",\n "command": "true"}\n')
    assert desk.good("submit", "one.json") == "one\n"
    listed = json.dumps([{"id": "two", "command": "true"}, {"id": "three", "command": "true"}])
    assert desk.good("submit", "-", stdin=listed) == "two\nthree\n"
    lines = '{"id": "four", "command": "true"}\n\n{"id": "five", "command": "true"}\n'
    assert desk.good("submit", "-", stdin=lines) == "four\nfive\n"
    assert list(desk.states()) == ["one", "two", "three", "four", "five"]
    assert len(desk.good("submit", "-", stdin='{"command": "true"}').strip()) == 16


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"id": "a"}', "standard input: the job is refused: command: is missing"),
        ('[{"id": "a", "command": "x"}, {"id": "b"}]', "command: is missing"),
        ('{"id": "a", "command": "x"}\n{"id": "b"\n', "is not JSON"),
        ('[{"id": "a", "command": "x"}, {"id": "a", "command": "x"}]', "'a' is in the queue already"),
        ('{"id": "taken", "command": "x"}', "'taken' is in the queue already"),
        ('[{"id": "a", "command": "x"}, {"id": "taken", "command": "x"}]', "'taken' is in the queue already"),
        ('{"id": "../x", "command": "x"}', "'../x' can't be used"),
        ("", "not JSON"),
        ("[]", "empty"),
        ("null", "not a JSON object"),
        ('{"command": "x", "sync": {"before": [{"bucket": "b", "prefix": "x", "local_path": "y"}]}}', "sync"),
    ],
)
def test_submit_refuses_in_one_line_and_takes_all_or_none(desk: Desk, text: str, words: str) -> None:
    desk.good("submit", "-", stdin='{"id": "taken", "command": "true"}')
    assert words in desk.refused("submit", "-", stdin=text)
    assert desk.states() == {"taken": "pending"}


def test_submit_names_a_file_that_is_not_there(desk: Desk) -> None:
    assert "no-such.json can't be read: No such file" in desk.refused("submit", "no-such.json")


def test_jobs_are_listed_shown_and_cancelled(desk: Desk) -> None:
    assert desk.good("jobs").split() == ["ID", "STATE", "ATTEMPTS", "FAILURES", "REASON"]
    assert desk.good("jobs", "--json") == "[]\n"
    desk.good("submit", "-", stdin='[{"id": "a", "command": "true"}, {"id": "b", "command": "true"}]')
    assert [line.split()[:2] for line in desk.good("jobs").splitlines()[1:]] == [["a", "pending"], ["b", "pending"]]
    assert desk.good("cancel", "a") == "a cancelled\n"
    assert desk.states() == {"a": "cancelled", "b": "pending"}
    assert "a is cancelled already" in desk.refused("cancel", "a")
    shown = json.loads(desk.good("jobs", "show", "a", "--json"))
    assert (shown["id"], shown["state"], shown["attempts"]) == ("a", "cancelled", 0)
    lines = dict(line.split(maxsplit=1) for line in desk.good("jobs", "show", "a").splitlines() if " " in line.strip())
    assert lines["state"] == "cancelled"


def test_help_explains_every_command_and_argument(desk: Desk) -> None:
    said = desk.good("--help")
    for command in ("run", "submit", "jobs", "cancel", "status", "config", "demo", "version"):
        assert command in said
    assert "A job document, a list of them, or one a line." in desk.good("submit", "--help")
    assert "Return when all have ended" in desk.good("submit", "--help")
    assert "One job, from a file" in desk.good("run", "--help")
    assert desk.good("version").startswith("heeler ")


def test_wrong_ids_and_queues_are_refused_in_one_line(desk: Desk) -> None:
    assert "no job 'nobody'" in desk.refused("jobs", "show", "nobody")
    assert "no job 'nobody'" in desk.refused("cancel", "nobody")
    assert "takes no jobs from here" in desk.refused("jobs", "--source", "once")
    assert "heeler --help" in desk.refused("cancel")
    assert "heeler --help" in desk.refused("no-such-command")
    assert (
        "no runtime answers"
        in heeler("status", env=clean_environment(HEELER_STATE_DIR=str(desk.folder / "state"))).stderr
    )


def test_status_tells_of_the_runtime_and_of_the_queue(world: World) -> None:
    environment = world.environment(HEELER_STATE_DIR=str(world.folder / "state-a"))
    command = ("status", "--source", f"local:{world.queue}")
    world.submit(world.bash("echo x > $W/runs; sleep 1000"))
    world.submit(world.bash("exit 0"), "job-2")
    before = heeler(*command, env=environment)
    assert (before.returncode, before.stdout) == (0, "runtime   none answers\nqueue     2 pending\n")
    with world.worker("--control", "127.0.0.1:0") as worker:
        world.told("runs")
        worker.wait_for("control_ready")
        text = heeler(*command, env=environment).stdout
        data = json.loads(heeler(*command, "--json", env=environment).stdout)
    assert "phase     run since" in text
    assert "job job-1 attempt 1" in text
    assert "queue     1 pending, 1 running" in text
    assert (data["runtime"]["phase"], data["runtime"]["job_id"]) == ("run", "job-1")
    assert data["queue"] == {"pending": 1, "running": 1}


def test_submit_with_wait_ends_with_the_jobs(world: World) -> None:
    source = ("--source", f"local:{world.queue}")
    with world.worker():
        good = heeler("submit", "--wait", *source, "-", stdin='{"id": "good", "command": "true"}')
        bad = heeler("submit", "--wait", *source, "-", stdin='{"id": "bad", "command": "false", "max_failures": 1}')
    assert (good.returncode, good.stdout, good.stderr) == (0, "good\n", "good done\n")
    assert (bad.returncode, bad.stdout, bad.stderr) == (1, "bad\n", "bad failed\n")


def test_a_listing_whose_reader_goes_away_ends_without_a_traceback(desk: Desk) -> None:
    many = "\n".join(json.dumps({"id": f"job-{number}", "command": "true"}) for number in range(3000))
    desk.good("submit", "-", stdin=many)
    said = subprocess.run(
        ["bash", "-c", "heeler jobs | head -1; echo ${PIPESTATUS[0]}"],
        env=desk.environment,
        cwd=desk.folder,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert said.stdout.startswith("ID")
    assert "Traceback" not in said.stderr, said.stderr


def test_config_prints_each_setting_with_its_origin(desk: Desk) -> None:
    rows = json.loads(desk.good("config", "--json"))
    assert rows["source"] == {"value": "local:queue", "origin": "environment HEELER_SOURCE"}
    assert rows["stop_grace"] == {"value": "30", "origin": "default"}
    rows = json.loads(desk.good("config", "--json", "--stop-grace", "12.5"))
    assert rows["stop_grace"] == {"value": "12.5", "origin": "flag --stop-grace"}
