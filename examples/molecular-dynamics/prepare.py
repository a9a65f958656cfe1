"""Makes `input/villin-hp35.pdb` from a structure that OpenMM ships. Its result is in the repository."""

from __future__ import annotations

from pathlib import Path

import openmm
from openmm import app, unit

SOURCE = Path(app.__file__).parent / "data" / "test.pdb"
TARGET = Path(__file__).parent / "input" / "villin-hp35.pdb"
PROTEIN_RESIDUES = 35  # They come first in the file; behind them stand chloride ions and water.
REMARKS = """\
REMARK   1 VILLIN HEADPIECE SUBDOMAIN HP35, MUTANT N68H, 582 ATOMS
REMARK   1 FROM OPENMM'S app/data/test.pdb ("Villin N68H in explicit water"):
REMARK   1 WATER AND IONS REMOVED, ENERGY MINIMISED IN IMPLICIT SOLVENT
"""


def main() -> None:
    """Strip water and ions, minimise the energy, write the protein."""
    source = app.PDBFile(str(SOURCE))
    protein = app.Modeller(source.topology, source.positions)
    protein.delete([residue for residue in protein.topology.residues() if residue.index >= PROTEIN_RESIDUES])
    protein.topology.setPeriodicBoxVectors(None)  # The box went with the water.
    system = app.ForceField("amber99sbildn.xml", "amber99_obc.xml").createSystem(
        protein.topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds
    )
    context = openmm.Context(
        system,
        openmm.VerletIntegrator(0.001 * unit.picoseconds),
        openmm.Platform.getPlatformByName("Reference"),
    )
    context.setPositions(protein.positions)
    openmm.LocalEnergyMinimizer.minimize(context)
    positions = context.getState(positions=True).getPositions()
    TARGET.parent.mkdir(exist_ok=True)
    with TARGET.open("w", encoding="ascii") as file:
        file.write(REMARKS)
        app.PDBFile.writeModel(protein.topology, positions, file, keepIds=True)
        app.PDBFile.writeFooter(protein.topology, file)


if __name__ == "__main__":
    main()
