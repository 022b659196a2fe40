"""Graphs built with static shapes are those of the CPU's builder, bit for bit but for the order of rows."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.io import iread
from conftest import shared_data
from crystals import CONSERVATIVE, check_indices, crystals, potential
from test_graph import ODD
from test_padding import plus

from fastchgnet import neighbors
from fastchgnet.device_graph import SpareSystems, build_graph, count_candidates, spare_systems
from fastchgnet.graph import Batch
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.padding import Capacity, rows_of

SPARE = Capacity(2, 5, 4, 9, 13)
LEFT_HANDED = Atoms(
    "LiF", positions=[[0, 0, 0], [1.9, 0.3, 0.2]], cell=[[0, 3, 0], [3.3, 0, 0.4], [0, 0.2, 3.2]], pbc=True
)
# distances of 3 and of 6 A and their images: all devices must decide alike
AT_THE_CUTOFF = bulk("Po", "sc", a=3.0)
SHEET = Atoms(
    "C2", positions=[[0, 0, 0], [0, 1.4, 40]], cell=[[2.5, 0, 0], [0, 0, 0], [0.4, 0.3, 9]], pbc=[1, 0, 1]
)
CASES = ODD | {"left-handed": LEFT_HANDED, "at the cutoff": AT_THE_CUTOFF, "sheet": SHEET}

pytestmark = pytest.mark.filterwarnings("ignore:some atoms have no neighbour")


def candidates(systems: SpareSystems, cutoff: float) -> int:
    n_atoms = systems.start.diff().numpy()
    return int(count_candidates(systems.cell, systems.pbc, n_atoms, cutoff).sum())


def both(atoms: list[Atoms], spare: Capacity = SPARE) -> tuple[Batch, Batch, torch.Tensor]:
    """The graphs of both builders, and whether the second found room."""
    systems = systems_from_atoms(atoms)
    expected = neighbors.build_graph(systems, 6.0, 3.0)
    capacity = plus(rows_of(expected), spare)
    raw = spare_systems(systems, capacity.systems, capacity.atoms)
    found, fits = build_graph(raw, 6.0, 3.0, capacity, candidates(raw, 6.0) + 7)
    return expected, found, fits


def oriented(batch: Batch, n_bonds: int) -> list[tuple]:
    """Name the first bonds by their ends and image, alike in both orientations, with the vector's bits."""
    rows = zip(
        batch.bond_center.tolist()[:n_bonds],
        batch.bond_neighbor.tolist()[:n_bonds],
        batch.bond_image.tolist()[:n_bonds],
        batch.bond_vector.tolist()[:n_bonds],
        strict=True,
    )
    names = []
    for i, j, image, vector in rows:
        turned = (j, i, [-n for n in image], [-x for x in vector])
        names.append(min((i, j, image, vector), turned))
    return names


def real_bonds(batch: Batch, rows: Capacity) -> list[int]:
    """Places of the real bonds in a padded batch."""
    start = batch.n_short_bonds
    return [*range(rows.short_bonds), *range(start, start + rows.long_bonds)]


def angle_names(batch: Batch, names: dict[int, tuple], n_angles: int) -> list[tuple]:
    arms = [batch.short_bond[k][:n_angles].tolist() for k in (batch.angle_i, batch.angle_j)]
    return sorted(
        (center, names[i][:3], names[j][:3])
        for center, i, j in zip(batch.angle_center[:n_angles].tolist(), *arms, strict=True)
    )


def assert_same_graph(expected: Batch, found: Batch) -> None:
    rows, short = rows_of(expected), expected.n_short_bonds
    for name in ("atomic_number", "atom_system", "n_atoms", "system_start", "cell", "volume"):
        wanted = getattr(expected, name)
        torch.testing.assert_close(
            getattr(found, name)[: len(wanted)], wanted, rtol=0, atol=0, equal_nan=True
        )
    theirs = oriented(expected, len(expected.bond_center))
    everything = oriented(found, len(found.bond_center))
    ours = [everything[k] for k in real_bonds(found, rows)]
    assert sorted(theirs[:short]) == ours[:short], "short bonds, in canonical order"
    assert sorted(theirs[short:]) == ours[short:], "long bonds, in canonical order"
    names = [dict(enumerate(theirs)), dict(enumerate(everything))]
    assert angle_names(expected, names[0], rows.angles) == angle_names(found, names[1], rows.angles)
    assert torch.equal(expected.atom_edge, found.atom_edge[: len(expected.atom_edge)])
    assert torch.equal(expected.atom_angle, found.atom_angle[: len(expected.atom_angle)])


def assert_contract(batch: Batch) -> None:
    check_indices(batch)
    assert (batch.edge_sign[batch.bond_edge] == torch.tensor([1, -1])).all()
    assert (batch.short_sign[batch.bond_short] == torch.tensor([1, -1])).all()
    ends = torch.stack([batch.bond_center, batch.bond_neighbor], 1)
    assert (batch.edge_center[batch.bond_edge] == ends).all()
    assert (batch.edge_neighbor == batch.edge_center[batch.edge_reverse]).all()


@pytest.mark.parametrize("name", CASES)
def test_odd_cells(name: str) -> None:
    expected, found, fits = both([CASES[name]])
    assert fits
    assert_same_graph(expected, found)
    assert_contract(found)


def test_all_in_one_batch() -> None:
    expected, found, fits = both([*CASES.values(), *crystals()])
    assert fits
    assert_same_graph(expected, found)
    assert_contract(found)


def test_no_crystal_at_all() -> None:
    expected, found, fits = both([], Capacity(2, 2, 1, 1, 0))
    assert fits and found.n_systems == expected.n_systems + 2
    assert_contract(found)


def test_types_are_those_of_the_other_builder() -> None:
    expected, found, _ = both(crystals())
    for field in dataclasses.fields(Batch):
        one, other = getattr(expected, field.name), getattr(found, field.name)
        assert one.dtype == other.dtype and one.shape[1:] == other.shape[1:], field.name


def test_a_sample_of_crystals() -> None:
    frames = iread(shared_data() / "structures" / "mptrj_like_2487.xyz")
    sample = [atoms for atoms in itertools.islice(frames, 0, 2487, 130) if len(atoms) < 60]
    expected, found, fits = both(sample)
    assert fits
    assert_same_graph(expected, found)


@pytest.mark.slow
def test_all_crystals() -> None:
    frames = list(iread(shared_data() / "structures" / "mptrj_like_2487.xyz"))
    for start in range(0, len(frames), 32):
        expected, found, fits = both(frames[start : start + 32])
        assert fits
        assert_same_graph(expected, found)


@pytest.mark.parametrize("lacking", ["atoms", "short_bonds", "long_bonds", "angles", "candidates"])
def test_too_little_room_is_told_and_leaves_fillers(lacking: str) -> None:
    systems = systems_from_atoms(crystals())
    rows = rows_of(neighbors.build_graph(systems, 6.0, 3.0))
    spare = Capacity(1, 1, 1, 0, 0)
    capacity = plus(rows, spare)
    raw = spare_systems(systems, capacity.systems, capacity.atoms)
    n_candidates = candidates(raw, 6.0)
    assert build_graph(raw, 6.0, 3.0, capacity, n_candidates)[1]
    if lacking == "candidates":
        n_candidates -= 1
    elif lacking == "atoms":
        raw = dataclasses.replace(raw, start=raw.start.where(raw.start < rows.atoms, rows.atoms + 1))
        n_candidates *= 2
    else:
        capacity = capacity._replace(**{lacking: getattr(capacity, lacking) - 1})
    batch, fits = build_graph(raw, 6.0, 3.0, capacity, n_candidates)
    assert not fits
    assert_contract(batch)
    assert rows_of(batch) == capacity and (batch.bond_vector.norm(dim=1) > 20).all()


def test_predictions_are_those_of_the_other_builder() -> None:
    """In float64, but for the order of sums."""
    model = potential(CONSERVATIVE)
    expected, found, _ = both([*crystals(), LEFT_HANDED])
    for one, other in zip(model(expected), model(found), strict=True):
        torch.testing.assert_close(other[: len(one)], one, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_nothing_waits_for_the_device() -> None:
    """On the meta device an operation whose shape or branch depends on a value fails."""
    systems = systems_from_atoms(crystals())
    raw = spare_systems(systems, 6, 20).to("meta")
    batch, fits = build_graph(raw, 6.0, 3.0, Capacity(6, 20, 40, 600, 200), 10_000)
    assert batch.n_systems == 6 and fits.device.type == "meta"


def test_candidates_are_few() -> None:
    """A cubic cell of 8 A has two images along each axis within 6 A, not three."""
    cell = torch.eye(3, dtype=torch.float64)[None] * 8.0
    found = count_candidates(cell, torch.ones(1, 3, dtype=torch.bool), np.array([31]), 6.0)
    assert found.tolist() == [31**2 * 2**3]
