"""Every command in README is run as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from heeler.job import parse_document
from tests.support.kelpie_server import KelpieServer
from tests.support.s3 import S3Server
from tests.support.sqs_server import KEY, REGION, SECRET, SqsServer
from tests.support.worker import clean_environment

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALLS = ["pip install '.[local]' && heeler demo", "pip install '.[test]' && pytest"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)


def test_the_two_commands_install_what_they_need_from_the_extras_and_ci_runs_the_second() -> None:
    assert blocks("sh")[0].splitlines() == INSTALLS
    assert ".[test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def run_block(script: str, folder: Path, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = clean_environment(PATH=path, HEELER_STATE_DIR=str(folder / "state"), HEELER_CONTROL="off", **environment)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_as_many_commands_as_are_run_here() -> None:
    assert len(blocks("sh")) == 5


def test_the_commands_of_the_first_job_run_as_they_stand(tmp_path: Path) -> None:
    said = run_block(blocks("sh")[1], tmp_path)
    assert "working on first" in said
    assert re.search(r"^first +done", said, re.MULTILINE)


def test_the_commands_of_the_http_app_run_as_they_stand(tmp_path: Path) -> None:
    said = run_block(blocks("sh")[2], tmp_path)
    assert re.search(r"^[0-9a-f]{16} +done", said, re.MULTILINE)


def test_the_commands_of_kelpies_jobs_run_as_they_stand(tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("INPUT_DIR", "CHECKPOINT_DIR", "OUTPUT_DIR")}
    with KelpieServer() as server:
        said = run_block(blocks("sh")[4], tmp_path, **server.environment(), **folders, TMPDIR=str(tmp_path))
    job_id = said.split()[0]
    assert f"working on {job_id}" in said
    assert re.search(rf"^{job_id} +done", said, re.MULTILINE)


def test_the_commands_of_the_queue_of_sqs_run_as_they_stand(tmp_path: Path) -> None:
    names = {line.partition("=")[0] for line in blocks("ini")[0].splitlines()}
    (tmp_path / "job.json").write_text(re.findall(r"^\{\"id\": \"first\".*$", README, re.MULTILINE)[0], "utf-8")
    with SqsServer() as queue, S3Server.start(buckets=["lab"]) as storage:
        environment = {
            "R2_S3_ENDPOINT_URL": storage.url,
            "R2_AWS_ACCESS_KEY_ID": storage.access_key,
            "R2_AWS_SECRET_ACCESS_KEY": storage.secret_key,
            "SQS_QUEUE_URL": queue.queue("jobs"),
            "SQS_AWS_ACCESS_KEY_ID": KEY,
            "SQS_AWS_SECRET_ACCESS_KEY": SECRET,
            "SQS_AWS_REGION": REGION,
            "R2_BUCKET_NAME": "lab",
        }
        assert names <= environment.keys()
        said = run_block(blocks("sh")[3], tmp_path, **environment)
    assert len(re.findall(r"^first-[0-3] +done", said, re.MULTILINE)) == 4
    assert said.rstrip().endswith('{"exit_code": 0, "signal": null}')


def test_the_job_documents_in_readme_are_valid() -> None:
    for text in blocks("json"):
        document = parse_document(json.dumps(json.loads(text)).encode())
        assert document.sync.during


def test_the_lines_for_a_dockerfile_make_an_environment_that_runs_heeler(tmp_path: Path) -> None:
    (dockerfile,) = (block for block in blocks("dockerfile") if "RUN " in block)
    line = next(line.strip() for line in dockerfile.splitlines() if line.strip().startswith("RUN "))
    command = line.removeprefix("RUN ").replace("/opt/heeler", str(tmp_path / "heeler"))
    # The name in the index is this project; here it is installed from this tree.
    command = command.replace("install heeler", f"install --quiet {ROOT}")
    subprocess.run(["bash", "-euc", command], check=True, timeout=300, env=clean_environment())
    heeler = tmp_path / "heeler" / "bin" / "heeler"
    done = subprocess.run([str(heeler), "version"], capture_output=True, text=True, check=True, env=clean_environment())
    assert done.stdout.startswith("heeler ")
