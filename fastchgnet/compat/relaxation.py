"""chgnet's relaxation of one structure, on ASE's optimizers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.filters
import ase.optimize
import ase.optimize.sciopt
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.filters import Filter
from ase.optimize.optimize import Optimizer
from numpy.typing import NDArray

from fastchgnet.compat.calculator import CHGNetCalculator, OnIsolatedAtoms
from fastchgnet.compat.model import CHGNet
from fastchgnet.compat.structures import require_cell, require_pymatgen, to_atoms, to_structure
from fastchgnet.errors import InputError
from fastchgnet.files import write_atomically
from fastchgnet.units import GPA

if TYPE_CHECKING:
    from pymatgen.core import Structure

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "FIRE": ase.optimize.FIRE,
    "BFGS": ase.optimize.BFGS,
    "LBFGS": ase.optimize.LBFGS,
    "LBFGSLineSearch": ase.optimize.LBFGSLineSearch,
    "MDMin": ase.optimize.MDMin,
    "SciPyFminCG": ase.optimize.sciopt.SciPyFminCG,
    "SciPyFminBFGS": ase.optimize.sciopt.SciPyFminBFGS,
    "BFGSLineSearch": ase.optimize.BFGSLineSearch,
}


class StructOptimizer:
    """Relax structures one at a time; `fastchgnet relax` does many at once.

    Args:
        model: None for the published 0.3.0; a calculator is used as it is.
        optimizer_class: one of ASE, or its name.
        use_device: as in CHGNetCalculator, like the arguments below.
        stress_weight: see there.
        on_isolated_atoms: see there.
    """

    def __init__(
        self,
        model: CHGNet | Calculator | None = None,
        optimizer_class: type[Optimizer] | str = "FIRE",
        use_device: str | None = None,
        stress_weight: float = GPA,
        on_isolated_atoms: OnIsolatedAtoms = "warn",
    ) -> None:
        if isinstance(optimizer_class, str) and optimizer_class not in OPTIMIZERS:
            raise InputError(f"optimizer_class={optimizer_class!r}: choose from {list(OPTIMIZERS)}")
        self.optimizer_class: Any = OPTIMIZERS.get(str(optimizer_class), optimizer_class)
        self.calculator: Any = model
        if not isinstance(model, Calculator):
            self.calculator = CHGNetCalculator(
                model, use_device=use_device, stress_weight=stress_weight, on_isolated_atoms=on_isolated_atoms
            )

    @property
    def version(self) -> str | None:
        """Version of the published model."""
        return self.calculator.version

    @property
    def n_params(self) -> int:
        """Number of parameters, as chgnet counts."""
        return self.calculator.n_params

    def relax(
        self,
        atoms: Structure | Atoms,
        *,
        fmax: float = 0.1,
        steps: int = 500,
        relax_cell: bool = True,
        ase_filter: str | type[Filter] = "FrechetCellFilter",
        save_path: str | None = None,
        loginterval: int = 1,
        crystal_feas_save_path: str | None = None,
        verbose: bool = True,
        assign_magmoms: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Relax until no force is larger than fmax.

        Args:
            atoms: ase Atoms are moved in place and get the calculator.
            fmax: eV/A.
            steps: at most.
            relax_cell: whether the cell moves too.
            ase_filter: one of `ase.filters`, or its name: how it moves.
            save_path: pickle of the trajectory to write, as chgnet does.
            loginterval: steps between frames of the trajectory.
            crystal_feas_save_path: pickle of the crystals' features to write.
            verbose: whether ASE prints its table of steps.
            assign_magmoms: whether the final structure has the property `magmom`, and no other.
            kwargs: for the optimizer.

        Returns:
            `final_structure`, of pymatgen, and `trajectory`, a TrajectoryObserver.

        Raises:
            InputError: an unknown filter, no pymatgen, or atoms that no crystal has.
        """
        require_pymatgen()
        cell_filter = _filter(ase_filter)
        moving = to_atoms(atoms)
        if relax_cell and not moving.pbc.all():
            raise InputError("relax_cell=True needs a crystal that is periodic in three directions")
        require_cell(moving, "final_structure")
        moving.calc = self.calculator
        observers: list[tuple[Any, str | None]] = [(TrajectoryObserver(moving), save_path)]
        if crystal_feas_save_path:
            observers.append((CrystalFeasObserver(moving), crystal_feas_save_path))
        kwargs.setdefault("logfile", "-" if verbose else None)
        optimizer = self.optimizer_class(cell_filter(moving) if relax_cell else moving, **kwargs)
        for observer, _ in observers:
            optimizer.attach(observer, interval=loginterval)
        optimizer.run(fmax=fmax, steps=steps)
        trajectory = observers[0][0]
        trajectory()
        for observer, path in observers:
            if path:
                observer.save(path)
        return {"final_structure": _final(moving, assign_magmoms), "trajectory": trajectory}


def _filter(name: str | type[Filter]) -> type[Filter]:
    """Find a filter of ASE by its name."""
    if not isinstance(name, str):
        return name
    found = getattr(ase.filters, name, None)
    if not (isinstance(found, type) and issubclass(found, Filter)):
        raise InputError(f"ase_filter={name!r}: not a filter of ase.filters")
    return found


def _final(atoms: Atoms, assign_magmoms: bool) -> Structure:
    """Turn relaxed atoms into a structure."""
    structure = to_structure(atoms)
    if assign_magmoms:
        for key in list(structure.site_properties):
            structure.remove_site_property(key)
        structure.add_site_property("magmom", atoms.get_magnetic_moments().tolist())
    return structure


class TrajectoryObserver:
    """What happened to some atoms, a frame for each call."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.energies: list[float] = []  # total, eV
        self.forces: list[NDArray[np.floating]] = []  # [n, 3] eV/A
        self.stresses: list[NDArray[np.floating]] = []  # [6] Voigt, eV/A^3; NaN without 3 periodic directions
        self.magmoms: list[NDArray[np.floating]] = []  # [n] mu_B
        self.atom_positions: list[NDArray[np.floating]] = []  # [n, 3] A
        self.cells: list[NDArray[np.floating]] = []  # [3, 3] A

    def __call__(self) -> None:
        """Add a frame."""
        self.energies.append(self.compute_energy())
        self.forces.append(self.atoms.get_forces())
        is_crystal = self.atoms.pbc.all()
        self.stresses.append(self.atoms.get_stress() if is_crystal else np.full(6, np.nan))
        self.magmoms.append(self.atoms.get_magnetic_moments())
        self.atom_positions.append(self.atoms.get_positions())
        self.cells.append(self.atoms.get_cell()[:])

    def __len__(self) -> int:
        """Count frames."""
        return len(self.energies)

    def compute_energy(self) -> float:
        """Return the total energy, eV."""
        return self.atoms.get_potential_energy()

    def save(self, filename: str) -> None:
        """Write a pickle with chgnet's keys, whole or not at all."""
        frames = {
            "energy": self.energies,
            "forces": self.forces,
            "stresses": self.stresses,
            "magmoms": self.magmoms,
            "atom_positions": self.atom_positions,
            "cell": self.cells,
            "atomic_number": self.atoms.get_atomic_numbers(),
        }
        write_atomically(Path(filename), pickle.dumps(frames))


class CrystalFeasObserver:
    """Features of a crystal, [64] for each call; each costs one more prediction."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.crystal_feature_vectors: list[NDArray[np.float32]] = []

    def __call__(self) -> None:
        """Add the features of the present geometry."""
        calculator = self.atoms.calc
        if not isinstance(calculator, CHGNetCalculator):
            raise InputError("features of crystals need a CHGNetCalculator of fastchgnet.compat")
        answer = calculator.model.predict_structure(self.atoms, task="e", return_crystal_feas=True)
        assert isinstance(answer, dict)
        self.crystal_feature_vectors.append(answer["crystal_fea"])

    def __len__(self) -> int:
        """Count calls."""
        return len(self.crystal_feature_vectors)

    def save(self, filename: str) -> None:
        """Write a pickle with chgnet's key, whole or not at all."""
        write_atomically(Path(filename), pickle.dumps({"crystal_feas": self.crystal_feature_vectors}))
