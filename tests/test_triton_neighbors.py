"""The Triton builder of graphs writes what the PyTorch one does, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from crystals import crystals
from interpreted import DEVICE, nan_filled  # noqa: F401, a fixture for every test here
from test_device_graph import CASES, SPARE, candidates
from test_padding import plus

from fastchgnet import neighbors
from fastchgnet.device_graph import SpareSystems, build_graph, spare_systems
from fastchgnet.graph import Batch
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.ops.gpu import neighbors as gpu_neighbors
from fastchgnet.padding import Capacity, rows_of

CUTOFFS = (6.0, 3.0)

pytestmark = pytest.mark.filterwarnings("ignore:some atoms have no neighbour")


def assert_equal(found: Batch, expected: Batch) -> None:
    for field in dataclasses.fields(Batch):
        one, other = getattr(found, field.name).cpu(), getattr(expected, field.name)
        assert one.dtype == other.dtype, field.name
        torch.testing.assert_close(
            one, other, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=field.name: f"{name}: {text}"
        )


def both(raw: SpareSystems, capacity: Capacity) -> tuple[tuple[Batch, torch.Tensor], ...]:
    """What PyTorch on the CPU and Triton make of the same crystals."""
    there = raw.to(DEVICE)
    return (
        build_graph(raw, *CUTOFFS, capacity, candidates(raw, CUTOFFS[0]) + 1),
        gpu_neighbors.build_graph(there.position, there, *CUTOFFS, capacity),
    )


@pytest.mark.parametrize("name", [*CASES, "crystals", "nothing"])
def test_both_write_the_same(name: str) -> None:
    atoms = {"crystals": crystals(), "nothing": []}
    systems = systems_from_atoms(atoms[name] if name in atoms else [CASES[name]])
    capacity = plus(rows_of(neighbors.build_graph(systems, *CUTOFFS)), SPARE)
    raw = spare_systems(systems, capacity.systems, capacity.atoms)
    (expected, fits), (found, also_fits) = both(raw, capacity)
    assert fits and also_fits.item()
    assert_equal(found, expected)


@pytest.mark.parametrize("lacking", ["atoms", "short_bonds", "long_bonds", "angles"])
def test_both_leave_fillers_where_there_is_too_little_room(lacking: str) -> None:
    systems = systems_from_atoms(crystals()[:2])
    rows = rows_of(neighbors.build_graph(systems, *CUTOFFS))
    capacity = plus(rows, Capacity(1, 1, 1, 0, 0))
    raw = spare_systems(systems, capacity.systems, capacity.atoms)
    if lacking == "atoms":
        raw = dataclasses.replace(raw, start=raw.start.where(raw.start < rows.atoms, rows.atoms + 3))
    else:
        capacity = capacity._replace(**{lacking: getattr(capacity, lacking) - 1})
    (expected, fits), (found, also_fits) = both(raw, capacity)
    assert not fits and not also_fits.item()
    assert_equal(found, expected)
