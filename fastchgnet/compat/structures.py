"""pymatgen's structures, which chgnet gives and takes; optional here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ase import Atoms

from fastchgnet.errors import InputError

if TYPE_CHECKING:
    from pymatgen.core import Structure

NEEDS_PYMATGEN = "structures as chgnet gives them need pymatgen: pip install 'fastchgnet[pymatgen]'"


def require_pymatgen() -> None:
    """Raise InputError where pymatgen is not installed."""
    try:
        import pymatgen.core  # noqa: F401
    except ImportError as error:
        raise InputError(NEEDS_PYMATGEN) from error


def require_cell(atoms: Atoms, what: str) -> None:
    """Raise InputError where atoms lack a lattice vector; `what` needs all three."""
    if atoms.cell.rank < 3:
        raise InputError(f"{what} needs three lattice vectors: give the atoms a box, as by atoms.center(5.0)")


def to_atoms(structure: Any) -> Atoms:
    """Turn a pymatgen Structure or Molecule into ase Atoms; Atoms stay the same object."""
    if isinstance(structure, Atoms):
        return structure
    if not hasattr(structure, "sites"):
        raise InputError(f"neither ase Atoms nor a pymatgen Structure: {type(structure)}")
    require_pymatgen()
    from pymatgen.io.ase import AseAtomsAdaptor

    return AseAtomsAdaptor.get_atoms(structure)


def to_structure(atoms: Any) -> Structure:
    """Turn ase Atoms into a pymatgen Structure; a Structure stays the same object."""
    if not isinstance(atoms, Atoms):
        return atoms
    require_pymatgen()
    require_cell(atoms, "a pymatgen Structure")
    from pymatgen.io.ase import AseAtomsAdaptor

    if atoms.calc is not None and atoms.calc.check_state(atoms):
        atoms = atoms.copy()  # pymatgen would take the magnetic moments of other atoms from the calculator
    return AseAtomsAdaptor.get_structure(atoms)
