"""Properties of crystals by ASE alone: bulk modulus, elastic constants, phonons, the barrier of a hop.

    python examples/properties.py

Every function takes relaxed atoms with a calculator; all of ASE's tools work with it as with any other.
Small strains and displacements make small differences of energies and forces: take float64 for them.
"""

from __future__ import annotations

import tempfile

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.mep import NEB
from ase.optimize import FIRE
from ase.phonons import Phonons
from ase.units import GPa
from numpy.typing import NDArray

import fastchgnet

THZ = 4.135667696e-3  # h * 1 THz in eV
VOIGT = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]


def relaxed(atoms: Atoms, fmax: float = 1e-4) -> Atoms:
    """Relax atoms and cell in place."""
    FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=fmax, steps=500)
    return atoms


def bulk_modulus(atoms: Atoms, strain: float = 0.01, n_points: int = 7) -> float:
    """Bulk modulus, GPa, from energies of uniformly strained cells."""
    volumes, energies = [], []
    for factor in np.linspace(1 - strain, 1 + strain, n_points):
        strained = _copy(atoms)
        strained.set_cell(atoms.cell.array * factor, scale_atoms=True)
        volumes.append(strained.get_volume())
        energies.append(strained.get_potential_energy())
    return EquationOfState(volumes, energies).fit()[2] / GPa


def elastic_constants(atoms: Atoms, strain: float = 0.003) -> NDArray[np.float64]:
    """Stiffness, [6, 6] GPa in Voigt's order, from stresses; atoms relax in each strained cell."""
    columns = []
    for row, column in VOIGT:
        shape = np.zeros((3, 3))
        shape[row, column] += strain / 2
        shape[column, row] += strain / 2
        stresses = []
        for sign in (1, -1):
            strained = _copy(atoms)
            strained.set_cell(atoms.cell.array @ (np.eye(3) + sign * shape), scale_atoms=True)
            FIRE(strained, logfile=None).run(fmax=1e-4, steps=200)
            stresses.append(strained.get_stress())
        columns.append((stresses[0] - stresses[1]) / (2 * strain))
    return np.array(columns).T / GPa


def frequencies(atoms: Atoms, points: list[list[float]], n_cells: int = 3) -> NDArray[np.float64]:
    """Phonon frequencies at points of the reciprocal cell, [points, 3 n] THz; imaginary ones negative.

    ASE wants an odd number of cells; frequencies are exact at multiples of 1 / n_cells.
    """
    with tempfile.TemporaryDirectory() as folder:
        cells = (n_cells,) * 3
        phonons = Phonons(atoms.copy(), atoms.calc, supercell=cells, delta=0.02, name=f"{folder}/phonon")
        phonons.run()
        phonons.read(acoustic=True)
        return phonons.band_structure(np.array(points), verbose=False) / THZ


def barrier(potential: fastchgnet.potential.Potential, start: Atoms, end: Atoms, n_images: int = 3) -> float:
    """Energy of the saddle above the start, eV, by nudged elastic bands.

    A calculator for each image lets each keep its neighbours; they share the network.
    """
    images = [start.copy() for _ in range(n_images + 1)] + [end.copy()]
    for image in images:
        image.calc = fastchgnet.FastCHGNetCalculator(potential)
    band = NEB(images, climb=True, method="improvedtangent")
    band.interpolate(mic=True)
    FIRE(band, logfile=None).run(fmax=0.05, steps=200)
    energies = [image.get_potential_energy() for image in images]
    return max(energies) - energies[0]


def vacancy_hop(metal: Atoms) -> tuple[Atoms, Atoms]:
    """Make two relaxed supercells of a primitive cell in which neighbouring atoms are missing."""
    supercell = metal * (3, 3, 3)
    neighbor = int(np.argsort(supercell.get_distances(0, range(len(supercell)), mic=True))[1])
    start, end = supercell.copy(), supercell.copy()
    # the neighbour moves into the empty place of atom 0
    end.positions[neighbor] = end.positions[0]
    for cell in (start, end):
        del cell[0]
        cell.calc = metal.calc
        FIRE(cell, logfile=None).run(fmax=0.02, steps=200)
    return start, end


def _copy(atoms: Atoms) -> Atoms:
    """Copy atoms with their calculator."""
    copied = atoms.copy()
    copied.calc = atoms.calc
    return copied


def main() -> None:
    """Print properties of MgO and aluminium."""
    potential = fastchgnet.load("chgnet-0.3.0", device="auto", dtype="float64")
    oxide, metal = bulk("MgO", "rocksalt", a=4.21), bulk("Al")
    for crystal in (oxide, metal):
        crystal.calc = fastchgnet.FastCHGNetCalculator(potential)
        relaxed(crystal)
    stiffness = elastic_constants(oxide)
    at_gamma, at_third = frequencies(oxide, [[0, 0, 0], [1 / 3, 1 / 3, 0]])
    print(f"MgO  a = {oxide.cell.cellpar()[0] * 2**0.5:.3f} A, bulk modulus {bulk_modulus(oxide):.0f} GPa")
    print("     C11, C12, C44 =", *(f"{stiffness[i, j]:.0f}" for i, j in ((0, 0), (0, 1), (3, 3))), "GPa")
    print(f"     frequencies at Gamma {np.round(at_gamma, 1)}, at 1/3 1/3 0 {np.round(at_third, 1)} THz")
    print(f"Al   a vacancy hops over {barrier(potential, *vacancy_hop(metal)):.2f} eV")


if __name__ == "__main__":
    main()
