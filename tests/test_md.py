"""Molecular dynamics with a network: the same as ASE's, many at once, and crystals that break."""

from __future__ import annotations

import copy
import gc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.constraints import FixAtoms, FixedPlane
from ase.md.verlet import VelocityVerlet
from crystals import PAIR, benzene, crystals, potential
from on_meta import OnOneDevice
from pymatgen.core import Structure
from recordings import CalledAgain
from torch import Tensor

from fastchgnet import FastCHGNetCalculator
from fastchgnet.config import ModelConfig
from fastchgnet.errors import InputError
from fastchgnet.sim.md import MolecularDynamics
from fastchgnet.sim.md.ensemble import Settings
from fastchgnet.sim.md.integrators import Bath, State
from fastchgnet.sim.md.noise import Noise
from fastchgnet.units import GPA

NVT = Settings(ensemble="nvt", thermostat="langevin", timestep=2.0)
NPT = Settings(ensemble="npt", timestep=2.0, pressure=1.0 * GPA, barostat_time=100.0)
SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))
ALL = (Settings(), Settings(ensemble="nvt"), NVT, NPT)


@pytest.fixture(scope="module")
def model():
    return potential(SMALL)


def positions(dynamics: MolecularDynamics) -> list[np.ndarray]:
    return [snapshot.atoms.positions for snapshot in dynamics.snapshots()]


def test_nve_is_ases_with_the_calculator(model) -> None:
    """Rounding of float64 in another order of operations, over 100 steps."""
    atoms = crystals()[0]
    dynamics = MolecularDynamics(model, [atoms], 300.0)
    (start,) = dynamics.snapshots()
    other = start.atoms.copy()
    other.calc = FastCHGNetCalculator(model)
    VelocityVerlet(other, timestep=1 * units.fs).run(100)
    dynamics.run(100)
    (end,) = dynamics.snapshots()
    np.testing.assert_allclose(end.atoms.positions, other.positions, atol=1e-9)
    np.testing.assert_allclose(end.atoms.get_velocities(), other.get_velocities(), atol=1e-9)
    assert np.abs(end.atoms.positions - start.atoms.positions).max() > 0.05
    assert end.energy == pytest.approx(other.get_potential_energy(), abs=1e-9)
    assert end.kinetic == pytest.approx(other.get_kinetic_energy(), abs=1e-9)


@pytest.mark.parametrize("settings", ALL, ids=lambda s: f"{s.ensemble}-{s.thermostat}")
def test_a_crystal_does_not_see_the_others(model, settings: Settings) -> None:
    """What happens to it depends on its number; 1e-9: sums over batches round elsewhere."""
    some = crystals()
    together = MolecularDynamics(model, some, [300.0, 600.0, 900.0, 1200.0], settings)
    among_others = MolecularDynamics(model, [some[3], some[1], some[0]], [300.0, 600.0, 100.0], settings)
    together.run(12)
    among_others.run(12)
    np.testing.assert_allclose(positions(among_others)[1], positions(together)[1], rtol=0, atol=1e-9)


def test_observers_are_called_at_multiples(model) -> None:
    dynamics, seen = MolecularDynamics(model, crystals()[:1]), []
    dynamics.run(7, 3, lambda dynamics: seen.append(dynamics.n_steps))
    dynamics.run(5, 3, lambda dynamics: seen.append(dynamics.n_steps))
    assert seen == [3, 6, 9, 12] and dynamics.n_steps == 12
    dynamics.run(100, stop=lambda: True)
    assert dynamics.n_steps == 12


def test_a_snapshot_as_ase_takes_it(model) -> None:
    dynamics = MolecularDynamics(model, [crystals()[0], benzene()], 300.0)
    dynamics.run(2)
    periodic, molecule = (snapshot.as_atoms() for snapshot in dynamics.snapshots())
    expected = periodic.copy()
    expected.calc = FastCHGNetCalculator(model)
    np.testing.assert_allclose(periodic.get_forces(), expected.get_forces(), atol=1e-10)
    np.testing.assert_allclose(periodic.get_stress(), expected.get_stress(), atol=1e-10)
    np.testing.assert_allclose(periodic.get_magnetic_moments(), expected.get_magnetic_moments(), atol=1e-10)
    assert "stress" not in molecule.calc.results
    snapshot = dynamics.snapshots()[0]
    assert snapshot.volume == pytest.approx(expected.get_volume())
    ideal_gas = -expected.get_stress(include_ideal_gas=True, voigt=False).trace() / 3
    assert snapshot.pressure == pytest.approx(ideal_gas, rel=1e-9)
    assert snapshot.temperature == pytest.approx(expected.get_kinetic_energy() / (1.5 * units.kB))  # 3N-3 = 3


def test_velocities_of_the_crystals(model) -> None:
    atoms = crystals()[1]
    atoms.set_velocities(np.random.default_rng(0).normal(size=(5, 3)) * 0.01)
    (start,) = MolecularDynamics(model, [atoms], 300.0, Settings(velocities="given")).snapshots()
    lost = atoms.get_velocities() - start.atoms.get_velocities()
    np.testing.assert_allclose(lost, np.tile(atoms.get_momenta().sum(0) / atoms.get_masses().sum(), (5, 1)))
    with pytest.raises(InputError, match="structure 0 has no velocities"):
        MolecularDynamics(model, crystals()[:1], 300.0, Settings(velocities="given"))


def test_masses_of_the_crystals(model) -> None:
    heavy = crystals()[0]
    heavy.set_masses([100.0, 200.0])
    (start,) = MolecularDynamics(model, [heavy], 300.0).snapshots()
    assert start.atoms.get_masses().tolist() == [100.0, 200.0]
    assert start.temperature == pytest.approx(300.0)


def test_held_atoms_stay_where_they_are(model) -> None:
    """As with ASE, whose FixAtoms the crystals bring along; other constraints are refused."""
    atoms = crystals()[1]
    atoms.set_constraint(FixAtoms([0, 3]))
    for settings in (Settings(), NVT):
        dynamics = MolecularDynamics(model, [atoms, crystals()[0]], 300.0, settings)
        start, _ = dynamics.snapshots()
        assert dynamics.bath.n_free.tolist() == [9, 3] and start.temperature == pytest.approx(300.0)
        dynamics.run(10)
        end, _ = dynamics.snapshots()
        moved = np.abs(end.atoms.positions - start.atoms.positions).max(1) > 0
        assert moved.tolist() == [False, True, True, False, True]
        if settings.ensemble == "nve":
            other = start.atoms.copy()
            other.calc = FastCHGNetCalculator(model)
            VelocityVerlet(other, timestep=1 * units.fs).run(10)
            np.testing.assert_allclose(end.atoms.positions, other.positions, atol=1e-9)
    atoms.set_velocities(np.ones((5, 3)) * 0.01)
    (given,) = MolecularDynamics(model, [atoms], settings=Settings(velocities="given")).snapshots()
    assert (given.atoms.get_velocities() == 0).all(1).tolist() == [True, False, False, True, False]
    with pytest.raises(InputError, match="structure 0: npt moves all atoms, but some are held"):
        MolecularDynamics(model, [atoms], 300.0, NPT)
    atoms.set_constraint(FixAtoms(range(5)))
    with pytest.raises(InputError, match="structure 0: all atoms are held"):
        MolecularDynamics(model, [atoms])
    atoms.set_constraint(FixedPlane(0, [1, 0, 0]))
    with pytest.raises(InputError, match="only FixAtoms is known, not FixedPlane"):
        MolecularDynamics(model, [atoms])


def test_structures_of_pymatgen(model) -> None:
    atoms = crystals()[1]
    structure = Structure(atoms.cell.array, atoms.numbers, atoms.positions, coords_are_cartesian=True)
    structure.add_site_property("selective_dynamics", [[False] * 3] + [[True] * 3] * 4)
    atoms.set_constraint(FixAtoms([0]))
    ours, pymatgens = MolecularDynamics(model, [atoms]), MolecularDynamics(model, [structure])
    for dynamics in (ours, pymatgens):
        dynamics.run(3)
    np.testing.assert_allclose(positions(pymatgens)[0], positions(ours)[0], rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="structure 0 has no velocities"):
        MolecularDynamics(model, [structure], settings=Settings(velocities="given"))


def two_in_one_place() -> Atoms:
    return Atoms("H2", [[0, 0, 0], [0.1, 0, 0]], cell=[8] * 3, pbc=True)


def test_what_is_no_crystal_leaves_at_once(model) -> None:
    dynamics = MolecularDynamics(model, [two_in_one_place(), crystals()[0]])
    assert dynamics.members == [1]
    (lost,) = dynamics.lost
    assert (lost.number, lost.step, lost.last) == (0, 0, None) and "overlap" in lost.reason
    dynamics.run(3)
    assert dynamics.snapshots()[0].number == 1


@pytest.mark.parametrize("settings", [Settings(), NVT, NPT], ids=lambda s: s.ensemble)
def test_a_crystal_that_breaks_leaves_with_its_last_good_frame(model, settings: Settings) -> None:
    """Atoms that are shot at each other; the others go on as if it had never been there."""
    bullet = Atoms("H2", [[0, 0, 0], [2.0, 0, 0]], cell=[8] * 3, pbc=True)
    bullet.set_velocities([[1.0, 0, 0], [-1.0, 0, 0]])
    others = crystals()[:2]
    for atoms in others:
        atoms.set_velocities(np.random.default_rng(1).normal(size=(len(atoms), 3)) * 0.01)
    settings = replace(settings, velocities="given")
    dynamics = MolecularDynamics(model, [others[0], bullet, others[1]], settings=settings)
    dynamics.run(12)
    (lost,) = dynamics.lost
    assert lost.number == 1 and "overlap" in lost.reason
    assert lost.last is not None and lost.last.step == lost.step
    assert 0.3 < lost.last.atoms.get_distance(0, 1, mic=True) < 1.0
    alone = MolecularDynamics(model, [others[0], benzene_like(others[0]), others[1]], settings=settings)
    alone.run(12)
    assert dynamics.members == [0, 2] and dynamics.n_steps == 12
    for place, other in ((0, 0), (1, 2)):
        np.testing.assert_allclose(positions(dynamics)[place], positions(alone)[other], rtol=0, atol=1e-9)


def benzene_like(atoms: Atoms) -> Atoms:
    """Another crystal that does not break."""
    other = atoms.copy()
    other.set_velocities(0 * other.positions)
    return other


def test_what_explodes_leaves(model) -> None:
    hot = MolecularDynamics(model, [crystals()[1], crystals()[1]], [2e5, 300.0])
    assert [(lost.number, lost.step) for lost in hot.lost] == [(0, 0)]
    assert "temperature" in hot.lost[0].reason
    broken = potential(SMALL)
    dynamics = MolecularDynamics(broken, crystals()[:2])
    dynamics.run(2)
    with torch.no_grad():
        broken.model.magmom.weight.fill_(0)  # not needed for forces
        next(broken.model.parameters()).fill_(torch.nan)
    dynamics.run(2)
    assert [lost.reason for lost in dynamics.lost] == ["its energy or forces are not finite"] * 2
    assert all(lost.last is not None and np.isfinite(lost.last.energy) for lost in dynamics.lost)
    assert dynamics.members == [] and dynamics.n_steps == 2 and dynamics.snapshots() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": 0.0}, "timestep must be between 1e-06 and 1e.12 fs: 0"),
        ({"thermostat_time": -1.0}, "thermostat time must be between"),
        ({"barostat_time": 1e200}, "barostat time must be between"),
        ({"ensemble": "nvt", "timestep": 101.0}, "must not exceed the thermostat time: 101, 100 fs"),
        ({"pressure": float("nan")}, "pressure must be a number"),
        ({"seed": -1}, "seed must be between"),
        ({"ensemble": "npt", "thermostat": "langevin"}, "npt does not run with the thermostat langevin"),
        ({"ensemble": "nph"}, "ensemble 'nph' is none of nve, nvt, npt"),
    ],
)
def test_settings_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**changes)


def test_crystals_that_make_no_sense(model) -> None:
    for kelvin in (0.0, -5.0, float("nan")):
        with pytest.raises(InputError, match="temperature must be above zero"):
            MolecularDynamics(model, crystals()[:1], kelvin)
    with pytest.raises(InputError, match="structure 1: npt needs three periodic directions"):
        MolecularDynamics(model, [crystals()[0], benzene()], 300.0, NPT)
    with pytest.raises(InputError, match="2 temperatures for 1 crystals"):
        MolecularDynamics(model, crystals()[:1], [1.0, 2.0])
    with pytest.raises(InputError, match="structure 0: no atoms"):
        MolecularDynamics(model, [Atoms()])


def test_direct_models_say_once_that_energy_drifts() -> None:
    with pytest.warns(UserWarning, match="not derivatives|no derivatives"):
        dynamics = MolecularDynamics(potential(PAIR), crystals()[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dynamics.run(2)


@pytest.mark.parametrize("settings", ALL, ids=lambda s: f"{s.ensemble}-{s.thermostat}")
def test_recorded_steps_are_those_taken_one_by_one(model, settings: Settings) -> None:
    """1e-9: bonds come in another order."""
    record = CalledAgain()
    recorded = MolecularDynamics(model, crystals(), 300.0, settings, record)
    one_by_one = MolecularDynamics(model, crystals(), 300.0, settings)
    for dynamics in (recorded, one_by_one):
        dynamics.run(9, interval=4)
    assert (record.n_recorded, record.n_replayed) == (1, 8)
    for found, expected in zip(recorded.state, one_by_one.state, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_fault_in_a_recorded_run_is_found(model) -> None:
    bullet = Atoms("H2", [[0, 0, 0], [2.0, 0, 0]], cell=[8] * 3, pbc=True)
    bullet.set_velocities([[1.0, 0, 0], [-1.0, 0, 0]])
    other = crystals()[0]
    other.set_velocities([[0.01, 0, 0], [0, 0, 0]])
    settings = Settings(velocities="given", timestep=2.0)
    recorded, one_by_one = (
        MolecularDynamics(model, [bullet, other], settings=settings, record=record)
        for record in (CalledAgain(), None)
    )
    for dynamics in (recorded, one_by_one):
        dynamics.run(20, interval=5)
    assert recorded.lost[0][:3] == one_by_one.lost[0][:3]
    np.testing.assert_allclose(positions(recorded)[0], positions(one_by_one)[0], rtol=0, atol=1e-9)


def test_a_graph_that_outgrows_its_arrays_gets_new_ones(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastchgnet.sim.fixed._SPARE_ROWS", dict.fromkeys(("short_bonds", "long_bonds", "angles"), -0.5)
    )
    record = CalledAgain()
    dynamics = MolecularDynamics(model, crystals(), record=record)
    reference = MolecularDynamics(model, crystals())
    dynamics.run(4, interval=4)
    reference.run(4, interval=4)
    assert not dynamics.lost and dynamics.n_steps == 4
    np.testing.assert_allclose(positions(dynamics)[1], positions(reference)[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", ALL, ids=lambda s: f"{s.ensemble}-{s.thermostat}")
def test_the_host_sees_nothing_of_a_recorded_step(model, settings: Settings) -> None:
    """On the meta device what needs a value fails."""
    dynamics = MolecularDynamics(model, crystals(), 300.0, settings, CalledAgain())
    dynamics.run(2)
    recorded, bath = dynamics._recorded, dynamics.bath
    assert recorded is not None and recorded._state is not None
    recorded._systems._potential = copy.deepcopy(model).to("meta")
    recorded._bath = Bath(*(v.to("meta") if isinstance(v, Tensor) else v for v in bath))
    recorded._state = State(*(v.to("meta") for v in recorded._state))
    recorded._systems._systems = recorded._systems._systems.to("meta")
    recorded._systems._inverse = recorded._systems._inverse.to("meta")
    recorded._is_sound = recorded._is_sound.to("meta")
    atom = torch.arange(len(bath.mass), device="meta")
    noise = Noise(0, atom, atom)
    with OnOneDevice():
        assert recorded._once("step", [noise.at(5) if settings.draws else atom[:0]]).shape == ()


def test_memory_does_not_grow_with_steps(model) -> None:
    """Tensors that are alive, which any list that grows with the steps holds on to."""
    dynamics = MolecularDynamics(model, crystals()[3:], 300.0, NVT)
    dynamics.run(70)  # beyond the first block of random numbers
    counts = []
    for _ in range(2):
        dynamics.run(30)
        gc.collect()
        counts.append(sum(type(thing) is Tensor for thing in gc.get_objects()))
    assert counts[0] == counts[1]
