"""Molecular dynamics of a small protein, written so that it may be killed at any moment and started again.

It reads one PDB file from the input folder, works in the checkpoint folder, and writes its results to the
output folder. It knows nothing of what carries these folders from machine to machine, and asks only that each
file arrive whole: not that all of them be of the same instant. The results of a run that was interrupted are
byte for byte those of one that was not.

Exit codes: 0 finished; 75 interrupted by SIGTERM or SIGINT, with a checkpoint written: run it again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import openmm
from openmm import app, unit

TIME_STEP = 0.004  # picoseconds; hydrogens are made heavier (HYDROGEN_MASS) to allow it
HYDROGEN_MASS = 1.5  # daltons
TEMPERATURE = 300.0  # kelvin
FRICTION = 1.0  # per picosecond
CHECKPOINTS_KEPT = 3
EX_TEMPFAIL = 75  # sysexits.h: not a failure, try again
ENERGY_COLUMNS = b"step,time_ps,potential_kj_mol,kinetic_kj_mol,temperature_k\n"


class UnusableError(Exception):
    """A checkpoint is damaged, or does not match the files it speaks of. An older one may do."""


# --- The simulation ---------------------------------------------------------------------------------------


class Simulation:
    """A protein in implicit solvent under Langevin dynamics.

    On OpenMM's Reference platform: it is slow, but it uses one thread and double precision, and its
    checkpoint carries the state of the random numbers: a run resumed in another process goes on bit for bit.
    """

    def __init__(self, structure: Path, seed: int) -> None:
        pdb = app.PDBFile(str(structure))
        self.topology = pdb.topology
        self._start_positions = pdb.positions
        self._seed = seed
        system = app.ForceField("amber99sbildn.xml", "amber99_obc.xml").createSystem(
            self.topology,
            nonbondedMethod=app.NoCutoff,
            constraints=app.HBonds,
            hydrogenMass=HYDROGEN_MASS * unit.dalton,
            removeCMMotion=False,  # The thermostat moves the whole molecule too.
        )
        self._degrees_of_freedom = 3 * system.getNumParticles() - system.getNumConstraints()
        self._integrator = openmm.LangevinMiddleIntegrator(
            TEMPERATURE * unit.kelvin, FRICTION / unit.picosecond, TIME_STEP * unit.picoseconds
        )
        self._integrator.setRandomNumberSeed(seed)
        platform = openmm.Platform.getPlatformByName("Reference")
        self._context = openmm.Context(system, self._integrator, platform)

    def start(self) -> None:
        """Begin at step 0, with random velocities."""
        self._context.setPositions(self._start_positions)
        self._context.setVelocitiesToTemperature(TEMPERATURE * unit.kelvin, self._seed)

    def advance(self, steps: int) -> None:
        """Compute so many time steps."""
        self._integrator.step(steps)

    def save(self) -> bytes:
        """Everything that the next step depends on, random numbers included, as OpenMM writes it."""
        return bytes(self._context.createCheckpoint())

    def restore(self, state: bytes) -> None:
        """Go on from what `save` returned, in this process or an earlier one."""
        self._context.loadCheckpoint(state)

    def positions(self) -> Any:
        """Where the atoms are, as an OpenMM quantity."""
        return self._context.getState(positions=True).getPositions(asNumpy=True)

    def energies(self) -> tuple[float, float, float]:
        """Potential and kinetic energy (kJ/mol), and temperature (kelvin)."""
        state = self._context.getState(energy=True)
        potential = state.getPotentialEnergy().value_in_unit(unit.kilojoules_per_mole)
        kinetic = state.getKineticEnergy().value_in_unit(unit.kilojoules_per_mole)
        gas_constant = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoules_per_mole / unit.kelvin)
        return potential, kinetic, 2 * kinetic / (self._degrees_of_freedom * gas_constant)

    def pdb(self) -> bytes:
        """The structure as it is now. No header: OpenMM's carries the date, and bytes are compared here."""
        text = io.StringIO()
        app.PDBFile.writeModel(self.topology, self.positions(), text, keepIds=True)
        app.PDBFile.writeFooter(self.topology, text)
        return text.getvalue().encode("ascii")


class DcdEncoder:
    """Turns positions into the bytes of a DCD file, through OpenMM's own writer working in memory."""

    def __init__(self, topology: Any, frame_every: int) -> None:
        self._frame_every = frame_every
        self._memory = io.BytesIO()
        self._writer = app.DCDFile(
            self._memory, topology, TIME_STEP * unit.picoseconds, firstStep=frame_every, interval=frame_every
        )
        self._template = self._memory.getvalue()

    def header(self, frames: int) -> bytes:
        """The file's first bytes when it holds so many frames: the same in every run."""
        header = bytearray(self._template)
        struct.pack_into("<i", header, 8, frames)
        struct.pack_into("<i", header, 20, frames * self._frame_every)
        struct.pack_into("<80s", header, 180, b"")  # OpenMM puts the date here.
        return bytes(header)

    def frame(self, positions: Any) -> bytes:
        """One frame, as it stands behind the header and the frames before it."""
        self._memory.seek(len(self._template))
        self._memory.truncate()
        self._writer.writeModel(positions)
        return self._memory.getvalue()[len(self._template) :]


# --- Files that survive -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """How far a growing file had come: its records, its bytes, and the SHA-256 of what follows its header."""

    records: int
    length: int
    sha256: str


class GrowingFile:
    """A header that tells the number of records, then records, added at the end and never changed.

    It is open only while it is written: whoever copies it sees it closed and quiet between two checkpoints.
    """

    def __init__(self, path: Path, header: Callable[[int], bytes]) -> None:
        self.path = path
        self._header = header
        self._begin()

    def _begin(self) -> None:
        self._records = 0
        self._length = len(self._header(0))
        self._digest = hashlib.sha256()

    def create(self) -> None:
        """Start with no records, whatever was there before."""
        self._begin()
        self.path.write_bytes(self._header(0))

    def append(self, records: Sequence[bytes]) -> None:
        """Add records, and return when they are on the disk."""
        data = b"".join(records)
        with self.path.open("r+b") as file:
            file.write(self._header(self._records + len(records)))
            file.seek(self._length)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._records += len(records)
        self._length += len(data)
        self._digest.update(data)

    def mark(self) -> Mark:
        """What a checkpoint has to remember of this file."""
        return Mark(self._records, self._length, self._digest.hexdigest())

    def rewind(self, mark: Mark) -> None:
        """Make the file what it was when `mark` was taken.

        It may have grown since then, and its header may be of any instant. The hash tells whether the records
        up to the mark are those that were meant: after two interruptions they may be another machine's.

        Raises:
            UnusableError: The file has not got that far, or holds something else.
        """
        if not self.path.exists():
            raise UnusableError(f"{self.path.name} is missing")
        self._begin()
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size < mark.length:
                raise UnusableError(f"{self.path.name} has {size} bytes of the {mark.length} it speaks of")
            file.seek(self._length)
            while self._length < mark.length:
                block = file.read(min(1 << 20, mark.length - self._length))
                self._digest.update(block)
                self._length += len(block)
            if self._digest.hexdigest() != mark.sha256:
                raise UnusableError(f"{self.path.name} holds other data than it speaks of")
            file.truncate(mark.length)
            file.seek(0)
            file.write(self._header(mark.records))
        self._records = mark.records


@dataclass(frozen=True)
class Request:
    """What the results depend on. A checkpoint made for another request must not be continued."""

    input_sha256: str
    steps: int
    frame_every: int
    seed: int
    openmm: str


@dataclass(frozen=True)
class Checkpoint:
    """One file that holds the simulation's state, and says how long the growing files were at that moment."""

    request: Request
    step: int
    trajectory: Mark
    energies: Mark
    state: bytes

    def to_bytes(self) -> bytes:
        """A line with the SHA-256 of the rest, a line of JSON, then OpenMM's bytes."""
        told = {key: value for key, value in asdict(self).items() if key != "state"}
        body = json.dumps(told, sort_keys=True).encode() + b"\n" + self.state
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Read what `to_bytes` wrote.

        Raises:
            UnusableError: The file is damaged or incomplete.
        """
        digest, _, body = data.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise UnusableError("it is damaged or incomplete")
        told, _, state = body.partition(b"\n")
        fields = json.loads(told)
        return cls(
            request=Request(**fields["request"]),
            step=fields["step"],
            trajectory=Mark(**fields["trajectory"]),
            energies=Mark(**fields["energies"]),
            state=state,
        )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for half of it, not even after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- The run ----------------------------------------------------------------------------------------------


class StopRequest:
    """Remembers that a signal asked to stop; the run looks at it between two frames."""

    def __init__(self) -> None:
        self.made = False
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.made = True


class Run:
    """One simulation and its files, from wherever the checkpoint folder stands to the end."""

    def __init__(self, structure: Path, folder: Path, request: Request, checkpoint_every: int) -> None:
        self._folder = folder
        self._request = request
        self._checkpoint_every = checkpoint_every
        self._simulation = Simulation(structure, request.seed)
        self._encoder = DcdEncoder(self._simulation.topology, request.frame_every)
        self._trajectory = GrowingFile(folder / "trajectory.dcd", self._encoder.header)
        self._energies = GrowingFile(folder / "energies.csv", lambda _records: ENERGY_COLUMNS)
        self._new_frames: list[bytes] = []
        self._new_energies: list[bytes] = []
        self.step = 0

    def resume(self) -> None:
        """Go on from the newest checkpoint that the files bear out; without one, from the beginning.

        A checkpoint that does not hold is removed, or it would count among the newest while older steps are
        computed again.
        """
        for left_over in self._folder.glob(".*.tmp"):
            left_over.unlink()
        for path in sorted(self._folder.glob("checkpoint-*.chk"), reverse=True):
            try:
                checkpoint = Checkpoint.from_bytes(path.read_bytes())
                self._refuse_if_foreign(checkpoint, path)
                self._trajectory.rewind(checkpoint.trajectory)
                self._energies.rewind(checkpoint.energies)
            except UnusableError as reason:
                say(f"{path.name} can't be used: {reason}")
                path.unlink()
                continue
            self._simulation.restore(checkpoint.state)
            self.step = checkpoint.step
            say(f"resuming at step {self.step} from {path.name}")
            return
        say("starting at step 0")
        self._trajectory.create()
        self._energies.create()
        self._simulation.start()

    def _refuse_if_foreign(self, checkpoint: Checkpoint, path: Path) -> None:
        if checkpoint.request != self._request:
            sys.exit(
                f"{path} belongs to another run: it was made for {checkpoint.request}, not {self._request}. "
                "Run with the same input and flags, or give an empty checkpoint folder."
            )

    def advance(self, stop: StopRequest) -> None:
        """Compute until the end, or until a stop is requested; a checkpoint is written in either case."""
        started, first = time.monotonic(), self.step
        while self.step < self._request.steps and not stop.made:
            self._simulation.advance(self._request.frame_every)
            self.step += self._request.frame_every
            self._collect()
            if self.step % self._checkpoint_every == 0:
                self._write_checkpoint()
                self._report((self.step - first) / (time.monotonic() - started))
        if self._new_frames:
            self._write_checkpoint()

    def _collect(self) -> None:
        potential, kinetic, temperature = self._simulation.energies()
        row = f"{self.step},{self.step * TIME_STEP:.3f},{potential:.6f},{kinetic:.6f},{temperature:.3f}\n"
        self._new_energies.append(row.encode())
        self._new_frames.append(self._encoder.frame(self._simulation.positions()))

    def _write_checkpoint(self) -> None:
        """The growing files first: a checkpoint must never speak of what is not yet on the disk."""
        self._trajectory.append(self._new_frames)
        self._energies.append(self._new_energies)
        self._new_frames.clear()
        self._new_energies.clear()
        checkpoint = Checkpoint(
            request=self._request,
            step=self.step,
            trajectory=self._trajectory.mark(),
            energies=self._energies.mark(),
            state=self._simulation.save(),
        )
        write_whole(self._folder / f"checkpoint-{self.step:09d}.chk", checkpoint.to_bytes())
        for old in sorted(self._folder.glob("checkpoint-*.chk"), reverse=True)[CHECKPOINTS_KEPT:]:
            old.unlink()

    def _report(self, steps_per_second: float) -> None:
        potential, _, temperature = self._simulation.energies()
        ns_per_day = steps_per_second * TIME_STEP / 1000 * 86400
        say(
            f"step {self.step}/{self._request.steps}  {ns_per_day:.1f} ns/day  "
            f"potential {potential:.1f} kJ/mol  {temperature:.0f} K"
        )

    def write_results(self, folder: Path) -> None:
        """Trajectory, energies, final structure, and a summary with the SHA-256 of each."""
        folder.mkdir(parents=True, exist_ok=True)
        for grown in (self._trajectory, self._energies):
            shutil.copyfile(grown.path, folder / grown.path.name)
        (folder / "final.pdb").write_bytes(self._simulation.pdb())
        names = ("energies.csv", "final.pdb", "trajectory.dcd")
        summary = {
            **asdict(self._request),
            "atoms": self._simulation.topology.getNumAtoms(),
            "simulated_ps": round(self.step * TIME_STEP, 3),
            "frames": self._trajectory.mark().records,
            "final_potential_kj_mol": round(self._simulation.energies()[0], 6),
            "sha256": {name: sha256_of(folder / name) for name in names},
        }
        text = json.dumps(summary, indent=2, sort_keys=True) + "\n"
        (folder / "summary.json").write_text(text, encoding="utf-8")


def say(line: str) -> None:
    """Print a line at once: whoever watches a pipe should not wait for a full buffer."""
    print(line, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Flags, with the three folders taken from the environment where they are not given."""
    parser = argparse.ArgumentParser(description="Simulate the protein of a PDB file; may be killed and run again.")
    place = os.environ.get
    parser.add_argument("--input", type=Path, default=place("INPUT_DIR", "input"), help="PDB file, or its folder")
    parser.add_argument("--checkpoints", type=Path, default=place("CHECKPOINT_DIR", "checkpoint"))
    parser.add_argument("--output", type=Path, default=place("OUTPUT_DIR", "output"))
    parser.add_argument("--steps", type=int, default=1300, help=f"time steps of {TIME_STEP} ps")
    parser.add_argument("--frame-every", type=int, default=10, help="steps between two frames")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=2005, help="of velocities and thermostat; not 0")
    asked = parser.parse_args()
    if min(asked.steps, asked.frame_every, asked.checkpoint_every, asked.seed) < 1:
        parser.error("--steps, --frame-every, --checkpoint-every and --seed must be at least 1")
    if asked.steps % asked.frame_every or asked.checkpoint_every % asked.frame_every:
        parser.error("--steps and --checkpoint-every must be multiples of --frame-every")
    return asked


def find_structure(place: Path) -> Path:
    """The one PDB file that `place` is or holds."""
    if place.is_file():
        return place
    found = sorted(place.glob("*.pdb"))
    if len(found) != 1:
        sys.exit(f"{place} must hold exactly one .pdb file, and holds {len(found)}")
    return found[0]


def main() -> int:
    """Resume or start, compute, and write the results once all is computed."""
    stop = StopRequest()
    asked = parse_arguments()
    structure = find_structure(asked.input)
    asked.checkpoints.mkdir(parents=True, exist_ok=True)
    request = Request(
        input_sha256=sha256_of(structure),
        steps=asked.steps,
        frame_every=asked.frame_every,
        seed=asked.seed,
        openmm=openmm.Platform.getOpenMMVersion(),
    )
    run = Run(structure, asked.checkpoints, request, asked.checkpoint_every)
    run.resume()
    run.advance(stop)
    if run.step < request.steps:
        say(f"interrupted at step {run.step}; run again to go on")
        return EX_TEMPFAIL
    run.write_results(asked.output)
    say(f"finished: {request.steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
