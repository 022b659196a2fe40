"""Atoms that relaxation must not move: ASE's FixAtoms, and pymatgen's selective dynamics."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastchgnet.data.formats import detect_format
from fastchgnet.data.layout import printable
from fastchgnet.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure


def fixed_atoms(structure: Atoms | Structure, source: str) -> NDArray[np.bool_]:
    """Tell which atoms are held, [n].

    Raises:
        InputError: there is a constraint that does not hold whole atoms; names `source`.
    """
    if hasattr(structure, "constraints"):
        return _fixed_by_ase(structure, source)
    movable = structure.site_properties.get("selective_dynamics")
    if movable is None:
        return np.zeros(len(structure), bool)
    held = ~np.array([[True] * 3 if site is None else site for site in movable], dtype=bool)
    if (held.any(1) != held.all(1)).any():
        raise InputError(f"{source}: selective dynamics hold an atom in some directions only")
    return held[:, 0]


def _fixed_by_ase(atoms: Any, source: str) -> NDArray[np.bool_]:
    from ase.constraints import FixAtoms

    fixed = np.zeros(len(atoms), bool)
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise InputError(
                f"{source}: of ASE's constraints only FixAtoms is known, not {_name(constraint)}"
            )
        fixed[constraint.get_indices()] = True
    return fixed


def _name(constraint: object) -> str:
    return type(constraint).__name__


def fixed_in_files(
    paths: Iterable[Path],
) -> Iterator[tuple[tuple[str, int], NDArray[np.bool_] | InputError]]:
    """Yield the file and the frame that have constraints, and which atoms they hold, [n], or why not."""
    for path in paths:
        if not _may_hold_atoms(path):
            continue
        from ase.io import iread

        frames = enumerate(iread(str(path), index=":", do_not_split_by_at_sign=True))
        while True:
            try:
                index, atoms = next(frames)
            except StopIteration:
                break
            except Exception:  # of any kind, from ASE's parsers; reading the crystals has reported it
                break
            if not atoms.constraints:
                continue
            key = (printable(path), index)
            try:
                yield key, _fixed_by_ase(atoms, f"{key[0]}:{index}")
            except InputError as error:
                yield key, error


def _may_hold_atoms(path: Path) -> bool:
    """Tell whether a file is of a kind that has constraints."""
    if ".cif" in path.suffixes:
        return False
    try:
        kind = detect_format(path)
        if kind == "extxyz" and path.suffix != ".gz":
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(b"move_mask") >= 0
    except (InputError, OSError, ValueError):  # an empty file cannot be mapped
        return False
    return kind in ("ase", "extxyz", "vasp")
