"""The model interface of TorchSim, judged by torch-sim's own checks and run by its own drivers."""

from __future__ import annotations

import pytest
import torch
import torch_sim as ts
from ase.build import bulk
from crystals import CONSERVATIVE, PAIR, crystals, potential, rattled
from torch_sim.models.interface import validate_model_outputs
from torch_sim.testing import SIMSTATE_GENERATORS, assert_model_calculator_consistency

import fastchgnet
from fastchgnet import FastCHGNetCalculator
from fastchgnet.sim.moving import MovingSystems, Unsound
from fastchgnet.sim.torchsim import FastCHGNetModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def published() -> fastchgnet.Potential:
    return fastchgnet.load("chgnet-0.3.0", device="cpu", dtype="float64")


def state_of(atoms, dtype: torch.dtype = torch.float64) -> ts.SimState:
    return ts.io.atoms_to_state(atoms, CPU, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_passes_torch_sims_validation(dtype) -> None:
    model = FastCHGNetModel("chgnet-0.3.0", device="cpu", dtype=dtype)
    validate_model_outputs(model, CPU, model.dtype)


@pytest.mark.filterwarnings("ignore:the forces of a model with a direct readout")
def test_direct_models_pass_too() -> None:
    validate_model_outputs(FastCHGNetModel(potential(PAIR)), CPU, torch.float64)


@pytest.mark.parametrize("name", SIMSTATE_GENERATORS)
def test_agrees_with_the_calculator(name, published) -> None:
    state = SIMSTATE_GENERATORS[name](CPU, torch.float64)
    model = FastCHGNetModel(published)
    model.compute_stress = bool(state.pbc.all())  # ASE has no stress of molecules
    assert_model_calculator_consistency(model, FastCHGNetCalculator(published), state)


def test_magmoms_are_the_potentials() -> None:
    model = potential(CONSERVATIVE)
    atoms = crystals()
    output = FastCHGNetModel(model)(state_of(atoms))
    expected = [prediction.magmoms for prediction in fastchgnet.predict(model, atoms)]
    assert output["magmoms"].numpy() == pytest.approx([m for one in expected for m in one], abs=1e-12)


def test_computes_what_is_switched_on() -> None:
    model = FastCHGNetModel(potential(CONSERVATIVE))
    state = state_of(crystals())
    model.compute_stress = False
    assert set(model(state)) == {"energy", "magmoms", "forces"}
    model.compute_forces = False
    assert set(model(state)) == {"energy", "magmoms"}


def test_slabs_and_molecules_have_no_stress() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.center(vacuum=5, axis=2)
    atoms.pbc = (True, True, False)
    output = FastCHGNetModel(potential(CONSERVATIVE))(state_of(atoms))
    assert output["stress"].isnan().all()
    assert output["forces"].isfinite().all()


def test_neighbours_are_kept_until_members_change(monkeypatch) -> None:
    made = []

    class Counted(MovingSystems):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("fastchgnet.sim.torchsim.MovingSystems", Counted)
    model = FastCHGNetModel(potential(CONSERVATIVE))
    state = state_of(crystals())
    first = model(state)
    moved = state.clone()
    moved.positions += 0.01
    model(moved)
    assert len(made) == 1
    part = state[[2, 0]]
    output = model(part)
    assert len(made) == 2
    torch.testing.assert_close(output["energy"], first["energy"][[2, 0]], rtol=0, atol=1e-10)
    part.atomic_numbers[0] += 1  # in place, as a Monte Carlo swap
    assert (model(part)["energy"][0] - output["energy"][0]).abs() > 1e-3
    assert len(made) == 3


def test_names_systems_that_are_no_crystals() -> None:
    state = state_of([bulk("Fe"), bulk("NaCl", "rocksalt", a=5.64)])
    state.positions[2] = state.positions[1] + 0.1
    with pytest.raises(Unsound, match="structure 1: "):
        FastCHGNetModel(potential(CONSERVATIVE))(state)


def test_nve_conserves_energy(published) -> None:
    atoms = [rattled(bulk("NaCl", "rocksalt", a=5.64, cubic=True), 0.02), bulk("Si", cubic=True)]
    model = FastCHGNetModel(published)
    totals, potentials = [], []

    def step(state, model, **settings):
        state = ts.nve_step(state, model, **settings)
        kinetic = ts.calc_kinetic_energy(
            masses=state.masses, momenta=state.momenta, system_idx=state.system_idx
        )
        potentials.append(state.energy)
        totals.append(state.energy + kinetic)
        return state

    final = ts.integrate(
        atoms, model, integrator=(ts.nve_init, step), n_steps=25, temperature=300.0, timestep=0.001
    )
    assert (torch.stack(potentials) - potentials[0]).abs().max(0).values.min() > 0.05
    # velocity Verlet's total oscillates by (time step * frequency)^2, 1e-2, of what is exchanged
    assert (torch.stack(totals) - totals[0]).abs().max() < 3e-3
    assert final.magmoms.shape == (16,)


def test_fire_relaxes_crystals_and_cells(published) -> None:
    atoms = [rattled(bulk("NaCl", "rocksalt", a=5.8)), rattled(bulk("MgO", "rocksalt", a=4.3), seed=1)]
    final = ts.optimize(
        atoms,
        FastCHGNetModel(published),
        optimizer=ts.Optimizer.fire,
        convergence_fn=ts.generate_force_convergence_fn(0.01, include_cell_forces=True),
        init_kwargs={"cell_filter": ts.CellFilter.frechet},
        max_steps=500,
    )
    assert ts.system_wise_max_force(final).max() < 0.01
    for relaxed, start in zip(final.to_atoms(), atoms, strict=True):
        relaxed.calc = start.calc = FastCHGNetCalculator(published)
        # the force on a cell is its stress times the volume of an atom
        assert abs(relaxed.get_stress()).max() * relaxed.get_volume() < 0.011 * len(relaxed)
        assert relaxed.get_potential_energy() < start.get_potential_energy()


@pytest.mark.parametrize("n_edges", [200, 1000])
def test_batchers_give_the_same_as_one_batch(published, n_edges) -> None:
    atoms = [
        rattled(one, 0.02, seed) for seed, one in enumerate([bulk("Cu"), bulk("MgO", "rocksalt", a=4.25)] * 3)
    ]
    model = FastCHGNetModel(published)
    assert model.memory_scales_with == "n_edges"
    batcher = ts.InFlightAutoBatcher(
        model, memory_scales_with=model.memory_scales_with, max_memory_scaler=n_edges
    )
    settings = {
        "optimizer": ts.Optimizer.fire,
        "convergence_fn": ts.generate_force_convergence_fn(0.02),
        "max_steps": 100,
    }
    batched = ts.optimize(atoms, model, autobatcher=batcher, **settings)
    together = ts.optimize(atoms, model, **settings)
    # both stop below the same force, some steps apart
    torch.testing.assert_close(batched.energy, together.energy, rtol=0, atol=1e-3)
    assert ts.system_wise_max_force(batched).max() < 0.02
