"""The ASE calculator and the public names."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from crystals import CONSERVATIVE, PAIR, benzene, crystals, potential, run

import fastchgnet
from fastchgnet import FastCHGNetCalculator
from fastchgnet.errors import InputError
from fastchgnet.ops.derivatives import feature_derivatives


def test_results_are_the_potentials_in_ase_units() -> None:
    model, atoms = potential(CONSERVATIVE), crystals()[1]
    output = run(model, atoms)
    atoms.calc = FastCHGNetCalculator(model)
    assert atoms.get_potential_energy() == pytest.approx(output.energy.item(), abs=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    # the order of bonds differs, and so does rounding
    np.testing.assert_allclose(atoms.get_forces(), output.forces, atol=1e-12)
    np.testing.assert_allclose(atoms.get_stress(voigt=False), output.stress[0], atol=1e-12)
    np.testing.assert_allclose(atoms.get_magnetic_moments(), output.magmoms, atol=1e-12)
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


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, atoms = potential(CONSERVATIVE), crystals()[0]
    asked: list[bool] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda batch, derivatives: asked.append(derivatives) or forward(batch, derivatives)
    )
    atoms.calc = FastCHGNetCalculator(model)
    energy = atoms.get_potential_energy()
    atoms.get_magnetic_moments()
    assert asked == [False]
    atoms.get_stress()
    atoms.get_forces()
    assert asked == [False, True]
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-12)
    atoms.set_initial_magnetic_moments([1, 2])
    atoms.get_forces()
    assert asked == [False, True]


def test_results_never_belong_to_other_atoms() -> None:
    """Drivers call `calculate` themselves; ASE clears results only in what it calls."""
    model = potential(CONSERVATIVE)
    calc = FastCHGNetCalculator(model)
    first, second, broken = crystals()[0], crystals()[1], crystals()[2]
    broken.positions[0] = np.nan
    calc.calculate(first, ["forces", "stress"])
    calc.calculate(second, ["energy"])
    assert calc.results.keys().isdisjoint({"forces", "stress"})
    second.calc = calc
    np.testing.assert_allclose(second.get_forces(), run(model, second).forces, atol=1e-9)
    with pytest.raises(InputError, match="NaN"):
        calc.calculate(broken, ["forces"])
    assert calc.results == {}


def test_a_model_in_training_can_be_used() -> None:
    model, atoms = potential(CONSERVATIVE), crystals()[0]
    atoms.calc = FastCHGNetCalculator(model)
    expected = run(model, atoms).forces
    model.train()
    np.testing.assert_allclose(atoms.get_forces(), expected, atol=1e-9)


def test_one_calculator_serves_crystals_in_turn() -> None:
    """As a nudged elastic band with a shared one does; neighbours are those of the crystal at hand."""
    model = potential(CONSERVATIVE)
    calc = FastCHGNetCalculator(model)
    for atoms in [*crystals(), *crystals(), benzene()]:
        atoms.calc = calc
        np.testing.assert_allclose(atoms.get_forces(), run(model, atoms).forces, atol=1e-9)


def test_it_is_made_from_plain_values_and_survives_pickling() -> None:
    values = json.loads('{"model": "chgnet-0.3.0", "device": "cpu", "dtype": "float64", "skin": 0.2}')
    atoms = crystals()[0]
    atoms.calc = FastCHGNetCalculator(**values)
    forces = atoms.get_forces()
    again = pickle.loads(pickle.dumps(atoms))
    again.rattle(0.01)
    assert abs(again.get_forces() - forces).max() > 1e-3
    np.testing.assert_array_equal(atoms.get_forces(), forces)


def test_a_direct_model_says_that_its_forces_are_no_derivatives() -> None:
    atoms = crystals()[0]
    with pytest.warns(UserWarning, match="no derivatives of its energy") as said:
        atoms.calc = FastCHGNetCalculator(potential(PAIR))
        atoms.get_forces()
    assert len(said) == 1


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


def test_calculators_in_threads_leave_training_as_it_was() -> None:
    """Threads leave `feature_derivatives` in any order; once, parameters got no gradients from then on."""
    model, atoms = potential(CONSERVATIVE).train(), crystals()[0]

    def trained() -> list[bool]:
        model.zero_grad()
        run(model, atoms).forces.square().sum().backward()
        return [parameter.grad is not None for parameter in model.parameters()]

    before = trained()
    one, other = feature_derivatives(), feature_derivatives()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert trained() == before


def test_forces_are_the_same_in_inference_mode() -> None:
    model, atoms = potential(CONSERVATIVE), crystals()[0]
    expected = run(model, atoms).forces
    with torch.inference_mode():
        atoms.calc = FastCHGNetCalculator(model)
        np.testing.assert_allclose(atoms.get_forces(), expected, atol=1e-12)
        (prediction,) = fastchgnet.predict(model, [atoms])
        np.testing.assert_allclose(prediction.forces, expected, atol=1e-12)
