"""The ASE calculator and the public names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from crystals import CONSERVATIVE, benzene, crystals, potential, run

import fastchgnet
from fastchgnet import FastCHGNetCalculator
from fastchgnet.errors import InputError


def test_results_are_the_potentials_in_ase_units() -> None:
    model, atoms = potential(CONSERVATIVE), crystals()[1]
    output = run(model, atoms)
    atoms.calc = FastCHGNetCalculator(model)
    assert atoms.get_potential_energy() == output.energy.item()
    assert atoms.get_potential_energy(force_consistent=True) == output.energy.item()
    np.testing.assert_array_equal(atoms.get_forces(), output.forces)
    np.testing.assert_allclose(atoms.get_stress(voigt=False), output.stress[0], atol=1e-12)
    np.testing.assert_array_equal(atoms.get_magnetic_moments(), output.magmoms)
    assert atoms.get_potential_energies().sum() == pytest.approx(output.energy.item())


def test_ase_finds_the_same_derivatives() -> None:
    atoms = crystals()[0]
    atoms.calc = FastCHGNetCalculator(potential(CONSERVATIVE))
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-4), atol=1e-6)
    np.testing.assert_allclose(atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-5), atol=1e-6)


def test_no_stress_without_three_periodic_directions() -> None:
    atoms = benzene()
    atoms.calc = FastCHGNetCalculator(potential(CONSERVATIVE))
    assert np.isfinite(atoms.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


@pytest.mark.parametrize(
    ("position", "reason"),
    [(np.nan, "positions contain NaN"), (0.1, "overlap"), (1e6, "more than 10000 A apart")],
)
def test_an_exploded_simulation_ends_in_an_error(position: float, reason: str) -> None:
    """At 1e6 A vesin would end the process by a division by zero; at 0 A the energy would be NaN."""
    atoms = Atoms("H2", [[0, 0, 0], [position, 0, 0]])
    atoms.calc = FastCHGNetCalculator(potential(CONSERVATIVE))
    with pytest.raises(InputError, match=reason):
        atoms.get_potential_energy()


def test_global_state_is_left_alone() -> None:
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    atoms = crystals()[0]
    atoms.calc = FastCHGNetCalculator(potential(CONSERVATIVE))
    atoms.get_forces()
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (dtype, grad)


def test_public_names() -> None:
    for name in fastchgnet.__all__:
        assert getattr(fastchgnet, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastchgnet.nothing
