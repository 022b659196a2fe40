"""Labelled frames that the tests of readers and store use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from fastchgnet.data.frame import Frame, reduced_formula


def labelled_atoms(n_frames: int, seed: int = 0) -> list[Atoms]:
    """Rattled crystals of one to eight atoms with made-up labels of all four kinds."""
    rng = np.random.default_rng(seed)
    cells = [
        bulk("Cu"),
        bulk("NaCl", "rocksalt", a=5.6),
        bulk("NaCl", "rocksalt", a=5.6, cubic=True),
        bulk("ZnO", "wurtzite", a=3.25, c=5.2),
    ]
    frames = []
    for index in range(n_frames):
        atoms = cells[index % len(cells)].copy()
        atoms.rattle(0.05, rng=rng)
        stress = rng.normal(size=6) * 0.01
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=float(rng.normal() - 3 * len(atoms)),
            forces=rng.normal(size=(len(atoms), 3)),
            stress=stress,
            magmoms=rng.normal(size=len(atoms)),
        )
        atoms.info["config_type"] = ("bulk", "hot")[index % 2]
        frames.append(atoms)
    return frames


def labelled_frames(n_frames: int, seed: int = 0) -> Iterator[Frame]:
    """The same as frames, two of each material; every fifth without magmoms."""
    for index, atoms in enumerate(labelled_atoms(n_frames, seed)):
        results = atoms.calc.results
        frame = Frame(
            numbers=atoms.numbers.astype(np.int64),
            positions=atoms.positions,
            cell=atoms.cell.array,
            pbc=atoms.pbc,
            source=f"made.xyz:{index}",
            group=f"{reduced_formula(atoms.numbers)}-{index // 2}",
            config_type=atoms.info["config_type"],
            energy=results["energy"],
            forces=results["forces"],
            stress=results["stress"][[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3),
            magmoms=results["magmoms"],
        )
        yield frame if index % 5 else replace(frame, magmoms=None)
