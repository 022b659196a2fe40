# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton body of `fastchgnet.device_graph.build_graph`: count, scan, fill, join and pad, a launch each.

A program of the first and of the third kernel takes one atom and goes through its candidates in their order,
neighbour by neighbour and image by image, some at a time.

    count   edges, short edges, short and long bonds and angles of each atom
    scan    sums over the atoms before each, by PyTorch
    fill    edges, bonds and angles of each atom
    join    reverse edges, by their keys; what follows from them
    pad     fillers, and the arrays of systems and atoms
"""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.device_graph import SpareSystems
from fastchgnet.graph import Batch
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.neighbors_pad import (
    ANGLE,
    EDGE,
    LONG_BOND,
    N_COUNTS,
    SHORT_BOND,
    SHORT_EDGE,
    Raw,
    Rooms,
    n_blocks,
    pad_kernel,
    real_rows,
)
from fastchgnet.ops.gpu.neighbors_search import (
    candidates,
    is_first,
    lattice_of,
    place_of,
    vector_of,
    within,
)
from fastchgnet.padding import Capacity, field_lengths

BLOCK = 128
WARPS = 4
# A key holds the neighbour and the image, which the search numbers from the wrapped atoms: 10 bits an axis.
_MIDDLE = tl.constexpr(512)
_MASK = tl.constexpr(1023)
# An atom has fewer than 2^16 edges.
_SEARCHES = tl.constexpr(16)


@triton.jit(do_not_specialize=Rooms._fields)
def _count_kernel(
    raw,
    systems,
    atoms,
    short_bonds,
    long_bonds,
    angles,
    counts,
    CUTOFF: tl.constexpr,
    CUTOFF_2: tl.constexpr,
    SHORT_2: tl.constexpr,
    SYSTEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    room = Rooms(systems, atoms, short_bonds, long_bonds, angles)
    atom = tl.program_id(0).to(tl.int64)
    system, first_atom, n_atoms = place_of(raw, atom, room, SYSTEMS)
    lattice = lattice_of(raw, system, CUTOFF)
    here = vector_of(raw.position, atom, True)
    n_found = n_atoms * (lattice[2][0][2] * lattice[2][1][2] * lattice[2][2][2])
    lane = tl.arange(0, BLOCK)
    none = tl.zeros([BLOCK], tl.int32)
    edges, shorts, short_bonds, long_bonds = none, none, none, none
    done = n_found * 0
    while done < n_found:
        place = done + lane
        neighbor, image, _, vector, valid = candidates(
            raw, lattice, here, atom, first_atom, n_atoms, place, place < n_found
        )
        near, short = valid & within(vector, CUTOFF_2), valid & within(vector, SHORT_2)
        first = near & is_first(atom, neighbor, image)
        edges += near.to(tl.int32)
        shorts += short.to(tl.int32)
        short_bonds += (first & short).to(tl.int32)
        long_bonds += (first & ~short).to(tl.int32)
        done += BLOCK
    degree = tl.sum(shorts).to(tl.int64)
    tl.store(counts + EDGE * room.atoms + atom, tl.sum(edges).to(tl.int64))
    tl.store(counts + SHORT_EDGE * room.atoms + atom, degree)
    tl.store(counts + SHORT_BOND * room.atoms + atom, tl.sum(short_bonds).to(tl.int64))
    tl.store(counts + LONG_BOND * room.atoms + atom, tl.sum(long_bonds).to(tl.int64))
    tl.store(counts + ANGLE * room.atoms + atom, degree * (degree - 1))


@triton.jit
def _before(sums, kind, atom, room):
    """How many there are at the atoms before this one."""
    return tl.load(sums + kind * room.atoms + atom - 1, mask=atom > 0, other=0)


@triton.jit(do_not_specialize=Rooms._fields)
def _fill_kernel(
    raw,
    systems,
    atoms,
    short_bonds,
    long_bonds,
    angles,
    sums,
    out,
    CUTOFF: tl.constexpr,
    CUTOFF_2: tl.constexpr,
    SHORT_2: tl.constexpr,
    SYSTEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    room = Rooms(systems, atoms, short_bonds, long_bonds, angles)
    atom = tl.program_id(0).to(tl.int64)
    system, first_atom, n_atoms = place_of(raw, atom, room, SYSTEMS)
    lattice = lattice_of(raw, system, CUTOFF)
    here = vector_of(raw.position, atom, True)
    n_found = n_atoms * (lattice[2][0][2] * lattice[2][1][2] * lattice[2][2][2])
    lane = tl.arange(0, BLOCK)
    edge_0, short_0 = _before(sums, EDGE, atom, room), _before(sums, SHORT_EDGE, atom, room)
    bond_0 = _before(sums, SHORT_BOND, atom, room)
    long_0 = _before(sums, LONG_BOND, atom, room) + room.short_bonds
    angle_0 = _before(sums, ANGLE, atom, room)
    tl.store(out.atom_edge + atom, edge_0)
    tl.store(out.atom_angle + atom, angle_0)
    tl.store(out.atom_system + atom, system.to(tl.int64))
    degree = (tl.load(sums + SHORT_EDGE * room.atoms + atom) - short_0).to(tl.int32)
    _fill_angles(room, out, atom, short_0, degree, angle_0, BLOCK)
    done = n_found * 0
    while done < n_found:
        place = done + lane
        neighbor, image, shift, vector, valid = candidates(
            raw, lattice, here, atom, first_atom, n_atoms, place, place < n_found
        )
        near, short = valid & within(vector, CUTOFF_2), valid & within(vector, SHORT_2)
        first = near & is_first(atom, neighbor, image)
        short_first, long_first = first & short, first & ~short
        edge = edge_0 + tl.cumsum(near.to(tl.int32)) - 1
        short_edge = short_0 + tl.cumsum(short.to(tl.int32)) - 1
        short_bond = bond_0 + tl.cumsum(short_first.to(tl.int32)) - 1
        long_bond = long_0 + tl.cumsum(long_first.to(tl.int32)) - 1
        bond = tl.where(short, short_bond, long_bond)
        live = near & (edge < 2 * (room.short_bonds + room.long_bonds))
        tl.store(out.edge_center + edge, atom + 0 * edge, mask=live)
        tl.store(out.edge_neighbor + edge, neighbor, mask=live)
        tl.store(out.edge_sign + edge, tl.where(first, 1, -1).to(tl.int8), mask=live)
        tl.store(out.edge_bond + edge, tl.where(first, bond, -1), mask=live)
        tl.store(out.edge_key + edge, _key(neighbor, image), mask=live)
        tl.store(out.edge_short + edge, tl.where(short, short_edge, -1), mask=live)
        end = tl.where(short, room.short_bonds, room.short_bonds + room.long_bonds)
        live = first & (bond < end)
        tl.store(out.bond_center + bond, atom + 0 * bond, mask=live)
        tl.store(out.bond_neighbor + bond, neighbor, mask=live)
        for k in tl.static_range(3):
            tl.store(out.bond_vector + bond * 3 + k, vector[k], mask=live)
            tl.store(out.bond_image + bond * 3 + k, shift[k].to(tl.int64), mask=live)
        edge_0 += tl.sum(near.to(tl.int32))
        short_0 += tl.sum(short.to(tl.int32))
        bond_0 += tl.sum(short_first.to(tl.int32))
        long_0 += tl.sum(long_first.to(tl.int32))
        done += BLOCK


@triton.jit
def _key(neighbor, image):
    """What an edge is at its centre, ascending."""
    key = neighbor
    for k in tl.static_range(3):
        key = (key << 10) + (image[k].to(tl.int64) + _MIDDLE)
    return key


@triton.jit
def _fill_angles(room, out, atom, first, degree, angle_0, BLOCK: tl.constexpr):
    """The angles of an atom: all ordered pairs of different short edges."""
    lane = tl.arange(0, BLOCK)
    others = tl.maximum(degree - 1, 1)
    n_angles = degree * (degree - 1)
    done = degree * 0
    while done < degree:
        place = done + lane
        live = (place < degree) & (first + place < 2 * room.short_bonds)
        tl.store(out.short_angle + first + place, angle_0 + place * (degree - 1), mask=live)
        done += BLOCK
    done = degree * 0
    while done < n_angles:
        number = done + lane
        i, j = number // others, number % others
        j += (j >= i).to(tl.int32)
        angle = angle_0 + number
        live = (number < n_angles) & (angle < room.angles)
        tl.store(out.angle_center + angle, atom + 0 * angle, mask=live)
        tl.store(out.angle_i + angle, first + i, mask=live)
        tl.store(out.angle_j + angle, first + j, mask=live)
        tl.store(out.angle_reverse + angle, angle_0 + j * others + i - (i > j).to(tl.int32), mask=live)
        done += BLOCK


@triton.jit(do_not_specialize=Rooms._fields)
def _join_kernel(raw, systems, atoms, short_bonds, long_bonds, angles, sums, out, BLOCK: tl.constexpr):
    room = Rooms(systems, atoms, short_bonds, long_bonds, angles)
    n_bonds = room.short_bonds + room.long_bonds
    edge = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # none where they do not fit: edges without a reverse would be joined with those of other programs
    real, _ = real_rows(raw, room, sums)
    total = 2 * (real.short_bonds + real.long_bonds)
    live = edge < total
    center = tl.load(out.edge_center + edge, mask=live, other=0)
    neighbor = tl.load(out.edge_neighbor + edge, mask=live, other=0)
    key = tl.load(out.edge_key + edge, mask=live, other=0)
    image = (key >> 20 & _MASK) - _MIDDLE, (key >> 10 & _MASK) - _MIDDLE, (key & _MASK) - _MIDDLE
    wanted = _key(center, (-image[0], -image[1], -image[2]))
    low = tl.load(sums + EDGE * room.atoms + neighbor - 1, mask=live & (neighbor > 0), other=0)
    high = tl.load(sums + EDGE * room.atoms + neighbor, mask=live, other=0)
    for _ in tl.static_range(_SEARCHES):
        middle = (low + high) // 2
        found = tl.load(out.edge_key + middle, mask=live & (middle < total) & (low < high), other=2**62)
        low = tl.where((low < high) & (found < wanted), middle + 1, low)
        high = tl.where((low < high) & (found >= wanted), middle, high)
    reverse = tl.minimum(low, total - 1)
    tl.store(out.edge_reverse + edge, reverse, mask=live)
    first = edge < reverse
    bond = tl.load(out.edge_bond + tl.where(first, edge, reverse), mask=live, other=-1)
    tl.store(out.edge_bond + edge, bond, mask=live & ~first)
    live = live & (bond >= 0) & (bond < n_bonds)
    tl.store(out.bond_edge + 2 * bond + tl.where(first, 0, 1), edge, mask=live)
    short = tl.load(out.edge_short + edge, mask=live, other=-1)
    live = live & (short >= 0) & (short < 2 * room.short_bonds) & (bond < room.short_bonds)
    tl.store(out.short_bond + short, bond, mask=live)
    tl.store(out.short_sign + short, tl.where(first, 1, -1).to(tl.int8), mask=live)
    tl.store(out.bond_short + 2 * bond + tl.where(first, 0, 1), short, mask=live)


_FIELDS = [field.name for field in dataclasses.fields(Batch)]
_OWN = ["edge_key", "edge_short", "fits"]
Out: Any = namedtuple("Out", [*_FIELDS, *_OWN])  # type: ignore[misc]
"""What the kernels write: the fields of a batch, and what only they read."""

_SHAPES = {"cell": (3, 3), "bond_vector": (3,), "bond_image": (3,), "bond_edge": (2,), "bond_short": (2,)}
_DTYPES = {
    **dict.fromkeys(("cell", "volume", "bond_vector"), torch.float64),
    **dict.fromkeys(("edge_sign", "short_sign"), torch.int8),
    "fits": torch.bool,
}


def build_graph(
    position: Tensor, systems: SpareSystems, atom_cutoff: float, bond_cutoff: float, capacity: Capacity
) -> tuple[Batch, Tensor]:
    """See `fastchgnet.device_graph.build_graph`; there is no room for candidates to run out of."""
    device = position.device
    raw = Raw(*(getattr(systems, name).contiguous() for name in Raw._fields))
    out = _empty(capacity, device)
    counts = torch.empty(N_COUNTS, capacity.atoms, dtype=torch.int64, device=device)
    options = {
        "CUTOFF": atom_cutoff,
        "CUTOFF_2": atom_cutoff**2,
        "SHORT_2": bond_cutoff**2,
        "SYSTEMS": triton.next_power_of_2(capacity.systems),
        "BLOCK": BLOCK,
        "num_warps": WARPS,
        "enable_fp_fusion": False,
    }
    runtime.launch(_count_kernel, capacity.atoms, device, raw, *capacity, counts, **options)
    sums = counts.cumsum(1)
    runtime.launch(_fill_kernel, capacity.atoms, device, raw, *capacity, sums, out, **options)
    n_tiles = triton.cdiv(2 * capacity.bonds, BLOCK)
    runtime.launch(_join_kernel, n_tiles, device, raw, *capacity, sums, out, BLOCK=BLOCK, num_warps=WARPS)
    runtime.launch(
        pad_kernel,
        n_blocks(capacity, 2 * BLOCK),
        device,
        raw,
        *capacity,
        sums,
        out,
        BLOCK=2 * BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    *fields, _, _, fits = out
    return Batch(*fields), fits[0]


def _empty(capacity: Capacity, device: torch.device) -> Any:
    """Make room for everything that is written."""
    lengths = field_lengths(capacity)
    lengths |= {"edge_key": 2 * capacity.bonds, "edge_short": 2 * capacity.bonds, "fits": 1}
    names: list[str] = [*_FIELDS, *_OWN]
    return Out(
        *(
            torch.empty(
                lengths[name], *_SHAPES.get(name, ()), dtype=_DTYPES.get(name, torch.int64), device=device
            )
            for name in names
        )
    )
