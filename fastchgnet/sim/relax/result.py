"""How to relax, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastchgnet.errors import InputError
from fastchgnet.sim.relax.cell_filter import CellMode
from fastchgnet.units import VOIGT

if TYPE_CHECKING:
    from ase import Atoms

CONVERGED, OUT_OF_STEPS = "converged", "out of steps"
"""Why sound relaxations end."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to relax.

    Raises:
        InputError: a value makes no sense.
    """

    fmax: float = 0.05  # eV/A; converged when no force is longer, on an atom or a row of the cell
    max_steps: int = 500
    cell: str = "full"  # fixed, hydrostatic, constant-volume, or the free components, as xx,yy,xy
    pressure: float = 0.0  # eV/A^3

    def __post_init__(self) -> None:
        """Look at every value."""
        if not (self.fmax > 0 and math.isfinite(self.fmax)):
            raise InputError(f"fmax must be above 0 eV/A, not {self.fmax}")
        if self.max_steps < 0:
            raise InputError(f"the number of steps must not be negative: {self.max_steps}")
        if not math.isfinite(self.pressure):
            raise InputError(f"the pressure must be a number, not {self.pressure}")
        CellMode.of(self.cell)


@dataclass(frozen=True, slots=True)
class Step:
    """A crystal of n atoms, and what a potential says about it."""

    numbers: NDArray[np.int64]  # [n]
    pbc: NDArray[np.bool_]  # [3]
    positions: NDArray[np.float64]  # [n, 3] A
    cell: NDArray[np.float64]  # [3, 3] A
    energy: float  # total, eV; NaN where it is not known
    forces: NDArray[np.float64]  # [n, 3] eV/A
    stress: NDArray[np.float64]  # [3, 3] eV/A^3, positive = tension; NaN unless periodic in three directions
    magmoms: NDArray[np.float64]  # [n] mu_B, magnitudes

    @property
    def volume(self) -> float:
        """Volume of the cell, A^3; NaN unless periodic in three directions."""
        return abs(float(np.linalg.det(self.cell))) if self.pbc.all() else math.nan

    def as_atoms(self) -> Atoms:
        """Give the crystal and what is known of it as ASE takes them."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator

        atoms = Atoms(self.numbers, self.positions, cell=self.cell, pbc=self.pbc)
        if math.isfinite(self.energy):
            results = {"energy": self.energy, "forces": self.forces, "magmoms": self.magmoms}
            if self.pbc.all():
                results["stress"] = self.stress[VOIGT]
            atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms


@dataclass(frozen=True, slots=True)
class Relaxed:
    """A relaxation that has ended."""

    index: int  # which of the crystals that were given
    final: Step  # the last sound step; of a crystal that had none, the crystal as it was given
    energies: NDArray[np.float64]  # [n_steps + 1] of every step and before the first one, eV
    fmaxs: NDArray[np.float64]  # [n_steps + 1] eV/A
    volume_change: float  # relative to the volume at the start; NaN unless periodic in three directions
    reason: str  # CONVERGED, OUT_OF_STEPS, or why it failed
    functional: str
    energy_correction: str
    path: tuple[Step, ...] = ()  # every step and the crystal before the first one, where asked for

    @property
    def converged(self) -> bool:
        """Whether no force is longer than was asked for."""
        return self.reason == CONVERGED

    @property
    def failed(self) -> bool:
        """Whether the crystal became unsound."""
        return self.reason not in (CONVERGED, OUT_OF_STEPS)

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return max(len(self.energies) - 1, 0)

    @property
    def fmax(self) -> float:
        """Longest force on an atom or a row of the cell, eV/A; NaN where it is not known."""
        return float(self.fmaxs[-1]) if len(self.fmaxs) else math.nan

    @property
    def energy(self) -> float:
        """Total energy, eV."""
        return self.final.energy

    @property
    def positions(self) -> NDArray[np.float64]:
        """Positions, [n, 3] A."""
        return self.final.positions

    @property
    def cell(self) -> NDArray[np.float64]:
        """Lattice vectors, the rows of [3, 3], A."""
        return self.final.cell

    @property
    def forces(self) -> NDArray[np.float64]:
        """Forces, [n, 3] eV/A; of atoms that are held as well."""
        return self.final.forces

    @property
    def stress(self) -> NDArray[np.float64]:
        """Stress, [3, 3] eV/A^3, positive = tension."""
        return self.final.stress

    @property
    def magmoms(self) -> NDArray[np.float64]:
        """Magnetic moments, [n] mu_B."""
        return self.final.magmoms

    def as_atoms(self) -> Atoms:
        """Give the crystal and what is known of it as ASE takes them."""
        return self.final.as_atoms()
