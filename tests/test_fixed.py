"""Crystals in arrays of static shapes, evaluated by recordings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from crystals import CONSERVATIVE, PAIR, potential
from recordings import CalledAgain
from test_moving import several, wander

from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.sim import fixed
from fastchgnet.sim.moving import MovingSystems, Unsound


@pytest.mark.parametrize("config", [CONSERVATIVE, PAIR], ids=["conservative", "direct"])
def test_recorded_evaluations_are_those_on_graphs_of_the_host(config) -> None:
    model, systems = potential(config), systems_from_atoms(several())
    record = CalledAgain()
    recorded, plain = MovingSystems(model, systems, record=record), MovingSystems(model, systems)
    path = wander(systems, 8)
    for now in path:
        found = recorded.evaluate(now.position, now.cell)
        expected = plain.evaluate(now.position, now.cell)
        assert recorded.systems.position is now.position
        for one, other in zip(found, expected, strict=True):
            # the order of bonds differs, and so does rounding
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)
    # the first two by their neighbours, the third warms up
    assert (record.n_recorded, record.n_replayed) == (1, len(path) - 3)


def test_energies_in_between_do_not_end_a_recording() -> None:
    """As where ASE is asked for the energy of every step, and then for its forces."""
    systems, record = systems_from_atoms(several()), CalledAgain()
    recorded = MovingSystems(potential(CONSERVATIVE), systems, record=record)
    path = wander(systems, 6)
    for now in path:
        energy = recorded.evaluate(now.position, now.cell, derivatives=False).energy
        found = recorded.evaluate(now.position, now.cell)
        torch.testing.assert_close(found.energy, energy, rtol=1e-9, atol=1e-9)
    # the first by its neighbours, the second warms up
    assert (record.n_recorded, record.n_replayed) == (1, len(path) - 2)


def test_outputs_outlive_the_next_evaluation() -> None:
    model, systems = potential(CONSERVATIVE), systems_from_atoms(several())
    recorded = MovingSystems(model, systems, record=CalledAgain())
    outputs = [recorded.evaluate(now.position, now.cell) for now in wander(systems, 6)]
    energies = torch.stack([output.energy for output in outputs])
    assert len(energies.unique(dim=0)) == 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda position, cell: (position * torch.nan, cell), "NaN"),
        (lambda position, cell: (position, cell * torch.tensor([[[1e-7], [1], [1]]])), "no volume"),
        (lambda position, cell: (position * 1e-4, cell), "overlap"),
    ],
    ids=["nan", "flat", "overlap"],
)
def test_faults_are_found_and_forgotten(change, reason: str) -> None:
    model, systems = potential(CONSERVATIVE), systems_from_atoms(several()[:2])
    recorded = MovingSystems(model, systems, record=CalledAgain())
    for _ in range(4):
        expected = recorded.evaluate(systems.position, systems.cell)
    with pytest.raises(Unsound, match=reason):
        recorded.evaluate(*change(systems.position, systems.cell))
    for _ in range(4):
        found = recorded.evaluate(systems.position, systems.cell)
        torch.testing.assert_close(found.forces, expected.forces, rtol=0, atol=1e-9)


def test_another_cell_gets_another_room() -> None:
    model, systems = potential(CONSERVATIVE), systems_from_atoms(several()[:2])
    record = CalledAgain()
    recorded, plain = MovingSystems(model, systems, record=record), MovingSystems(model, systems)
    for factor in (1.0, 1.0, 1.0, 1.0, 0.7, 0.7, 0.7, 0.7):
        found = recorded.evaluate(factor * systems.position, factor * systems.cell)
        expected = plain.evaluate(factor * systems.position, factor * systems.cell)
        torch.testing.assert_close(found.forces, expected.forces, rtol=1e-9, atol=1e-9)
    assert record.n_recorded == 2


def test_large_crystals_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastchgnet.sim.moving.MAX_CANDIDATES", 10)
    record = CalledAgain()
    systems = systems_from_atoms(several())
    recorded = MovingSystems(potential(CONSERVATIVE), systems, record=record)
    for _ in range(4):
        recorded.evaluate(systems.position, systems.cell)
    assert record.n_recorded == 0
    assert fixed.n_candidates(potential(CONSERVATIVE), systems) > np.square(systems.n_atoms).sum()
