"""The OpenMM example through the real command line: killed midway, and the same bytes as undisturbed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.worker import clean_environment

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "molecular-dynamics"


def digests(folder: Path) -> dict[str, str]:
    names = ("energies.csv", "final.pdb", "trajectory.dcd")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_a_simulation_killed_midway_ends_on_another_machine_with_the_bytes_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    folders = {name: tmp_path / "undisturbed" / name.lower() for name in ("INPUT_DIR", "CHECKPOINT_DIR", "OUTPUT_DIR")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    structure = next((EXAMPLE / "input").iterdir())
    (folders["INPUT_DIR"] / structure.name).write_bytes(structure.read_bytes())
    environment = {**os.environ, **{name: str(folder) for name, folder in folders.items()}}
    with subprocess.Popen(
        [sys.executable, str(EXAMPLE / "simulate.py")], env=environment, stdout=subprocess.DEVNULL
    ) as undisturbed:
        try:
            done = subprocess.run(
                [sys.executable, str(EXAMPLE / "run.py"), "--kill-after", "10", "--results", "results"],
                cwd=tmp_path,
                env=clean_environment(),
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            assert undisturbed.wait(240) == 0
        finally:
            undisturbed.kill()
    assert "machine 1 vanishes" in done.stdout
    second = done.stdout.partition("--- machine 2 starts")[2]
    first_step = re.search(r"step (\d+)/\d+", second)
    assert first_step
    assert int(first_step[1]) > 100, "the second machine went on from a checkpoint"
    assert digests(tmp_path / "results") == digests(folders["OUTPUT_DIR"])
