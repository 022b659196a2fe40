# mypy: allow-untyped-defs, allow-incomplete-defs
"""Fillers of a batch built on a GPU: `fastchgnet.padding.fill` as one kernel, which also finishes the rest.

A program takes some rows of one kind: systems, atoms, bonds, edges, short edges or angles. Symbols are those
of `padding._Ghosts`. Where the crystals do not fit, all rows become fillers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastchgnet.padding import GHOST_ATOM, GHOST_LENGTH, Capacity

EDGE, SHORT_EDGE, SHORT_BOND, LONG_BOND, ANGLE = (tl.constexpr(kind) for kind in range(5))
"""Rows of the sums over atoms."""
N_COUNTS = 5

_ATOM, _LENGTH = tl.constexpr(GHOST_ATOM), tl.constexpr(GHOST_LENGTH)


class Raw(NamedTuple):
    """Crystals, as in `device_graph.SpareSystems`."""

    atomic_number: Any
    position: Any
    cell: Any
    pbc: Any
    start: Any
    n_systems: Any


class Rooms(NamedTuple):
    """The capacity: what the kernels must not write beyond.

    Kernels put it together: in a tuple that they are given, every new number could be compiled for.
    """

    systems: Any
    atoms: Any
    short_bonds: Any
    long_bonds: Any
    angles: Any


@triton.jit
def _total(sums, kind, room):
    return tl.load(sums + kind * room.atoms + room.atoms - 1)


@triton.jit
def real_rows(raw, room, sums):
    """Real rows of each kind, none where they do not fit, and whether they do."""
    systems, atoms = tl.load(raw.n_systems), tl.load(raw.start + room.systems)
    short, long = _total(sums, SHORT_BOND, room), _total(sums, LONG_BOND, room)
    angles = _total(sums, ANGLE, room)
    fits = (systems < room.systems) & (room.atoms - atoms >= room.systems - systems)
    fits &= (short < room.short_bonds) & (long <= room.long_bonds) & (angles <= room.angles)
    return Rooms(
        tl.where(fits, systems, 0),
        tl.where(fits, atoms, 0),
        tl.where(fits, short, 0),
        tl.where(fits, long, 0),
        tl.where(fits, angles, 0),
    ), fits


@triton.jit
def _ceil(numerator, denominator):
    return (numerator + denominator - 1) // denominator


@triton.jit
def _systems(raw, room, real, out, row):
    live = row <= room.systems
    last = room.systems - 1
    ghost = row - real.systems
    ghost_start = tl.where(row <= last, real.atoms + ghost, room.atoms)
    start = tl.where(ghost < 0, tl.load(raw.start + row, mask=live, other=0), ghost_start)
    following = tl.where(row + 1 <= last, real.atoms + ghost + 1, room.atoms)
    end = tl.where(ghost + 1 < 0, tl.load(raw.start + row + 1, mask=row < room.systems, other=0), following)
    tl.store(out.system_start + row, start, mask=live)
    live = row < room.systems
    tl.store(out.n_atoms + row, end - start, mask=live)
    for k in tl.static_range(9):
        value = tl.load(raw.cell + row * 9 + k, mask=live & (ghost < 0), other=0.0)
        cube = tl.full((), _LENGTH if k % 4 == 0 else 0.0, tl.float64)
        tl.store(out.cell + row * 9 + k, tl.where(ghost < 0, value, cube), mask=live)
    tl.store(out.volume + row, _volume(raw, row, live & (ghost < 0)), mask=live)


@triton.jit
def _volume(raw, row, live):
    """`neighbors.cell_volume`, in its order; NaN where not live."""
    at = raw.cell + row * 9
    a_x, a_y, a_z = (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + 1, mask=live, other=0.0),
        tl.load(at + 2, mask=live, other=0.0),
    )
    b_x, b_y, b_z = (
        tl.load(at + 3, mask=live, other=0.0),
        tl.load(at + 4, mask=live, other=0.0),
        tl.load(at + 5, mask=live, other=0.0),
    )
    c_x, c_y, c_z = (
        tl.load(at + 6, mask=live, other=0.0),
        tl.load(at + 7, mask=live, other=0.0),
        tl.load(at + 8, mask=live, other=0.0),
    )
    x, y, z = a_x * (b_y * c_z - b_z * c_y), a_y * (b_z * c_x - b_x * c_z), a_z * (b_x * c_y - b_y * c_x)
    for k in tl.static_range(3):
        live &= tl.load(raw.pbc + row * 3 + k, mask=live, other=0) != 0
    return tl.where(live, tl.abs((x + y) + z), float("nan"))


@triton.jit
def _atoms(raw, room, real, sums, out, row, ghosts):
    atoms, bonds, short, angles = ghosts
    ghost = row - real.atoms
    live = row < room.atoms
    number = tl.load(raw.atomic_number + row, mask=live & (ghost < 0), other=_ATOM)
    tl.store(out.atomic_number + row, number, mask=live)
    system = tl.minimum(real.systems + ghost, room.systems - 1)
    tl.store(out.atom_system + row, system, mask=live & (ghost >= 0))
    tl.store(out.none_start + row, 0 * row, mask=row <= room.atoms)
    live = (row <= room.atoms) & (ghost >= 0)
    edges = 2 * _ceil(ghost * bonds, atoms)
    tl.store(out.atom_edge + row, 2 * (real.short_bonds + real.long_bonds) + edges, mask=live)
    first_angle = _ceil(tl.minimum(edges, 2 * short) * angles, 2 * short)
    tl.store(out.atom_angle + row, real.angles + first_angle, mask=live)


@triton.jit
def _bonds(room, real, out, row, ghosts):
    atoms, bonds, short, _ = ghosts
    is_short = row < room.short_bonds
    number = tl.where(is_short, row - real.short_bonds, row - real.short_bonds - real.long_bonds)
    live = tl.where(is_short, number >= 0, number >= short) & (row < room.short_bonds + room.long_bonds)
    atom = real.atoms + number * atoms // bonds
    edge = 2 * (real.short_bonds + real.long_bonds) + 2 * number
    tl.store(out.bond_center + row, atom, mask=live)
    tl.store(out.bond_neighbor + row, atom, mask=live)
    for k in tl.static_range(3):
        along = (row * 0 + k == 0).to(tl.int64)
        tl.store(out.bond_image + row * 3 + k, along, mask=live)
        tl.store(out.bond_vector + row * 3 + k, _LENGTH * along.to(tl.float64), mask=live)
    in_start = row <= room.short_bonds + room.long_bonds
    tl.store(out.pair_start + row, 2 * row, mask=in_start)
    tl.store(out.own_start + row, row, mask=in_start)
    live_short = live & is_short
    for k in tl.static_range(2):
        tl.store(out.bond_edge + row * 2 + k, edge + k, mask=live)
        tl.store(out.bond_short + row * 2 + k, 2 * row + k, mask=live_short)


@triton.jit
def _edges(room, real, out, row, ghosts):
    atoms, bonds, short, _ = ghosts
    first = 2 * (real.short_bonds + real.long_bonds)
    ghost = row - first
    live = (ghost >= 0) & (row < 2 * (room.short_bonds + room.long_bonds))
    number = ghost // 2
    atom = real.atoms + number * atoms // bonds
    bond = number + real.short_bonds + tl.where(number >= short, real.long_bonds, 0)
    tl.store(out.edge_center + row, atom, mask=live)
    tl.store(out.edge_neighbor + row, atom, mask=live)
    tl.store(out.edge_bond + row, bond, mask=live)
    tl.store(out.edge_sign + row, (1 - 2 * (ghost % 2)).to(tl.int8), mask=live)
    tl.store(out.edge_reverse + row, first + (ghost ^ 1), mask=live)


@triton.jit
def _short_edges(room, real, out, row, ghosts):
    _, _, short, angles = ghosts
    ghost = row - 2 * real.short_bonds
    live = (ghost >= 0) & (row < 2 * room.short_bonds)
    tl.store(out.short_bond + row, real.short_bonds + ghost // 2, mask=live)
    tl.store(out.short_sign + row, (1 - 2 * (ghost % 2)).to(tl.int8), mask=live)
    live = (ghost >= 0) & (row <= 2 * room.short_bonds)
    tl.store(out.short_angle + row, real.angles + _ceil(ghost * angles, 2 * short), mask=live)


@triton.jit
def _angles(room, real, out, row, ghosts):
    atoms, bonds, short, angles = ghosts
    ghost = row - real.angles
    live = (ghost >= 0) & (row < room.angles)
    edge = ghost * (2 * short) // tl.maximum(angles, 1)
    center = real.atoms + (edge // 2) * atoms // bonds
    tl.store(out.angle_center + row, center, mask=live)
    tl.store(out.angle_i + row, 2 * real.short_bonds + edge, mask=live)
    tl.store(out.angle_j + row, 2 * real.short_bonds + edge, mask=live)
    tl.store(out.angle_reverse + row, row, mask=live)


@triton.jit(do_not_specialize=Rooms._fields)
def pad_kernel(raw, systems, atoms, short_bonds, long_bonds, angles, sums, out, BLOCK: tl.constexpr):
    """Write the fillers, and systems and atoms altogether."""
    room = Rooms(systems, atoms, short_bonds, long_bonds, angles)
    real, fits = real_rows(raw, room, sums)
    ghosts = (
        room.atoms - real.atoms,
        room.short_bonds + room.long_bonds - real.short_bonds - real.long_bonds,
        room.short_bonds - real.short_bonds,
        room.angles - real.angles,
    )
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    bonds = room.short_bonds + room.long_bonds
    if block == 0:
        tl.store(out.fits, fits)
    lengths = (room.systems + 1, room.atoms + 1, bonds + 1, 2 * bonds, 2 * room.short_bonds + 1, room.angles)
    for kind in tl.static_range(6):
        n_blocks = tl.cdiv(lengths[kind], BLOCK)
        if (block >= 0) & (block < n_blocks):
            row = block.to(tl.int64) * BLOCK + lane
            if kind == 0:
                _systems(raw, room, real, out, row)
            elif kind == 1:
                _atoms(raw, room, real, sums, out, row, ghosts)
            elif kind == 2:
                _bonds(room, real, out, row, ghosts)
            elif kind == 3:
                _edges(room, real, out, row, ghosts)
            elif kind == 4:
                _short_edges(room, real, out, row, ghosts)
            else:
                _angles(room, real, out, row, ghosts)
        block -= n_blocks


def n_blocks(room: Capacity, block: int) -> int:
    """Programs that the kernel needs."""
    bonds = room.bonds
    lengths = room.systems + 1, room.atoms + 1, bonds + 1, 2 * bonds, 2 * room.short_bonds + 1, room.angles
    return sum(-(-length // block) for length in lengths)
