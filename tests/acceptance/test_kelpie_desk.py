"""`heeler submit`, `jobs` and `cancel` on Kelpie's API: the real command line, a real worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from heeler.local.kelpie_faults import Fault
from tests.acceptance.kelpie_world import KelpieWorld
from tests.acceptance.world import BUCKET, alive, eventually
from tests.support.kelpie_server import API_KEY, GROUP, KEY, ORGANIZATION, PROJECT
from tests.support.worker import clean_environment, heeler

Said = subprocess.CompletedProcess[str]
NO_ID = "7c1b2a54-0000-4000-8000-000000000000"


class KelpieDesk:
    """Commands against the API, as somebody at home."""

    def __init__(self, world: KelpieWorld) -> None:
        self.world, self.server = world, world.server
        self.environment = clean_environment(
            HEELER_SOURCE="kelpie",
            KELPIE_API_URL=self.server.url,
            KELPIE_API_KEY=KEY,
            SALAD_CONTAINER_GROUP_ID=GROUP,
            TZ="UTC",
        )

    def say(self, *arguments: str, stdin: str = "", **changes: str) -> Said:
        """One command."""
        return heeler(*arguments, env={**self.environment, **changes}, cwd=self.world.folder, stdin=stdin)

    def good(self, *arguments: str, stdin: str = "", **changes: str) -> str:
        """One command that succeeds without a word besides: what it printed."""
        said = self.say(*arguments, stdin=stdin, **changes)
        assert (said.returncode, said.stderr) == (0, ""), said
        return said.stdout

    def refused(self, *arguments: str, stdin: str = "", code: int = 64, **changes: str) -> str:
        """One command that is refused: its one line."""
        said = self.say(*arguments, stdin=stdin, **changes)
        assert said.returncode == code, said
        assert said.stdout == ""
        assert said.stderr.startswith("heeler: ")
        assert said.stderr.count("\n") == 1, said.stderr
        assert KEY not in said.stderr
        assert API_KEY not in said.stderr
        return said.stderr

    def states(self) -> dict[str, str]:
        return {job["id"]: job["state"] for job in json.loads(self.good("jobs", "--json"))}

    @contextmanager
    def waiting(self, text: str) -> Iterator[subprocess.Popen[str]]:
        """`heeler submit --wait`, beside us."""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-m", "heeler", "submit", "--wait", "-"]
        process = subprocess.Popen(command, env=self.environment, cwd=self.world.folder, text=True, **pipes)
        try:
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.close()
            process.stdin = None
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def desk(kelpie: KelpieWorld) -> KelpieDesk:
    return KelpieDesk(kelpie)


def jobs(*documents: dict[str, Any]) -> str:
    return json.dumps([{"command": "true", **document} for document in documents])


def shell(text: str, **fields: Any) -> dict[str, Any]:
    return {"command": "sh", "arguments": ["-c", text], **fields}


def test_submit_takes_one_document_a_list_and_lines_from_a_file_or_standard_input(desk: KelpieDesk) -> None:
    (desk.world.folder / "one.json").write_text('{"command": "true",\n "max_failures": 7}\n')
    (one,) = desk.good("submit", "one.json").split()
    listed = desk.good("submit", "-", stdin=jobs({"arguments": ["a"]}, {"arguments": ["b"]})).split()
    lines = desk.good("submit", "-", stdin='{"command": "x"}\n\n{"command": "y"}\n').split()
    found = [desk.server.job(job_id) for job_id in (one, *listed, *lines)]
    assert found[0]["max_failures"] == 7
    assert [job["arguments"] for job in found[1:3]] == [["a"], ["b"]]
    assert [job["command"] for job in found[3:]] == ["x", "y"]
    assert desk.states() == dict.fromkeys([one, *listed, *lines], "pending")
    assert all(job["environment"] == {} for job in found)


def test_jobs_run_and_who_waits_is_told_their_ends(desk: KelpieDesk) -> None:
    world = desk.world
    world.storage.put(BUCKET, "job/input/x", b"given")
    good = shell("cat $INPUT_DIR/x > $OUTPUT_DIR/y; echo $HEELER_DOCUMENT > $OUTPUT_DIR/told", timeout=60)
    bad = shell("exit 3", max_failures=1)
    with desk.waiting(json.dumps([{**good, **world.folders()}, bad])) as process, world.worker():
        output, errors = process.communicate(timeout=60)
    ids = output.split()
    assert process.returncode == 1
    assert sorted(errors.splitlines()) == sorted([f"{ids[0]} done", f"{ids[1]} failed"])
    assert world.keys("job/output/") == {"job/output/y": b"given", "job/output/told": b"\n"}
    assert [line.split() for line in desk.good("jobs").splitlines()] == [
        ["ID", "STATE", "ATTEMPTS", "FAILURES", "REASON"],
        [ids[0], "done", "1", "0"],
        [ids[1], "failed", "1", "1", "failed", "once"],
    ]
    shown = dict(
        line.split(maxsplit=1) for line in desk.good("jobs", "show", ids[0]).splitlines() if " " in line.strip()
    )
    assert (shown["state"].strip(), shown["worker"].strip()) == ("done", "one")
    record = json.loads(desk.good("jobs", "show", "--json", ids[1]))
    assert (record["state"], record["failures"], record["result"]) == ("failed", 1, None)
    assert record["finished"] >= record["created"] > 1.7e9
    assert "Kelpie's API keeps no results" in desk.refused("result", ids[0])


def test_who_waits_for_jobs_that_all_are_done_ends_with_0(desk: KelpieDesk) -> None:
    with desk.waiting(jobs({}, {}, {})) as process, desk.world.worker():
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, len(output.split())) == (0, 3)
    assert sorted(errors.splitlines()) == sorted(f"{job_id} done" for job_id in output.split())


def test_an_array_gives_each_job_its_index(desk: KelpieDesk) -> None:
    text = json.dumps(shell("touch $W/part-$HEELER_JOB_INDEX", environment={"W": str(desk.world.folder)}))
    ids = desk.good("submit", "--array", "3", "-", stdin=text).split()
    assert len({*ids}) == 3
    with desk.world.worker("--max-jobs", "3") as worker:
        assert worker.wait() == 0
    assert sorted(path.name for path in desk.world.folder.glob("part-*")) == ["part-0", "part-1", "part-2"]
    assert desk.states() == dict.fromkeys(ids, "done")


def test_fresh_gives_the_jobs_a_run_of_their_own(desk: KelpieDesk) -> None:
    ids = desk.good("submit", "--fresh", "-", stdin=jobs({}, {})).split()
    runs = {desk.server.job(job_id)["environment"]["HEELER_DOCUMENT"] for job_id in ids}
    (run,) = runs
    assert json.loads(run)["run_id"].startswith("fresh-")


def test_a_snapshot_of_a_submitted_job_is_kept_as_one(desk: KelpieDesk) -> None:
    world = desk.world
    entry = {
        "bucket": BUCKET,
        "prefix": "{job_id}/ck",
        "local_path": str(world.place("checkpoint")),
        "mode": "snapshot",
    }
    job = shell("echo 1 > $CHECKPOINT_DIR/step", sync={"before": [entry], "during": [entry]})
    (job_id,) = desk.good("submit", "-", stdin=json.dumps(job)).split()
    with world.worker("--max-jobs", "1", HEELER_S3_PROVIDER="r2") as worker:
        assert worker.wait() == 0
    assert desk.states() == {job_id: "done"}
    keys = world.keys(f"{job_id}/ck/")
    assert keys
    assert all("/ck/.heeler/" in key for key in keys)


def test_a_waiting_job_is_cancelled_and_a_running_one_is_stopped_by_its_worker(desk: KelpieDesk) -> None:
    world = desk.world
    program = world.bash("sleep 1000")
    long = {"command": program[0], "arguments": program[1:], "heartbeat_interval": 1}
    with desk.waiting(json.dumps(long)) as process, world.worker() as worker:
        pid = world.told_pid()
        ((running, _),) = desk.states().items()
        (waiting,) = desk.good("submit", "-", stdin=jobs({})).split()
        assert desk.good("cancel", waiting) == f"{waiting} cancelled\n"
        assert alive(pid)
        assert desk.good("cancel", running) == f"{running} cancelled; its worker stops it at its next heartbeat\n"
        eventually(lambda: not alive(pid), "the program was stopped")
        output, errors = process.communicate(timeout=60)
        assert worker.process.poll() is None
    assert (process.returncode, output, errors) == (1, f"{running}\n", f"{running} cancelled\n")
    assert f"job {waiting} is cancelled already" in desk.refused("cancel", waiting)
    assert desk.states() == {running: "cancelled", waiting: "cancelled"}
    assert json.loads(desk.good("jobs", "show", running, "--json"))["attempts"] == 1


@pytest.mark.parametrize(
    ("arguments", "stdin", "changes", "words"),
    [
        ([], "nonsense", {}, "the job document is not JSON"),
        ([], jobs({}, {"command": ""}), {}, "standard input: the job is refused: command: "),
        ([], jobs({"id": "mine"}), {}, "the job is refused: id: can't be chosen, for Kelpie's API makes the ids"),
        ([], jobs({"result_key": "x"}), {}, "the job is refused: result_key: Kelpie's API keeps no results"),
        ([], jobs({"heartbeat_interval": 0.5}), {}, "the job is refused: heartbeat_interval: must be a whole number"),
        ([], jobs({"input_bucket": "lab"}), {}, "the job is refused: input_prefix: is missing"),
        ([], jobs({}), {"SALAD_CONTAINER_GROUP_ID": ""}, "set SALAD_CONTAINER_GROUP_ID (or --container-group-id)"),
        ([], jobs({}), {"KELPIE_API_KEY": ""}, "set KELPIE_API_KEY; or SALAD_API_KEY with SALAD_ORGANIZATION_NAME"),
        (
            [],
            jobs({}),
            {"KELPIE_API_KEY": "wrong"},
            "answered GET /jobs with 403: Invalid API Key; check KELPIE_API_KEY",
        ),
        ([], jobs({}), {"KELPIE_API_URL": "nowhere"}, "KELPIE_API_URL (or --kelpie-url) is 'nowhere', but must be"),
        (["--kelpie-url", "http://me:pw@x"], jobs({}), {}, "KELPIE_API_URL (or --kelpie-url) must be like"),
        (["--source", "kelpie:x"], jobs({}), {}, "source kelpie takes no address"),
        (["--group", "g"], jobs({}), {}, "--group names a message group of a FIFO queue of SQS"),
        (["--raw"], "hello", {}, "--raw sends a message for an app"),
        (["--array", "2"], jobs({"index": 1}), {}, "index: is there already, and --array gives each job its own"),
        ([], jobs({}), {"HEELER_SOURCE": "", "KELPIE_API_KEY": ""}, "to sqs or kelpie, or to local:FOLDER"),
    ],
)
def test_wrong_submissions_are_refused_in_one_line_and_nothing_is_sent(
    desk: KelpieDesk, arguments: list[str], stdin: str, changes: dict[str, str], words: str
) -> None:
    assert words in desk.refused("submit", *arguments, "-", stdin=stdin, **changes)  # type: ignore[arg-type]
    assert desk.server.events == []


def test_the_key_alone_or_flags_name_the_api(desk: KelpieDesk) -> None:
    (one,) = desk.good("submit", "-", stdin=jobs({}), HEELER_SOURCE="").split()
    flags = (
        *("--source", "kelpie", "--kelpie-url", desk.server.url, "--container-group-id", "group-2"),
        *("--salad-organization", ORGANIZATION, "--salad-project", PROJECT),
    )
    other = {"KELPIE_API_KEY": "", "SALAD_API_KEY": API_KEY, "KELPIE_API_URL": "", "SALAD_CONTAINER_GROUP_ID": ""}
    (two,) = desk.good("submit", *flags, "-", stdin=jobs({}), **other).split()
    assert desk.states() == {one: "pending"}
    assert [job["id"] for job in json.loads(desk.good("jobs", *flags, "--json", **other))] == [two]


def test_an_api_that_is_out_of_reach_or_unknown_jobs_are_said_in_one_line(desk: KelpieDesk) -> None:
    for command in (["jobs", "show", NO_ID], ["cancel", NO_ID], ["result", NO_ID], ["jobs", "show", "../x"]):
        assert f"no job '{command[-1]}' in Kelpie's API at {desk.server.url}" in desk.refused(*command)
    desk.server.faults.fail("create", Fault.LOSE)
    doubt = desk.refused("submit", "-", stdin=jobs({}), code=69)
    assert doubt.endswith("would be twice if they were submitted again: look with heeler jobs first\n")
    assert [*desk.states().values()] == ["pending"]
    with desk.server.away():
        for command in (["jobs"], ["jobs", "show", NO_ID], ["cancel", NO_ID], ["submit", "-"]):
            assert "is out of reach: Connection refused" in desk.refused(*command, stdin=jobs({}), code=69)


def test_ids_of_what_was_submitted_are_printed_though_the_rest_failed(desk: KelpieDesk) -> None:
    def listen(event: str, job: dict[str, Any]) -> None:
        if event == "created":
            desk.server.faults.fail("create", Fault.ERROR, status=422)

    desk.server.table.listeners.append(listen)
    said = desk.say("submit", "--array", "1001", "-", stdin=jobs({}))
    assert said.returncode == 64
    assert said.stderr.startswith("heeler: 1000 of 1001 jobs were submitted, then: Kelpie's API at ")
    assert said.stderr.count("\n") == 1
    assert {*said.stdout.split()} == {*desk.states()}
