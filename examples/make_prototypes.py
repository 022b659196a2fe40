"""Generate examples/prototypes.xyz, the example set: crystal prototypes labelled by chgnet-0.3.0.

The labels are predictions of the published CHGNet 0.3.0 and not DFT: the set shows how training works
and is no data to publish a potential from. Run `python examples/make_prototypes.py` to write it anew;
this needs the `chgnet` extra. Geometries depend on nothing but the seed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.neighborlist import neighbor_list
from ase.spacegroup import crystal

SOURCE = "chgnet-0.3.0"
SEED = 0
MAX_STRAIN = 0.06
RATTLE = (0.01, 0.05)  # displacements as parts of the shortest bond, 0.02 to 0.15 A: warm to nearly molten


def rock_salt(sites: list[str], a: float) -> Atoms:
    """Build the conventional cell of 8 atoms."""
    return bulk("".join(sites), "rocksalt", a=a, cubic=True)


def fluorite(sites: list[str], a: float) -> Atoms:
    """Build the conventional cell of 12 atoms; the second site is the one with two atoms."""
    return bulk("".join(sites) + "2", "fluorite", a=a, cubic=True)


def wurtzite(sites: list[str], a: float, c: float) -> Atoms:
    """Build the cell of 4 atoms."""
    return bulk("".join(sites), "wurtzite", a=a, c=c)


def metal(sites: list[str]) -> Atoms:
    """Build 4 atoms of an element in the structure and with the lattice constant that ASE tabulates."""
    atoms = bulk(*sites)
    if atoms.cell.get_bravais_lattice().name in ("FCC", "BCC"):
        atoms = bulk(*sites, cubic=True)
    return atoms if len(atoms) == 4 else atoms.repeat((2, 1, 1))


def heusler(sites: list[str], a: float) -> Atoms:
    """Build the primitive L2_1 cell of 4 atoms; the first site is the one with two atoms."""
    basis = [(0.25, 0.25, 0.25), (0, 0, 0), (0.5, 0.5, 0.5)]
    return crystal(sites, basis, spacegroup=225, cellpar=[a] * 3 + [90] * 3, primitive_cell=True)


def perovskite(sites: list[str], a: float) -> Atoms:
    """Build the cubic cell of 5 atoms."""
    basis = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0)]
    return crystal(sites, basis, spacegroup=221, cellpar=[a] * 3 + [90] * 3)


def spinel(sites: list[str], a: float) -> Atoms:
    """Build the primitive cell of 14 atoms: tetrahedral site, octahedral site, anion."""
    basis = [(0.125, 0.125, 0.125), (0.5, 0.5, 0.5), (0.2625, 0.2625, 0.2625)]
    cellpar = [a] * 3 + [90] * 3
    return crystal(sites, basis, spacegroup=227, setting=2, cellpar=cellpar, primitive_cell=True)


def layered(sites: list[str], a: float, c: float) -> Atoms:
    """Build the primitive R-3m cell of 4 atoms: alkali, transition metal, oxygen 1 A from the metal layer."""
    basis = [(0, 0, 0.5), (0, 0, 0), (0, 0, 1 / 3 - 1.0 / c)]
    cellpar = [a, a, c, 90, 90, 120]
    return crystal(sites, basis, spacegroup=166, cellpar=cellpar, primitive_cell=True)


def olivine(sites: list[str], a: float, b: float, c: float) -> Atoms:
    """Build the Pnma cell of 28 atoms: M1, M2, P or Si, and oxygen on three sites."""
    m1, m2, centre = sites
    basis = {
        (0, 0, 0): m1,
        (0.282, 0.25, 0.975): m2,
        (0.095, 0.25, 0.418): centre,
        (0.097, 0.25, 0.743): "O",
        (0.457, 0.25, 0.206): "O",
        (0.166, 0.047, 0.285): "O",
    }
    return crystal(list(basis.values()), list(basis), spacegroup=62, cellpar=[a, b, c, 90, 90, 90])


# Prototype: builder, strained and rattled frames of each material, and the materials, by the elements on
# their sites, with approximate lattice constants in A. Some are hypothetical in their structure. Few
# elements in many materials, so that training sees every element whatever materials are held out.
PROTOTYPES: dict[str, tuple[Callable[..., Atoms], int, str]] = {
    "rock_salt": (
        rock_salt,
        3,
        "Li-F 4.03, Na-F 4.63, Mg-O 4.21, Ca-O 4.81, Sr-O 5.16, Mn-O 4.45, Fe-O 4.33, Co-O 4.26, "
        "Ni-O 4.18, Ti-N 4.24, V-N 4.14, Cr-N 4.15, Zr-N 4.58, Mg-S 5.2, Ca-S 5.69, Mn-S 5.22",
    ),
    "perovskite": (
        perovskite,
        3,
        "Ca-Ti-O 3.84, Sr-Ti-O 3.91, Ba-Ti-O 4.01, Sr-Zr-O 4.1, Ba-Zr-O 4.19, La-Al-O 3.79, "
        "La-V-O 3.92, La-Cr-O 3.88, La-Mn-O 3.93, La-Fe-O 3.93, La-Co-O 3.83, La-Ni-O 3.84, "
        "Ca-Mn-O 3.73, Sr-Mn-O 3.81, Sr-Fe-O 3.85, Na-Mg-F 3.95",
    ),
    "spinel": (
        spinel,
        3,
        "Mg-Al-O 8.08, Zn-Al-O 8.09, Li-Ti-O 8.4, Mg-V-O 8.42, Mg-Cr-O 8.33, Zn-Cr-O 8.33, "
        "Ni-Cr-O 8.32, Li-Mn-O 8.24, Mn-Fe-O 8.51, Fe-Fe-O 8.4, Co-Fe-O 8.39, Ni-Fe-O 8.34, "
        "Zn-Fe-O 8.44, Co-Co-O 8.08",
    ),
    "layered_oxide": (
        layered,
        4,
        "Li-Al-O 2.8 14.2, Li-V-O 2.84 14.7, Li-Cr-O 2.9 14.4, Li-Mn-O 2.87 14.3, Li-Co-O 2.82 14.1, "
        "Li-Ni-O 2.88 14.2, Na-Ti-O 3.03 16.2, Na-Cr-O 2.97 16, Na-Mn-O 2.94 15.9, Na-Fe-O 3.02 16.1, "
        "Na-Co-O 2.89 15.6, Na-Ni-O 2.96 15.8",
    ),
    "olivine": (
        olivine,
        2,
        "Li-Mg-P 10.14 5.9 4.69, Li-Mn-P 10.43 6.1 4.74, Li-Fe-P 10.33 6.01 4.69, "
        "Li-Co-P 10.2 5.92 4.7, Li-Ni-P 10.03 5.85 4.68, Na-Fe-P 10.41 6.22 4.95, "
        "Na-Mn-P 10.52 6.31 4.99, Mg-Mg-Si 10.2 5.98 4.76, Mn-Mn-Si 10.6 6.26 4.9, "
        "Fe-Fe-Si 10.48 6.09 4.82, Co-Co-Si 10.3 6 4.78",
    ),
    "fluorite": (
        fluorite,
        3,
        "Ca-F 5.46, Sr-F 5.8, Ba-F 6.2, Zr-O 5.09, O-Li 4.62, O-Na 5.55, S-Li 5.71, S-Na 6.54, "
        "Si-Mg 6.35, Co-Si 5.36, Ni-Si 5.41",
    ),
    "wurtzite": (
        wurtzite,
        5,
        "Mg-O 3.28 5.1, Mn-O 3.37 5.3, Co-O 3.21 5.24, Zn-O 3.25 5.21, Mg-S 3.97 6.45, "
        "Mn-S 3.98 6.44, Zn-S 3.82 6.26, Al-N 3.11 4.98",
    ),
    "heusler": (
        heusler,
        3,
        "Fe-V-Al 5.76, Fe-Ti-Al 5.88, Fe-Cr-Al 5.79, Fe-Mn-Si 5.66, Co-Ti-Al 5.85, Co-V-Al 5.77, "
        "Co-Cr-Al 5.73, Co-Mn-Al 5.75, Co-Mn-Si 5.65, Co-Fe-Al 5.73, Co-Fe-Si 5.64, Ni-Ti-Al 5.86, "
        "Ni-Mn-Al 5.82, Mn-V-Al 5.92",
    ),
    "metal": (
        metal,
        3,
        "Li, Na, Mg, Al, Ca, Ti, V, Cr, Fe, Co, Ni, Zn, Sr, Zr, Ba",
    ),
}


def disturb(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """Strain the cell by up to 6 % and move every atom; positions keep the digits that the file holds."""
    shortest_bond = neighbor_list("d", atoms, cutoff=5.0).min()
    strain = rng.uniform(-MAX_STRAIN, MAX_STRAIN, (3, 3))
    moved = atoms.copy()
    moved.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    moved.positions += rng.normal(scale=rng.uniform(*RATTLE) * shortest_bond, size=moved.positions.shape)
    moved.positions = moved.positions.round(8)
    return moved


def geometries(seed: int = SEED) -> list[Atoms]:
    """Build all frames without labels; a frame depends on the seed and its place in the list only."""
    frames: list[Atoms] = []
    for name, (build, n_frames, materials) in PROTOTYPES.items():
        for material in materials.split(", "):
            sites, *lattice = material.split()
            ideal = build(sites.split("-"), *map(float, lattice))
            for _ in range(n_frames):
                atoms = disturb(
                    Atoms(ideal.numbers, ideal.positions, cell=ideal.cell, pbc=True),
                    np.random.default_rng([seed, len(frames)]),
                )
                group = atoms.symbols.formula.reduce()[0].format("metal")
                atoms.info = {"config_type": name, "group": group, "source": SOURCE}
                frames.append(atoms)
    return frames


def label(frames: list[Atoms]) -> None:
    """Attach energy (eV, with the MP2020 correction), forces, stress and magnetic moments of chgnet-0.3.0."""
    from ase.units import GPa
    from chgnet.model import CHGNet
    from pymatgen.io.ase import AseAtomsAdaptor

    model = CHGNet.load(model_name="0.3.0", use_device="cpu", verbose=False)
    for atoms in frames:
        prediction = model.predict_structure(AseAtomsAdaptor.get_structure(atoms))
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=float(prediction["e"]) * len(atoms),
            forces=prediction["f"],
            stress=prediction["s"] * GPa,
            magmoms=prediction["m"],
        )


def main() -> None:
    """Write the set beside its place, then put it there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("prototypes.xyz"))
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    frames = geometries(arguments.seed)
    label(frames)
    beside = arguments.out.with_suffix(".partial")
    write(beside, frames, format="extxyz")
    os.replace(beside, arguments.out)


if __name__ == "__main__":
    main()
