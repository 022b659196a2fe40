"""chgnet's equation of state: relaxed energies over volumes, fitted by Birch and Murnaghan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.optimize.optimize import Optimizer

from fastchgnet.compat.calculator import OnIsolatedAtoms
from fastchgnet.compat.model import CHGNet
from fastchgnet.compat.relaxation import StructOptimizer
from fastchgnet.compat.structures import require_pymatgen, to_structure
from fastchgnet.errors import InputError
from fastchgnet.units import GPA

if TYPE_CHECKING:
    from pymatgen.core import Structure

LEAST_POINTS = 4
"""As many as the fit has parameters."""

LARGEST_STRAIN = 0.1
"""Of each lattice vector, either way."""


class EquationOfState:
    """Fit a bulk modulus.

    Args:
        model: as for StructOptimizer, like all others.
        optimizer_class: see there.
        use_device: see there.
        stress_weight: see there.
        on_isolated_atoms: see there; here they are errors unless said otherwise.
    """

    def __init__(
        self,
        model: CHGNet | Calculator | None = None,
        optimizer_class: type[Optimizer] | str = "FIRE",
        use_device: str | None = None,
        stress_weight: float = GPA,
        on_isolated_atoms: OnIsolatedAtoms = "error",
    ) -> None:
        self.relaxer = StructOptimizer(model, optimizer_class, use_device, stress_weight, on_isolated_atoms)
        self.bm: Any = None

    @property
    def fitted(self) -> bool:
        """Whether there is a fit."""
        return self.bm is not None

    def fit(
        self,
        atoms: Structure | Atoms,
        *,
        n_points: int = 11,
        fmax: float = 0.1,
        steps: int = 500,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        """Relax the primitive cell, then its atoms at each volume, and fit.

        Args:
            atoms: the crystal; it is left alone.
            n_points: volumes.
            fmax: as in StructOptimizer.relax, like the arguments below.
            steps: see there.
            verbose: see there.
            kwargs: see there.

        Raises:
            InputError: no pymatgen, too few volumes, or atoms that no crystal has.
            EOSError: pymatgen finds no fit.
        """
        require_pymatgen()
        if n_points < LEAST_POINTS:
            raise InputError(f"n_points={n_points}: the fit has {LEAST_POINTS} parameters")
        from pymatgen.analysis.eos import BirchMurnaghan

        options = {"fmax": fmax, "steps": steps, "verbose": verbose, **kwargs}
        primitive = to_structure(atoms).get_primitive_structure()
        relaxed = self.relaxer.relax(primitive, relax_cell=True, **options)["final_structure"]
        volumes, energies = [], []
        for strain in np.linspace(-LARGEST_STRAIN, LARGEST_STRAIN, n_points):
            strained = relaxed.copy()
            strained.scale_lattice(relaxed.volume * (1 + strain) ** 3)
            result = self.relaxer.relax(strained, relax_cell=False, **options)
            volumes.append(result["final_structure"].volume)
            energies.append(result["trajectory"].energies[-1])
        fit = BirchMurnaghan(volumes=volumes, energies=energies)
        fit.fit()
        self.bm = fit

    def get_bulk_modulus(self, unit: Literal["eV/A^3", "GPa"] = "eV/A^3") -> float:
        """Return the bulk modulus of the fit.

        Raises:
            InputError: there is no fit, or another unit is asked for.
        """
        return _choose({"eV/A^3": lambda: self._fit().b0, "GPa": lambda: self._fit().b0_GPa}, unit)

    def get_compressibility(self, unit: Literal["A^3/eV", "GPa^-1", "Pa^-1", "m^2/N"] = "A^3/eV") -> float:
        """Return the inverse of the bulk modulus.

        Raises:
            InputError: there is no fit, or another unit is asked for.
        """
        per_pascal = {unit: lambda: 1 / (self._fit().b0_GPa * 1e9) for unit in ("Pa^-1", "m^2/N")}
        others = {"A^3/eV": lambda: 1 / self._fit().b0, "GPa^-1": lambda: 1 / self._fit().b0_GPa}
        return _choose(others | per_pascal, unit)

    def _fit(self) -> Any:
        if self.bm is None:
            raise InputError("Equation of state needs to be fitted first through fit()")
        return self.bm


def _choose(values: dict[str, Any], unit: str) -> float:
    """Return the value in one of the units."""
    if unit not in values:
        raise InputError(f"unit={unit!r}: choose from {list(values)}")
    return float(values[unit]())
