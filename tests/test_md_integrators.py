"""Integrators: against ASE's, conserved quantities, and what they sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import ase.md.nose_hoover_chain as ase_chain
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.md.langevin import Langevin
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.nose_hoover_chain import IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.verlet import VelocityVerlet
from springs import SpringCalculator, Springs

from fastchgnet.sim.md.ensemble import Settings, make_bath, random_velocities, temperature_of
from fastchgnet.sim.md.integrators import (
    Bath,
    State,
    conserved_energy,
    kinetic_energy,
    pressure,
)
from fastchgnet.sim.md.noise import Noise, philox
from fastchgnet.units import GPA

ROUNDING = 1e-9
"""A, A/time, eV: 100 steps of the same operations in another order, in float64."""

KELVIN = (300.0, 600.0, 900.0, 300.0)

ALL = (
    Settings(ensemble="nve"),
    Settings(ensemble="nvt"),
    Settings(ensemble="nvt", thermostat="langevin"),
    Settings(ensemble="npt", pressure=1.0 * GPA),
)


def crystals() -> list[Atoms]:
    """Three of different sizes and temperatures; the last has one atom."""
    made = [
        bulk("NaCl", "rocksalt", a=5.64, cubic=True),
        bulk("ZnO", "wurtzite", a=3.25, c=5.2),
        bulk("Cu", a=3.6),
    ]
    for seed, atoms in enumerate(made):
        atoms.rattle(0.03, seed=seed)
    return made


class Run:
    """Crystals on springs."""

    def __init__(self, atoms: list[Atoms], settings: Settings, kelvin: Sequence[float] = KELVIN) -> None:
        self.springs, self.settings = Springs(atoms), settings
        self.bath = make_bath(atoms, kelvin[: len(atoms)], settings, "cpu")
        count = torch.tensor([len(one) for one in atoms])
        place = torch.cat([torch.arange(n) for n in count])
        self.noise = Noise(settings.seed, self.bath.atom_system, place)
        position = torch.from_numpy(np.concatenate([one.positions for one in atoms]))
        cell = torch.from_numpy(np.array([one.cell.array for one in atoms]))
        output, none = self.springs(position, cell), torch.zeros(len(atoms), 3, dtype=torch.float64)
        self.state = State(
            step=torch.tensor(0),
            position=position,
            velocity=random_velocities(self.noise.start(), self.bath),
            cell=cell,
            energy=output.energy,
            forces=output.forces,
            stress=output.stress,
            magmoms=output.magmoms,
            heat=none[:, 0],
            thermostat=none,
            thermostat_rate=none,
            barostat=none,
            barostat_rate=none,
            strain_rate=none[:, 0],
        )

    def take(self, n_steps: int) -> list[State]:
        states = []
        for _ in range(n_steps):
            step = int(self.state.step)
            self.state = self.settings.step(self.state, self.bath, self.springs, self.noise.at(step))
            states.append(self.state)
        return states


def as_in_ase(run: Run, atoms: Atoms) -> Atoms:
    """The crystal of a run at its start, on the same springs, in ASE."""
    atoms = atoms.copy()
    atoms.set_velocities(run.state.velocity.numpy())
    atoms.calc = SpringCalculator(run.springs)
    return atoms


def all_free(bath: Bath, n_atoms: int) -> Bath:
    """Count degrees of freedom as ASE's integrators do."""
    return bath._replace(n_free=torch.full_like(bath.n_free, 3 * n_atoms))


def test_nve_is_ases() -> None:
    atoms = crystals()[0]
    run = Run([atoms], Settings())
    other = as_in_ase(run, atoms)
    VelocityVerlet(other, timestep=1 * units.fs).run(100)
    run.take(100)
    np.testing.assert_allclose(run.state.position, other.positions, atol=ROUNDING)
    np.testing.assert_allclose(run.state.velocity, other.get_velocities(), atol=ROUNDING)


def test_nose_hoover_is_ases(monkeypatch: pytest.MonkeyPatch) -> None:
    """ASE's chain with one Trotter step and its 3N degrees of freedom."""
    monkeypatch.setattr(ase_chain, "FOURTH_ORDER_COEFFS", [1.0])
    atoms = crystals()[0]
    run = Run([atoms], Settings(ensemble="nvt"))
    run.bath = all_free(run.bath, len(atoms))
    other = as_in_ase(run, atoms)
    dynamics = NoseHooverChainNVT(other, 1 * units.fs, temperature_K=300, tdamp=100 * units.fs)
    dynamics.run(100)
    run.take(100)
    np.testing.assert_allclose(run.state.position, other.positions, atol=ROUNDING)
    np.testing.assert_allclose(run.state.velocity, other.get_velocities(), atol=ROUNDING)
    expected = dynamics.get_conserved_energy()
    assert conserved_energy(run.state, run.bath).item() == pytest.approx(expected, abs=ROUNDING)


def test_npt_is_ases(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above; the barostat's first thermostat has the mass of its one degree of freedom, ASE's has nine."""
    monkeypatch.setattr(ase_chain, "FOURTH_ORDER_COEFFS", [1.0])
    atoms = crystals()[0]
    run = Run([atoms], Settings(ensemble="npt", pressure=2.0 * GPA, barostat_time=300.0))
    run.bath = all_free(run.bath, len(atoms))
    other = as_in_ase(run, atoms)
    times = {"tdamp": 100 * units.fs, "pdamp": 300 * units.fs}
    dynamics = IsotropicMTKNPT(other, 1 * units.fs, temperature_K=300, pressure_au=2 * GPA, **times)
    dynamics._barostat._R[0] = dynamics._barostat._R[1]
    dynamics.run(100)
    run.take(100)
    np.testing.assert_allclose(run.state.position, other.positions, atol=ROUNDING)
    np.testing.assert_allclose(run.state.cell[0], other.cell, atol=ROUNDING)
    np.testing.assert_allclose(run.state.velocity, other.get_velocities(), atol=ROUNDING)
    expected = dynamics.get_conserved_energy()
    assert conserved_energy(run.state, run.bath).item() == pytest.approx(expected, abs=ROUNDING)


def test_langevin_without_friction_is_ases() -> None:
    atoms = crystals()[0]
    run = Run([atoms], Settings(ensemble="nvt", thermostat="langevin"))
    run.bath = run.bath._replace(thermostat_time=1e30)
    run.take(100)
    for make in (
        lambda other: Langevin(other, 1 * units.fs, temperature_K=300, friction=0.0, fixcm=False),
        lambda other: LangevinBAOAB(other, 1 * units.fs, temperature_K=300, T_tau=1e30, rng=1),
    ):
        other = as_in_ase(Run([atoms], run.settings), atoms)
        make(other).run(100)
        np.testing.assert_allclose(run.state.position, other.positions, atol=ROUNDING)


@pytest.mark.parametrize("settings", ALL, ids=lambda s: f"{s.ensemble}-{s.thermostat}")
def test_conserved_energy(settings: Settings) -> None:
    """It fluctuates a hundred times less than the energy, and as the square of the time step."""
    spreads = []
    for timestep in (2.0, 1.0):
        run = Run(crystals()[:2], replace(settings, timestep=timestep, barostat_time=200.0))
        states = run.take(round(400 / timestep))
        energies = torch.stack([conserved_energy(state, run.bath) for state in states])
        assert (torch.stack([state.energy for state in states]).std(0) > 100 * energies.std(0)).all()
        spreads.append(energies.std(0))
    # 4 but for higher orders; the noise of other steps makes another trajectory
    assert (spreads[0] > (1.5 if settings.draws else 3.9) * spreads[1]).all()


@pytest.mark.parametrize("settings", [ALL[0], ALL[1], ALL[3]], ids=lambda s: s.ensemble)
def test_time_reversal(settings: Settings) -> None:
    run = Run(crystals(), settings)
    start = run.state
    run.take(50)
    rates = ("velocity", "thermostat_rate", "barostat_rate", "strain_rate")
    run.state = run.state._replace(**{name: -getattr(run.state, name) for name in rates})
    run.take(50)
    torch.testing.assert_close(run.state.position, start.position, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(run.state.velocity, -start.velocity, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(run.state.cell, start.cell, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("settings", ALL, ids=lambda s: f"{s.ensemble}-{s.thermostat}")
def test_the_centre_of_mass_rests(settings: Settings) -> None:
    run = Run(crystals()[:2], settings)
    run.take(30)
    momentum = run.bath.mass * run.state.velocity
    assert momentum.abs().max() > 1
    for rows in momentum.split([8, 4]):
        assert rows.sum(0).abs().max() < 1e-10  # rounding of numbers of order 10


@pytest.mark.parametrize("settings", ALL, ids=lambda s: f"{s.ensemble}-{s.thermostat}")
def test_forces_are_asked_for_once_a_step(settings: Settings) -> None:
    run = Run(crystals(), settings)
    before = run.springs.n_calls
    run.take(3)
    assert run.springs.n_calls - before == 3 and int(run.state.step) == 3


@pytest.mark.parametrize("settings", ALL, ids=lambda s: f"{s.ensemble}-{s.thermostat}")
def test_systems_do_not_see_each_other(settings: Settings) -> None:
    """Also sums over systems of equal and of different sizes, and single ones."""
    together = Run([*crystals(), crystals()[0]], settings)
    start = together.state
    together.take(20)
    first = 0
    for number, atoms in enumerate([*crystals(), crystals()[0]]):
        rows = slice(first, first + len(atoms))
        first += len(atoms)
        alone = Run([atoms], settings, [KELVIN[number]])
        place = torch.arange(len(atoms))
        alone.noise = Noise(settings.seed, torch.full_like(place, number), place)
        alone.state = alone.state._replace(velocity=start.velocity[rows])
        alone.take(20)
        torch.testing.assert_close(alone.state.position, together.state.position[rows], atol=ROUNDING, rtol=0)
        torch.testing.assert_close(alone.state.cell[0], together.state.cell[number], atol=ROUNDING, rtol=0)


HOT = 1500.0
"""K, at which the springs are so anharmonic that 8 atoms forget how they started."""


def hot_replicas(settings: Settings) -> Run:
    run = Run([crystals()[0]] * 40, settings, [HOT] * 40)
    run.springs.q = 20.0
    run.take(500)
    return run


def test_langevin_samples_the_temperature() -> None:
    """Mean and variance of K over replicas are canonical, within 4 errors of means of independent numbers.

    Time steps of 1 fs change the mean by some 0.1%.
    """
    run = hot_replicas(Settings(ensemble="nvt", thermostat="langevin", thermostat_time=30.0))
    kinetic = torch.stack([kinetic_energy(state.velocity, run.bath) for state in run.take(1500)])
    n, kT = run.bath.n_free[0].item(), HOT * units.kB
    mean, variance = kinetic.mean(0) / (0.5 * n * kT), kinetic.var(0) / (0.5 * n * kT**2)
    for found, bias in ((mean, 0.001), (variance, 0.002)):
        error = found.std().item() / math.sqrt(len(found))
        assert error < 0.05
        assert abs(found.mean().item() - 1) < 4 * error + bias


def test_nose_hoover_keeps_the_temperature() -> None:
    """5%: energy goes to and fro between atoms and chain for long."""
    run = hot_replicas(Settings(ensemble="nvt", thermostat_time=30.0))
    kinetic = torch.stack([kinetic_energy(state.velocity, run.bath) for state in run.take(1000)])
    assert temperature_of(kinetic, run.bath).mean().item() == pytest.approx(HOT, rel=0.05)


def test_npt_keeps_the_pressure() -> None:
    """0.1 GPa, where replicas differ by 0.05; as above, the barostat has a memory."""
    run = hot_replicas(Settings(ensemble="npt", pressure=3.0 * GPA, barostat_time=100.0))
    found = torch.stack([pressure(state, run.bath) for state in run.take(1500)])
    assert found.mean().item() / GPA == pytest.approx(3.0, abs=0.1)
    assert found.std().item() / GPA > 0.5


def test_first_velocities() -> None:
    run = Run(crystals(), Settings())
    kelvin = temperature_of(kinetic_energy(run.state.velocity, run.bath), run.bath)
    torch.testing.assert_close(kelvin, torch.tensor([300.0, 600.0, 900.0], dtype=torch.float64))
    assert run.bath.n_free.tolist() == [21, 9, 3]
    other = Run(crystals(), Settings(seed=1))
    assert (other.state.velocity - run.state.velocity).abs().min() > 1e-6


def test_philox_gives_the_published_words() -> None:
    """Known answers of the authors' Random123 library."""
    cases = [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, expected in cases:
        words = philox(tuple(torch.tensor([word]) for word in counter), key)
        assert " ".join(f"{word.item():08x}" for word in words) == expected


def test_noise_is_normal_and_a_function_of_its_place() -> None:
    atom = torch.arange(1000)
    noise = Noise(7, torch.zeros_like(atom), atom)
    drawn = torch.stack([noise.at(step) for step in range(100)])
    assert drawn.shape == (100, 1000, 3)
    n = drawn.numel()
    for power, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0}[power]  # variances of the powers of a normal number
        assert abs((drawn**power).mean().item() - expected) < 4 * math.sqrt(spread / n)
    for other in (drawn[1:], drawn[:, 1:], drawn[:, :, 1:]):
        same = drawn[: other.shape[0], : other.shape[1], : other.shape[2]]
        assert abs((same * other).mean().item()) < 4 / math.sqrt(other.numel())
    picked = torch.tensor([5, 500])
    again = Noise(7, torch.zeros(2, dtype=torch.int64), picked)
    torch.testing.assert_close(again.at(77), drawn[77, picked], rtol=0, atol=0)
    assert (Noise(7, torch.ones_like(atom), atom).at(3) - drawn[3]).abs().min() > 0
