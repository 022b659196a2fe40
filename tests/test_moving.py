"""Crystals that move have the graphs that crystals at rest have."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from crystals import CONSERVATIVE, OLD, PAIR, PAPER, benzene, crystals, potential, run

from fastchgnet.errors import InputError
from fastchgnet.graph import Batch, Systems
from fastchgnet.neighbors import find_pairs, systems_from_atoms
from fastchgnet.sim import moving
from fastchgnet.sim.moving import MovingSystems, Unsound


def several() -> list[Atoms]:
    """Crystals, a slab and a molecule."""
    return [*crystals(), fcc111("Al", (1, 1, 3), vacuum=8.0), benzene()]


def wander(systems: Systems, n_steps: int, length: float = 0.05, strain: float = 0.004) -> list[Systems]:
    """Let atoms and periodic cells take random steps."""
    rng, path = np.random.default_rng(0), []
    for _ in range(n_steps):
        step = torch.from_numpy(rng.normal(0, length, systems.position.shape))
        change = torch.from_numpy(strain * rng.normal(size=systems.cell.shape))
        change = change * systems.pbc.all(1)[:, None, None]
        cell = systems.cell + systems.cell @ change
        dragged = (systems.position[:, None] @ change[systems.atom_system])[:, 0]
        systems = dataclasses.replace(systems, position=systems.position + dragged + step, cell=cell)
        path.append(systems)
    return path


def bonds(batch: Batch) -> Counter:
    """Bonds by their shorter name, with the rank of their length."""
    rows = zip(
        batch.bond_center.tolist(), batch.bond_neighbor.tolist(), batch.bond_image.tolist(), strict=True
    )
    return Counter(
        (*min((i, j, tuple(image)), (j, i, tuple(-n for n in image))), u < batch.n_short_bonds)
        for u, (i, j, image) in enumerate(rows)
    )


@pytest.mark.parametrize("skin", [0.0, 0.3])
def test_moving_crystals_have_the_graphs_of_resting_ones(skin: float) -> None:
    model, systems = potential(CONSERVATIVE), systems_from_atoms(several())
    crystals_that_move = MovingSystems(model, systems, skin)
    for now in wander(systems, 12):
        graph, expected = crystals_that_move.graph(now.position, now.cell), model.build_graph(now)
        assert bonds(graph) == bonds(expected)
        assert len(graph.angle_center) == len(expected.angle_center)
        torch.testing.assert_close(graph.volume, expected.volume, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "config", [CONSERVATIVE, PAIR, PAPER, OLD], ids=["conservative", "pair", "paper", "old"]
)
def test_results_are_those_of_a_fresh_graph(config) -> None:
    model, systems = potential(config), systems_from_atoms(several())
    crystals_that_move = MovingSystems(model, systems)
    for now in wander(systems, 4):
        found, expected = crystals_that_move.evaluate(now.position, now.cell), model(model.build_graph(now))
        for name, value, wanted in zip(found._fields, found, expected, strict=True):
            # the order of bonds differs, and so does rounding
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)


def test_graphs_do_not_depend_on_the_past() -> None:
    """Whoever starts where another stands sees the same bits, so that runs can be continued."""
    model, systems = potential(CONSERVATIVE), systems_from_atoms(several())
    old = MovingSystems(model, systems)
    for now in wander(systems, 10):
        graph, fresh = (
            old.graph(now.position, now.cell),
            MovingSystems(model, now).graph(now.position, now.cell),
        )
        for field in dataclasses.fields(Batch):
            one, other = getattr(graph, field.name), getattr(fresh, field.name)
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_searches_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the crystals that have moved, and of no others."""
    searched: list[int] = []

    def counting(systems: Systems, cutoff: float) -> list:
        searched.append(systems.n_systems)
        return find_pairs(systems, cutoff)

    monkeypatch.setattr(moving, "find_pairs", counting)
    systems = systems_from_atoms(several())
    crystals_that_move = MovingSystems(potential(CONSERVATIVE), systems, skin=0.5)
    crystals_that_move.graph(systems.position, systems.cell)
    assert searched == [len(several())]
    position = systems.position.clone()
    position[0, 0] += 0.2
    crystals_that_move.graph(position, systems.cell)
    position[0, 0] += 0.1
    crystals_that_move.graph(position, systems.cell)
    crystals_that_move.graph(1.005 * position, systems.cell * 1.005)
    assert searched == [len(several()), 1]


def test_only_vectors_change_while_no_pair_crosses_a_cutoff() -> None:
    systems = systems_from_atoms([bulk("MgO", "rocksalt", a=4.2)])
    crystals_that_move = MovingSystems(potential(CONSERVATIVE), systems)
    first = crystals_that_move.graph(systems.position, systems.cell)
    position = systems.position.clone()
    position[0, 0] += 1e-3
    second = crystals_that_move.graph(position, systems.cell)
    assert second.angle_j is first.angle_j
    assert not torch.equal(second.bond_vector, first.bond_vector)


@pytest.mark.parametrize(
    ("where", "reason"),
    [(np.nan, "NaN"), (1e9, "farther than"), (None, "overlap")],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_broken_crystals_are_named(where: float | None, reason: str, is_new: bool) -> None:
    systems = systems_from_atoms(several())
    crystals_that_move = MovingSystems(potential(CONSERVATIVE), systems)
    if not is_new:
        crystals_that_move.graph(systems.position, systems.cell)
    position = systems.position.clone()
    atom = systems.n_atoms[0]
    position[atom] = position[atom + 1] + 0.01 if where is None else where
    with pytest.raises(Unsound, match=f"structure 1: .*{reason}") as caught:
        crystals_that_move.graph(position, systems.cell)
    assert list(caught.value.reasons) == [1]
    # it can be asked again, once the atom is back
    assert crystals_that_move.graph(systems.position, systems.cell).n_systems == len(several())


def test_a_flat_cell_is_named() -> None:
    systems = systems_from_atoms(crystals())
    crystals_that_move = MovingSystems(potential(CONSERVATIVE), systems)
    crystals_that_move.graph(systems.position, systems.cell)
    cell = systems.cell.clone()
    cell[2, 2] = cell[2, 1]
    with pytest.raises(Unsound, match="structure 2: the cell has no volume"):
        crystals_that_move.graph(systems.position, cell)


def test_lone_atoms_are_warned_of_once() -> None:
    systems = systems_from_atoms([Atoms("CsXe", positions=[[0, 0, 0], [0, 0, 9]])])
    crystals_that_move = MovingSystems(potential(CONSERVATIVE), systems)
    with pytest.warns(UserWarning, match="no neighbour") as caught:
        crystals_that_move.graph(systems.position, systems.cell)
        crystals_that_move.graph(systems.position + torch.eye(3)[:2], systems.cell)
    assert len(caught) == 1


def test_energies_alone_need_no_derivative() -> None:
    model, atoms = potential(CONSERVATIVE), crystals()[0]
    expected = run(model, atoms)
    systems = systems_from_atoms([atoms])
    found = MovingSystems(model, systems).evaluate(systems.position, systems.cell, derivatives=False)
    torch.testing.assert_close(found.energy, expected.energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.magmoms, expected.magmoms)
    assert found.forces.isnan().all() and found.stress.isnan().all()


@pytest.mark.parametrize("stage", ["find_pairs", "concatenated", "near_first", "graph_of_pairs"])
def test_an_interrupted_step_leaves_nothing_half_done(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, or no memory; whoever goes on gets the graph of the present geometry."""
    model, systems = potential(CONSERVATIVE), systems_from_atoms(crystals())
    crystals_that_move = MovingSystems(model, systems)
    crystals_that_move.graph(systems.position, systems.cell)
    (now,) = wander(systems, 1, length=0.5)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(moving, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        crystals_that_move.graph(now.position, now.cell)
    monkeypatch.undo()
    assert bonds(crystals_that_move.graph(now.position, now.cell)) == bonds(model.build_graph(now))


def test_no_crystals_are_left() -> None:
    none = systems_from_atoms([])
    output = MovingSystems(potential(CONSERVATIVE), none).evaluate(none.position, none.cell)
    assert [len(value) for value in output] == [0] * 5


@pytest.mark.parametrize("skin", [-1, np.nan, np.inf])
def test_a_skin_that_is_no_width_is_refused(skin: float) -> None:
    with pytest.raises(InputError, match="skin must be finite and not negative"):
        MovingSystems(potential(CONSERVATIVE), systems_from_atoms(crystals()), skin)


def test_crystals_that_stay_keep_their_neighbours(monkeypatch) -> None:
    model = potential(CONSERVATIVE)
    first, second, third, fourth = crystals()
    known = MovingSystems(model, systems_from_atoms([first, second, third]))
    known.evaluate(known.systems.position, known.systems.cell)
    searched = []

    def counted(some: Systems, cutoff: float) -> object:
        searched.append(some.n_systems)
        return find_pairs(some, cutoff)

    monkeypatch.setattr(moving, "find_pairs", counted)
    exchanged = known.exchange([2, 0], systems_from_atoms([fourth]))
    together = systems_from_atoms([third, first, fourth])
    position = together.position + 0.01
    output = exchanged.evaluate(position, together.cell)
    assert searched == [1]
    expected = MovingSystems(model, together).evaluate(position, together.cell)
    for value, other in zip(output, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)
    remaining = exchanged.exchange([1], systems_from_atoms([]))
    alone = systems_from_atoms([first])
    assert torch.equal(
        remaining.evaluate(alone.position, alone.cell).forces,
        MovingSystems(model, alone).evaluate(alone.position, alone.cell).forces,
    )
    assert searched == [1, 3, 0, 1]
