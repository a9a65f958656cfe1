"""The commands of docs/from-kelpie.md and of examples/kelpie-sum as they stand there, and the table of variables."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from heeler import config
from heeler.job import JobDocument, parse_document
from heeler.kelpie_variables import without_effect
from heeler.local.kelpie_model import SUBMISSION
from heeler.settings import Settings
from heeler.sources.kelpie_job import Row, document_of
from tests.acceptance.world import eventually
from tests.support.worker import clean_environment, heeler

ROOT = Path(__file__).resolve().parents[2]
PAGE_FILE = ROOT / "docs" / "from-kelpie.md"
README_FILE = ROOT / "examples" / "kelpie-sum" / "README.md"
PAGE, README = (file.read_text(encoding="utf-8") for file in (PAGE_FILE, README_FILE))
ENV_FILE = "kelpie.env"

KELPIE_READS = {
    "AWS_ACCESS_KEY_ID",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "CHECKPOINT_DIR",
    "FILE_WATCHER_DEBOUNCE_MS",
    "FILE_WATCHER_MAX_WAIT_MS",
    "FILE_WATCHER_STABILITY_CHECK_MS",
    "HEARTBEAT_INTERVAL_S",
    "INPUT_DIR",
    "KELPIE_API_KEY",
    "KELPIE_API_URL",
    "KELPIE_LOG_LEVEL",
    "KELPIE_RECREATE_BETWEEN_JOBS",
    "KELPIE_STATE_FILE",
    "MAX_JOB_FAILURES",
    "MAX_RETRIES",
    "MAX_TIME_WITH_NO_WORK_S",
    "OUTPUT_DIR",
    "SALAD_API_KEY",
    "SALAD_CONTAINER_GROUP_ID",
    "SALAD_MACHINE_ID",
    "SALAD_ORGANIZATION",
    "SALAD_ORGANIZATION_NAME",
    "SALAD_PROJECT",
    "SALAD_PROJECT_NAME",
}
"""The variables of Kelpie's worker (PROTOCOLS 3), and what its S3 client reads of AWS."""
SAMPLES = {
    "KELPIE_LOG_LEVEL": "trace",
    "KELPIE_API_URL": "http://127.0.0.1:1",
    "KELPIE_RECREATE_BETWEEN_JOBS": "true",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
}
"""A value that each may have, where 7 is none."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def rows() -> list[tuple[list[str], str, str]]:
    """The table of variables: their names, what is said of them, and the cell of the setting."""
    table = PAGE.partition("\n| variable | honoured | setting |\n|---|---|---|\n")[2].partition("\n\n")[0]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return [(re.findall(r"`(\w+)`", names), words, cell) for names, words, cell in found]


def loaded(name: str, value: str) -> dict[str, tuple[object, str]]:
    """Each setting, by its name in the environment, where only that variable is set: its value and its origin."""
    found = config.load({}, {name: value})
    values = {key: (getattr(found.settings, key), origin) for key, origin in found.origins.items()}
    return {config.environment_name(key): pair for key, pair in values.items()}


# The table.


def test_each_variable_of_kelpies_worker_is_in_the_table_once() -> None:
    named = [name for names, _, _ in rows() for name in names]
    assert len(named) == len(set(named))
    assert KELPIE_READS | {"AWS_PROFILE"} == set(named)


def test_what_the_table_calls_honoured_is_read_into_the_setting_beside_it() -> None:
    for names, words, cell in rows():
        if cell == "-":
            assert words.startswith("no"), names
            continue
        (setting,) = re.findall(r"`(\w+)`", cell)
        assert words.startswith(("yes", "as ")), names
        for name in names:
            value = SAMPLES.get(name, "7")
            assert loaded(name, value)[setting][1] == f"environment {name}"
            translated = name == "KELPIE_LOG_LEVEL" or "(in seconds)" in cell
            assert translated or loaded(setting, value)[setting][0] == loaded(name, value)[setting][0]


def test_what_the_table_calls_without_effect_is_said_to_be_so_in_the_log() -> None:
    silent = [name for names, words, _ in rows() for name in names if words.startswith("no effect")]
    assert silent == [name for name, _ in without_effect(dict.fromkeys(KELPIE_READS, "7"))]
    assert silent == ["MAX_RETRIES"]


def test_the_defaults_in_the_table_are_those_of_the_settings() -> None:
    said = {name: words for names, words, _ in rows() for name in names}
    assert f"`{Settings.kelpie_url}`" in said["KELPIE_API_URL"]
    for name in ("INPUT_DIR", "CHECKPOINT_DIR", "OUTPUT_DIR"):
        assert said[name] == f"yes: `{getattr(Settings, name.lower())}`"
    assert f"`{Settings.kelpie_state_file}`" in said["KELPIE_STATE_FILE"]
    assert f"{Settings.kelpie_poll:g} s" in said["HEARTBEAT_INTERVAL_S"]
    times = {"DEBOUNCE": Settings.debounce, "STABILITY_CHECK": Settings.open_wait, "MAX_WAIT": Settings.max_wait}
    for name, seconds in times.items():
        assert re.search(rf"\b{seconds * 1000:.0f}\b", said[f"FILE_WATCHER_{name}_MS"])


def test_every_name_of_ours_on_the_page_is_one() -> None:
    known = {config.environment_name(entry.name) for entry in fields(Settings)}
    told = {"HEELER_DOCUMENT", "HEELER_JOB_ID", "HEELER_ATTEMPT"}  # in a job, and to its program
    assert set(re.findall(r"\bHEELER_\w+", PAGE + README)) <= known | told


@pytest.mark.parametrize("file", [PAGE_FILE, README_FILE])
def test_what_is_linked_is_there(file: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = file if not path else (file.parent / path).resolve()
        assert target.is_file(), link
        heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
        assert not anchor or anchor in slugs, link


# The line.


@pytest.mark.parametrize("text", [PAGE, README])
def test_the_line_that_changes_is_a_command_of_heelers(text: str) -> None:
    before, after = blocks(text, "dockerfile")
    assert 'CMD ["/kelpie"]' in before.splitlines()
    (line,) = (line for line in after.splitlines() if line.startswith("CMD "))
    program, *arguments = json.loads(line.removeprefix("CMD "))
    assert program == "/opt/heeler/bin/heeler"
    assert f"{Path(program).parent}/pip install heeler" in after
    assert heeler(*arguments, "--help").returncode == 0
    kept = [line for line in before.splitlines() if not line.startswith(("ADD", "CMD"))]
    assert [line for line in after.splitlines() if not line.startswith(("RUN", "CMD"))] == kept


# The commands.


class Laptop:
    """A folder in which somebody types what the page says, with its `heeler local` in another terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir()
        # What the commands leave at its default must not be that of the machine that the tests run on.
        places = {f"{part}_DIR": str(folder / part.lower()) for part in ("INPUT", "CHECKPOINT", "OUTPUT")}
        self.environment = clean_environment(
            **places,
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            HEELER_STATE_DIR=str(folder / "state"),
            HEELER_CONTROL="off",
            TMPDIR=str(folder / "tmp"),
            XDG_STATE_HOME=str(folder / "home"),
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
        )

    @contextmanager
    def services(self, command: str) -> Iterator[None]:
        """The command that starts them, until the end of the block."""
        (line,) = command.splitlines()
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            ready = self.folder / ENV_FILE
            eventually(lambda: ready.exists() or process.poll() is not None, "it serves", 60)
            yield
            assert process.poll() is None
        finally:
            process.terminate()
            process.wait(60)

    def type(self, *scripts: str, **environment: str) -> list[str]:
        """What each script prints; all are typed into one shell, which ends at the first command that fails."""
        mark = "--- next block ---"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"\necho; echo '{mark}'\n".join(scripts)],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout.split(mark)


@pytest.fixture
def laptop(tmp_path: Path) -> Laptop:
    return Laptop(tmp_path)


def objects(said: str) -> list[Any]:
    """The JSON objects among the lines."""
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_there_are_as_many_commands_as_are_run_here() -> None:
    assert len(blocks(PAGE, "sh")) == 5
    assert len(blocks(README, "sh")) == 2


def test_the_commands_of_the_page_do_what_it_says(laptop: Laptop) -> None:
    services, first, look, snapshot, _ = blocks(PAGE, "sh")
    with laptop.services(services):
        tried, looked, kept = laptop.type(first, look, snapshot)

    (by_curl,) = objects(tried)
    by_heeler = tried.split()[0]
    for job_id in (by_heeler, by_curl["id"]):
        assert re.search(rf"^{job_id} +done +1 +0$", tried, re.MULTILINE), tried
    assert re.search(r"^answer\b|\banswer$", tried, re.MULTILINE), tried

    pending, _, cancelled = objects(looked)
    (one,) = pending["jobs"]
    assert one["status"] == "pending"
    assert re.search(rf"^{one['id']} cancelled$", looked, re.MULTILINE), looked
    assert cancelled["status"] == "canceled"
    assert re.search(r"^kelpie_url +http://127.0.0.1:\d+ +environment KELPIE_API_URL$", looked, re.MULTILINE), looked

    assert re.search(r"^0\d{3} .* step$", kept, re.MULTILINE), "of a generation modes are told"


def meeting(folder: Path, count: int, output: str) -> dict[str, Any]:
    """A job that waits until so many of its kind have begun, and leaves where it ran: one alone would never end."""
    folder.mkdir()
    words = f"touch {folder}/$KELPIE_JOB_ID; until [ $(ls {folder} | wc -l) = {count} ]; do sleep 0.1; done"
    return {"command": "sh", "arguments": ["-c", f"{words}; pwd > ${output}/at"]}


BEGIN = f". ./{ENV_FILE}; export HEELER_SOURCE=kelpie HEARTBEAT_INTERVAL_S=0.3 HEELER_EXIT_WHEN_IDLE=3"


def test_several_workers_of_one_machine_work_side_by_side(laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    services, *_, several = blocks(PAGE, "sh")
    job = meeting(laptop.folder / "meet", 2, "OUTPUT_DIR")
    jobs = [{**job, "output_bucket": "local", "output_prefix": f"{name}/"} for name in ("a", "b")]
    (laptop.folder / "jobs.json").write_text(json.dumps(jobs))
    monkeypatch.setenv("XDG_STATE_HOME", laptop.environment["XDG_STATE_HOME"])
    places = [laptop.folder / f"worker-{number}" for number in (1, 2)]
    own = [config.load({}, {"KELPIE_STATE_FILE": str(place / "kelpie-state.json")}).settings for place in places]
    states = [Path(settings.state_dir) for settings in own]
    there = states[0].parent.exists()  # for root it is no folder of this test
    try:
        with laptop.services(services):
            begin = f"{BEGIN}; heeler submit jobs.json; unset HEELER_STATE_DIR HEELER_CONTROL"
            laptop.type(begin, several, "heeler sync pull s3://local/a/ a; heeler sync pull s3://local/b/ b")
        assert all(state.is_dir() for state in states), "each has a state folder of its own"
    finally:
        for state in states if there else [states[0].parent]:
            shutil.rmtree(state, ignore_errors=True)
    at = {(laptop.folder / name / "at").read_text().strip() for name in ("a", "b")}
    assert at == {str(place) for place in places}


def test_one_worker_does_several_jobs_with_folders_of_their_own(laptop: Laptop) -> None:
    place = {"bucket": "local", "prefix": "{job_id}/", "local_path": "work/{job_id}"}
    job = {**meeting(laptop.folder / "meet", 2, "HEELER_OUTPUT_DIR"), "sync": {"after": [place]}}
    (laptop.folder / "jobs.json").write_text(json.dumps([job, job]))
    (command,) = re.findall(r"`(heeler kelpie --concurrency 2)`", PAGE)
    with laptop.services(blocks(PAGE, "sh")[0]):
        (said,) = laptop.type(f"{BEGIN}; heeler submit jobs.json; {command}; heeler jobs")
    assert len(re.findall(r"^[0-9a-f-]{36} +done +1 +0$", said, re.MULTILINE)) == 2, said


def test_the_commands_of_the_example_by_hand_give_the_sum(laptop: Laptop) -> None:
    services, by_hand = blocks(README, "sh")
    shutil.copytree(README_FILE.parent, laptop.folder / "examples" / "kelpie-sum")
    with laptop.services(services):
        (said,) = laptop.type(by_hand)
    assert objects(said)[0]["status"] == "pending"
    assert f'{{"sum": {1000 * 1001 * 2001 // 6}, "numbers": 1000}}' in said
    assert f"sum {1000 * 1001 * 2001 // 6}" in said.splitlines()


# The job that asks for snapshots.


def test_the_job_with_our_fields_in_its_environment_is_taken_by_the_api_and_understood() -> None:
    (text,) = blocks(PAGE, "json")
    row = {"id": "one", "status": "running", **SUBMISSION.validate_json(text).fields()}
    document = parse_document(json.dumps(document_of(Row.of(row), Settings())).encode())
    assert isinstance(document, JobDocument)
    (kept,) = document.sync.during
    assert (kept.mode, kept.local_path, document.timeout) == ("snapshot", "/checkpoint", 86400)
    assert document.environment == {}
