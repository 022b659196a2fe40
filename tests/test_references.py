"""Reference energies: exact where the crystals determine them, honest where they do not."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from ase import Atoms

from fastchgnet.errors import InputError
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.references import fit_references

ENERGIES = {"H": -3.5, "O": -5.25, "Na": -1.25, "Cl": -1.875, "Fe": -8.5}


def chunk(formulas: list[str]) -> tuple:
    crystals = [Atoms(formula) for formula in formulas]
    energy = [sum(ENERGIES[symbol] for symbol in atoms.symbols) for atoms in crystals]
    return systems_from_atoms(crystals), torch.tensor(energy, dtype=torch.float64)


def value(references: torch.Tensor, symbol: str) -> float:
    return references[Atoms(symbol).numbers[0] - 1].item()


def test_recovers_energies_that_are_determined(caplog: pytest.LogCaptureFixture) -> None:
    fitted = fit_references([chunk(["H2O", "OH", "FeO"]), chunk(["Fe", "Fe2O3", "H2"])])
    # A well-conditioned problem in float64.
    assert all(value(fitted.energies, s) == pytest.approx(ENERGIES[s], rel=1e-12) for s in ("H", "O", "Fe"))
    assert value(fitted.energies, "Na") == 0 and "Na" in fitted.absent and len(fitted.absent) == 91
    assert fitted.inseparable == () and not caplog.records


def test_chunks_do_not_matter() -> None:
    generator = np.random.default_rng(0)
    formulas = [f"H{a}O{b}Fe{c}" for a, b, c in generator.integers(1, 9, (50, 3))]
    systems, energy = chunk(formulas)
    noisy = energy + torch.from_numpy(generator.normal(size=50))
    whole = fit_references([(systems, noisy)])
    parts = [(chunk(formulas[i : i + 7])[0], noisy[i : i + 7]) for i in range(0, 50, 7)]
    torch.testing.assert_close(fit_references(parts).energies, whole.energies, rtol=1e-11, atol=1e-11)
    rows = np.array([[Atoms(f).symbols.count(s) for s in ("H", "O", "Fe")] for f in formulas], dtype=float)
    n_atoms = rows.sum(1)
    expected = np.linalg.lstsq(rows / n_atoms[:, None], noisy.numpy() / n_atoms, rcond=None)[0]
    found = [value(whole.energies, symbol) for symbol in ("H", "O", "Fe")]
    assert found == pytest.approx(expected, rel=1e-11)


def test_elements_that_always_occur_together_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fitted = fit_references([chunk(["NaCl", "Na2Cl2", "NaClO", "O2", "Fe"])])
    assert fitted.inseparable == (("Na", "Cl"),)
    assert "Na, Cl" in caplog.text
    # Of all pairs with the right sum the shortest: equal halves. The others are exact.
    half = (ENERGIES["Na"] + ENERGIES["Cl"]) / 2
    assert value(fitted.energies, "Na") == pytest.approx(half, rel=1e-12)
    assert value(fitted.energies, "Cl") == pytest.approx(half, rel=1e-12)
    assert value(fitted.energies, "O") == pytest.approx(ENERGIES["O"], rel=1e-12)


def test_fewer_crystals_than_elements() -> None:
    fitted = fit_references([chunk(["H2O", "NaCl"])])
    assert fitted.inseparable == (("H", "O"), ("Na", "Cl"))


def test_crystals_without_energy_are_left_out() -> None:
    systems, energy = chunk(["H2", "Fe"])
    energy[1] = float("nan")
    fitted = fit_references([(systems, energy)])
    assert value(fitted.energies, "H") == pytest.approx(ENERGIES["H"], rel=1e-12)
    assert "Fe" in fitted.absent
    energy[0] = float("nan")
    with pytest.raises(InputError, match="no crystal has an energy"):
        fit_references([(systems, energy)])
