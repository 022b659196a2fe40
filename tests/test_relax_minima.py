"""Minima of rattled crystals: relaxed together here, and one after the other by ASE."""

from __future__ import annotations

from pathlib import Path

import ase.io
import pytest
from ase import Atoms
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from crystals import rattled

import fastchgnet
from fastchgnet.sim.calculator import FastCHGNetCalculator
from fastchgnet.sim.relax import relax
from fastchgnet.sim.relax.result import Settings

PROTOTYPES = Path(__file__).parents[1] / "examples" / "prototypes.xyz"
ELEMENTS = ["Li", "Na", "Mg", "Al", "Si", "K", "Ca", "Ti", "V", "Cr", "Fe", "Co", "Ni", "Cu", "Zn", "Ge"]
BINARIES = [("NaCl", "rocksalt", 5.64), ("MgO", "rocksalt", 4.21), ("GaAs", "zincblende", 5.65)]


def fifty() -> list[Atoms]:
    """Strain and rattle crystals of many kinds."""
    known = ase.io.read(PROTOTYPES, ":")
    chosen = [known[place] for place in range(0, len(known), len(known) // 31 + 1)]
    built = [bulk(symbol, cubic=symbol in ("Fe", "Al", "Si")) for symbol in ELEMENTS]
    built += [bulk(formula, kind, a=a, cubic=True) for formula, kind, a in BINARIES]
    every = [*chosen, *built]
    return [rattled(atoms, 0.05, seed) for seed, atoms in enumerate(every)]


@pytest.mark.slow
def test_fifty_minima_are_those_of_ase() -> None:
    structures = fifty()
    assert len(structures) >= 50
    potential = fastchgnet.load("chgnet-0.3.0")
    calculator = FastCHGNetCalculator(potential)
    for atoms, relaxed in zip(structures, relax(potential, structures, Settings(fmax=0.02)), strict=True):
        one = atoms.copy()
        one.calc = calculator
        assert FIRE(FrechetCellFilter(one), logfile=None).run(fmax=0.02, steps=500)
        assert relaxed.converged
        # far above what fp32 does to either path, far below what would matter
        assert relaxed.energy == pytest.approx(one.get_potential_energy(), abs=1e-3 * len(one))
        assert relaxed.final.volume == pytest.approx(one.get_volume(), rel=5e-3)
