"""Graphs built where the atoms are: static shapes, no work per crystal, nothing for the host to wait for.

The same graphs as `neighbors.build_graph`, bit for bit but for the order of bonds, edges and angles. Rows are
sorted by centre, neighbour and image here. The counts stay on the device; fillers make up the shapes of a
`Capacity` (see `fastchgnet.padding`).

Every pair of atoms of a crystal has the same number of candidate images: along lattice vector k, with planes
h_k apart and fractional difference f of the pair, the images n with |f + n| h_k < cutoff are consecutive and
at most floor(2 cutoff / h_k) + 1. So a candidate has a place that follows from what it is,

    place(i, j, n) = start of its crystal + ((i n_atoms + j) n_images + number of n)

and that of its reverse (j, i, -n) follows as well: no sorting and no searching for reverse edges. An edge is
the number of true candidates before it. Distances are the same bits in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.graph import Batch, Systems, _Tensors
from fastchgnet.neighbors import cell_volume, cross, pair_vector, squared_length
from fastchgnet.ops.gpu import runtime
from fastchgnet.padding import Capacity, Counts, fill

_SLACK = 1e-9
"""Added to reaches measured in cells: rounding must not lose a pair whose distance decides otherwise."""


@dataclass(frozen=True, slots=True)
class SpareSystems(_Tensors):
    """Raw geometry of crystals on a device, with room to spare behind the real rows."""

    atomic_number: Tensor  # [A] int64
    position: Tensor  # [A, 3] float64, A
    cell: Tensor  # [S, 3, 3] float64, A
    pbc: Tensor  # [S, 3] bool
    start: Tensor  # [S + 1] int64, the first atom of each system; of spare ones, the number of real atoms
    n_systems: Tensor  # int64 scalar, real systems


def spare_systems(systems: Systems, n_systems: int, n_atoms: int) -> SpareSystems:
    """Put crystals into arrays of `n_systems` systems and `n_atoms` atoms, on the host."""
    real = torch.tensor([0, *systems.n_atoms]).cumsum(0)
    start = torch.full((n_systems + 1,), len(systems.atomic_number))
    start[: len(real)] = real

    def wide(rows: Tensor, length: int) -> Tensor:
        return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])

    return SpareSystems(
        atomic_number=wide(systems.atomic_number, n_atoms),
        position=wide(systems.position, n_atoms),
        cell=wide(systems.cell, n_systems),
        pbc=wide(systems.pbc, n_systems),
        start=start,
        n_systems=torch.tensor(systems.n_systems),
    )


def count_candidates(
    cell: Tensor, pbc: Tensor, n_atoms: NDArray[np.int64], atom_cutoff: float
) -> NDArray[np.int64]:
    """Count the candidate pairs of crystals, [S]: what a batch of them needs room for."""
    return n_atoms**2 * _slots(_duals(cell, pbc), pbc, atom_cutoff).prod(1).numpy()


def build_graph(
    systems: SpareSystems, atom_cutoff: float, bond_cutoff: float, capacity: Capacity, n_candidates: int
) -> tuple[Batch, Tensor]:
    """Build the padded graph of a batch of crystals on their device.

    Args:
        systems: crystals, with the systems and atoms of `capacity`.
        atom_cutoff: radius of edges, A.
        bond_cutoff: radius of the short bonds that form angles, A.
        capacity: rows of the batch.
        n_candidates: room for candidate pairs, which the Triton body on GPUs does not need.

    Returns:
        The batch, and whether the crystals fitted, a bool scalar on the device. Where they did not, the
        batch is made of fillers.
    """
    if runtime.serves(systems.position):
        plain = partial(_build_in_torch, n_candidates=n_candidates)
        build = runtime.body("neighbors", "build_graph", plain, dtypes=(torch.float64,))
        return build(systems.position, systems, atom_cutoff, bond_cutoff, capacity)
    return _build_in_torch(systems.position, systems, atom_cutoff, bond_cutoff, capacity, n_candidates)


def _build_in_torch(
    position: Tensor,
    systems: SpareSystems,
    atom_cutoff: float,
    bond_cutoff: float,
    capacity: Capacity,
    n_candidates: int,
) -> tuple[Batch, Tensor]:
    """`build_graph` on any device, in some hundred operations."""
    search = _Search(systems, atom_cutoff, n_candidates)
    edges = _edges(search, bond_cutoff, capacity)
    short, n_angles = _short_edges(edges, capacity)
    n_bonds = edges.total // 2
    counts = Counts(
        systems=systems.n_systems,
        atoms=systems.start[-1],
        short_bonds=short.total // 2,
        long_bonds=n_bonds - short.total // 2,
        angles=n_angles,
    )
    fits = (search.n_found <= n_candidates) & _holds(capacity, counts)
    # fillers stand in for a graph with ends cut off, whose indices would lead outside the arrays
    counts = Counts(*(count * fits for count in counts))
    batch = Batch(
        atomic_number=systems.atomic_number,
        atom_system=search.atom_system,
        n_atoms=systems.start.diff(),
        system_start=systems.start,
        cell=systems.cell,
        volume=cell_volume(systems.cell, systems.pbc),
        **edges.fields,
        **short.fields,
        **_angles(short, capacity),
    )
    return fill(batch, counts, capacity), fits


def _holds(capacity: Capacity, counts: Counts) -> Tensor:
    """`Capacity.holds`, on the device."""
    spare = Counts(*(most - count for most, count in zip(capacity, counts, strict=True)))
    enough = torch.stack(list(spare)).min() >= 0
    return enough & (spare.systems >= 1) & (spare.atoms >= spare.systems) & (spare.short_bonds >= 1)


def _duals(cell: Tensor, pbc: Tensor) -> Tensor:
    """Vectors whose products with a position are its fractional coordinates, [S, 3, 3]; 1/h_k long.

    Directions without periodicity get a unit vector orthogonal to the periodic ones in place of whatever
    the cell says.
    """
    rows = list(torch.where(pbc[:, :, None], cell, 0.0).unbind(1))
    unit = torch.eye(3, dtype=cell.dtype, device=cell.device)
    for k in range(3):
        one, other = rows[k - 2], rows[k - 1]  # those behind k, in cyclic order
        # orthogonal to the two others if there are two, else to the one there is, else just any
        axis = unit.index_select(0, (one + other).abs().argmin(1))
        alone = cross(one + other, axis)
        both = cross(one, other)
        n_others = one.any(1).long() + other.any(1).long()
        choice = torch.where(
            (n_others == 2)[:, None], both, torch.where((n_others == 1)[:, None], alone, unit[k])
        )
        choice = choice / choice.norm(dim=1, keepdim=True)
        rows[k] = torch.where(pbc[:, k, None], rows[k], choice)
    normals = torch.stack([cross(rows[k - 2], rows[k - 1]) for k in range(3)], dim=1)
    return normals / (rows[0] * normals[:, 0]).sum(1)[:, None, None]


def _slots(duals: Tensor, pbc: Tensor, cutoff: float) -> Tensor:
    """Number of candidate images of every pair along each lattice vector, [S, 3]."""
    return torch.where(pbc, (2 * _reach(duals, cutoff)).floor().long() + 1, 1)


def _reach(duals: Tensor, cutoff: float) -> Tensor:
    """The cutoff in units of the distance between lattice planes, [S, 3]."""
    return cutoff * duals.norm(dim=2) + _SLACK


def _before(counts: Tensor) -> Tensor:
    """Sums of all counts before each, and of all, [n + 1]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _numbered(count: Tensor, length: int) -> Tensor:
    """Places of the first, second, ... of those that a running count counts, [length]."""
    number = torch.arange(1, length + 1, device=count.device)
    return torch.searchsorted(count, number).clamp(max=len(count) - 1)


class _Pairs(NamedTuple):
    """Ordered pairs of atoms with an image."""

    center: Tensor  # [P] the first atom
    neighbor: Tensor  # [P] the second one
    image: Tensor  # [P, 3]
    vector: Tensor  # [P, 3]
    reverse: Tensor  # [P] the candidate that is the reversed pair
    valid: Tensor  # [P] bool


class _Search:
    """The candidates of a batch, and which of them are edges."""

    def __init__(self, systems: SpareSystems, cutoff: float, n_candidates: int) -> None:
        self.systems, self.n_candidates = systems, n_candidates
        n_systems, n_atoms = len(systems.cell), len(systems.position)
        atom = torch.arange(n_atoms, device=systems.start.device)
        self.atom_system = torch.searchsorted(systems.start[1:], atom, right=True).clamp(max=n_systems - 1)
        duals = _duals(systems.cell, systems.pbc)
        self.reach, self.slots = _reach(duals, cutoff), _slots(duals, systems.pbc, cutoff)
        self.n_images = self.slots.prod(1)
        self.n_atoms = systems.start.diff()
        self.start = _before(self.n_atoms.square() * self.n_images)
        self.n_found = self.start[-1]
        periodic = systems.pbc.index_select(0, self.atom_system)
        fractional = (systems.position[:, None] * duals.index_select(0, self.atom_system)).sum(2)
        self.wrapped = torch.where(periodic, fractional.floor(), 0.0)
        self.fractional = fractional - self.wrapped
        pairs = self.pairs(torch.arange(n_candidates, device=atom.device))
        near = pairs.valid & (squared_length(pairs.vector) < cutoff**2)
        self.count = near.cumsum(0)

    def pairs(self, candidate: Tensor) -> _Pairs:
        """What candidates are."""
        system = torch.searchsorted(self.start[1:], candidate, right=True).clamp(max=len(self.n_atoms) - 1)
        first_atom, n_atoms, n_images = (
            table.index_select(0, system) for table in (self.systems.start, self.n_atoms, self.n_images)
        )
        slots, reach, pbc = (
            table.index_select(0, system) for table in (self.slots, self.reach, self.systems.pbc)
        )
        place = candidate - self.start.index_select(0, system)
        # crystals without atoms have no candidates, and those beyond the last are not valid
        pair, number = place // n_images, place % n_images
        i, j = pair // n_atoms.clamp(min=1), pair % n_atoms.clamp(min=1)
        last = len(self.atom_system) - 1
        center, neighbor = (first_atom + i).clamp(max=last), (first_atom + j).clamp(max=last)
        weight = torch.stack([slots[:, 1] * slots[:, 2], slots[:, 2], torch.ones_like(n_images)], dim=1)
        slot = number[:, None] // weight % slots
        difference = self._rows(self.fractional, neighbor) - self._rows(self.fractional, center)
        image = torch.where(pbc, (-reach - difference).ceil() + slot, 0.0)
        back = torch.where(pbc, -image - (-reach + difference).ceil(), 0.0).long()
        reverse = candidate - place + (j * n_atoms + i) * n_images + (back * weight).sum(1)
        itself = (i == j) & ~image.any(1)
        # as the cell tells, for atoms outside it
        shift = image + self._rows(self.wrapped, center) - self._rows(self.wrapped, neighbor)
        return _Pairs(
            center=center,
            neighbor=neighbor,
            image=shift.long(),
            vector=pair_vector(
                self._rows(self.systems.position, center),
                self._rows(self.systems.position, neighbor),
                shift,
                self.systems.cell.index_select(0, system),
            ),
            reverse=reverse.clamp(0, self.n_candidates - 1),
            valid=(candidate < self.n_found) & ~itself,
        )

    @staticmethod
    def _rows(table: Tensor, index: Tensor) -> Tensor:
        return table.index_select(0, index)


class _Edges(NamedTuple):
    """The edges of a batch, sorted by centre, and its bonds."""

    total: Tensor  # how many there are
    is_short: Tensor  # [E] bool
    fields: dict[str, Tensor]


def _edges(search: _Search, bond_cutoff: float, capacity: Capacity) -> _Edges:
    """Gather the true candidates, and number the bonds by the first of their edges, short ones first."""
    row = torch.arange(2 * capacity.bonds, device=search.count.device)
    pairs = search.pairs(_numbered(search.count, len(row)))
    count = search.count[-1]
    valid = row < count
    reverse = (search.count.index_select(0, pairs.reverse) - 1).clamp(0, len(row) - 1)
    is_first = valid & (row < reverse)
    is_short = valid & (squared_length(pairs.vector) < bond_cutoff**2)
    short, long = (is_first & is_short).cumsum(0), (is_first & ~is_short).cumsum(0)
    bond = torch.where(is_short, short, capacity.short_bonds + long) - 1
    edge = torch.cat([_numbered(short, capacity.short_bonds), _numbered(long, capacity.long_bonds)])
    atom = torch.arange(capacity.atoms + 1, device=row.device)
    fields = {
        "bond_vector": pairs.vector.index_select(0, edge),
        "bond_image": pairs.image.index_select(0, edge),
        "bond_center": pairs.center.index_select(0, edge),
        "bond_neighbor": pairs.neighbor.index_select(0, edge),
        "bond_edge": torch.stack([edge, reverse.index_select(0, edge)], dim=1),
        "pair_start": torch.arange(0, len(row) + 1, 2, device=row.device),
        "own_start": torch.arange(capacity.bonds + 1, device=row.device),
        "none_start": torch.zeros_like(atom),
        "edge_center": pairs.center,
        "edge_neighbor": pairs.neighbor,
        "edge_bond": bond.index_select(0, row.where(is_first, reverse)),
        "edge_sign": torch.where(is_first, 1, -1).to(torch.int8),
        "edge_reverse": reverse,
        "atom_edge": torch.searchsorted(pairs.center.where(valid, capacity.atoms), atom),
    }
    return _Edges(count, is_short, fields)


class _ShortEdges(NamedTuple):
    """The short edges of a batch, sorted by centre."""

    total: Tensor  # how many there are
    center: Tensor  # [K]
    first: Tensor  # [K] the first short edge at the same centre
    fields: dict[str, Tensor]


def _short_edges(edges: _Edges, capacity: Capacity) -> tuple[_ShortEdges, Tensor]:
    """Gather the short edges, and count their angles."""
    running = edges.is_short.cumsum(0)
    edge = _numbered(running, 2 * capacity.short_bonds)
    row = torch.arange(len(edge), device=edge.device)
    valid = row < running[-1]
    center = edges.fields["edge_center"].index_select(0, edge).where(valid, capacity.atoms)
    atom = torch.arange(capacity.atoms + 1, device=edge.device)
    atom_short = torch.searchsorted(center, atom)
    degree = atom_short.diff()
    others = torch.where(valid, degree.index_select(0, center.clamp(max=capacity.atoms - 1)) - 1, 0)
    start = _before(others)
    ends = edges.fields["bond_edge"][: capacity.short_bonds]
    fields = {
        "short_bond": edges.fields["edge_bond"].index_select(0, edge),
        "short_sign": edges.fields["edge_sign"].index_select(0, edge),
        "bond_short": (running - 1).index_select(0, ends.flatten()).view(-1, 2),
        "short_angle": start,
        "atom_angle": _before(degree * (degree - 1)),
    }
    return _ShortEdges(running[-1], center, atom_short.index_select(0, center), fields), start[-1]


def _angles(short: _ShortEdges, capacity: Capacity) -> dict[str, Tensor]:
    """All ordered pairs of different short edges at one centre."""
    row = torch.arange(capacity.angles, device=short.center.device)
    start = short.fields["short_angle"]
    last = len(short.center) - 1
    angle_i = torch.searchsorted(start[1:], row, right=True).clamp(max=last)
    first = short.first.index_select(0, angle_i)
    place_i = angle_i - first
    place_j = row - start.index_select(0, angle_i)
    place_j = place_j + (place_j >= place_i)  # leave out the diagonal
    angle_j = (first + place_j).clamp(max=last)
    return {
        "angle_center": short.center.index_select(0, angle_i),
        "angle_i": angle_i,
        "angle_j": angle_j,
        "angle_reverse": start.index_select(0, angle_j) + place_i - (place_i > place_j).long(),
    }
