# mypy: allow-untyped-defs, allow-incomplete-defs
"""The candidates of an atom, in Triton: lattices, images and vectors of `fastchgnet.device_graph`.

Vectors here are tuples of three. Multiplications and additions must not be fused (`enable_fp_fusion`):
whether a pair is nearer than the cutoff must not depend on who computes it.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SLACK = tl.constexpr(1e-9)


@triton.jit
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@triton.jit
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def _scaled(a, factor):
    return a[0] * factor, a[1] * factor, a[2] * factor


@triton.jit
def _chosen(condition, a, b):
    return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1]), tl.where(condition, a[2], b[2])


@triton.jit
def vector_of(table, row, live):
    at = table + row * 3
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + 1, mask=live, other=0.0),
        tl.load(at + 2, mask=live, other=0.0),
    )


@triton.jit
def _across(v):
    """A vector orthogonal to v: its product with the axis it has least of."""
    x, y, z = tl.abs(v[0]), tl.abs(v[1]), tl.abs(v[2])
    zero = x * 0
    rest = _chosen(y <= z, (-v[2], zero, v[0]), (v[1], -v[0], zero))
    return _chosen((x <= y) & (x <= z), (zero, v[2], -v[1]), rest)


@triton.jit
def _settled(row, periodic, one, other, unit):
    """A lattice vector, or a unit vector orthogonal to the two others where there is no periodicity."""
    has_one, has_other = _dot(one, one) > 0, _dot(other, other) > 0
    any_of_them = (one[0] + other[0], one[1] + other[1], one[2] + other[2])
    choice = _chosen(has_one | has_other, _across(any_of_them), unit)
    choice = _chosen(has_one & has_other, _cross(one, other), choice)
    length2 = _dot(choice, choice)
    choice = _scaled(choice, 1 / tl.sqrt(tl.where(length2 > 0, length2, 1.0)))
    return _chosen(periodic, row, choice)


@triton.jit
def _axis(one, other, volume, periodic, CUTOFF: tl.constexpr):
    """Of a lattice direction: what gives fractions, the cutoff in planes, and the images of a pair."""
    dual = _scaled(_cross(one, other), 1 / volume)
    reach = tl.full((), CUTOFF, tl.float64) * tl.sqrt(_dot(dual, dual)) + _SLACK
    return dual, reach, tl.where(periodic, tl.floor(2 * reach).to(tl.int32) + 1, 1)


@triton.jit
def lattice_of(raw, system, CUTOFF: tl.constexpr):
    """Lattice vectors, periodicity and axes of a system."""
    cell, pbc = raw.cell + system * 9, raw.pbc + system * 3
    periodic = tl.load(pbc) != 0, tl.load(pbc + 1) != 0, tl.load(pbc + 2) != 0
    zero = tl.full((), 0.0, tl.float64)
    one, none = zero + 1, (zero, zero, zero)
    rows = vector_of(cell, 0, True), vector_of(cell, 1, True), vector_of(cell, 2, True)
    a, b, c = (
        _chosen(periodic[0], rows[0], none),
        _chosen(periodic[1], rows[1], none),
        _chosen(periodic[2], rows[2], none),
    )
    a = _settled(a, periodic[0], b, c, (one, zero, zero))
    b = _settled(b, periodic[1], c, a, (zero, one, zero))
    c = _settled(c, periodic[2], a, b, (zero, zero, one))
    volume = _dot(a, _cross(b, c))
    axes = (
        _axis(b, c, volume, periodic[0], CUTOFF),
        _axis(c, a, volume, periodic[1], CUTOFF),
        _axis(a, b, volume, periodic[2], CUTOFF),
    )
    return rows, periodic, axes


@triton.jit
def _wrapped(position, axis, periodic):
    """Fraction of a position along an axis, less the whole cells, and how many these are."""
    fraction = _dot(axis[0], position)
    cells = tl.where(periodic, tl.floor(fraction), 0.0)
    return fraction - cells, cells


@triton.jit
def _image(number, difference, axis, periodic):
    """The image of a pair, counted from wrapped atoms, that has a number along an axis."""
    return tl.where(periodic, tl.ceil(-axis[1] - difference) + number.to(tl.float64), 0.0)


@triton.jit
def candidates(raw, lattice, here, atom, first_atom, n_atoms, place, live):
    """Some candidates of an atom: neighbour, image from wrapped atoms and as it is, vector, validity."""
    rows, periodic, axes = lattice
    n_1, n_2 = axes[1][2], axes[2][2]
    number = place % (axes[0][2] * n_1 * n_2)
    neighbor = first_atom + place // (axes[0][2] * n_1 * n_2)
    there = vector_of(raw.position, neighbor, live)
    f_0, w_0 = _wrapped(there, axes[0], periodic[0])
    f_1, w_1 = _wrapped(there, axes[1], periodic[1])
    f_2, w_2 = _wrapped(there, axes[2], periodic[2])
    g_0, u_0 = _wrapped(here, axes[0], periodic[0])
    g_1, u_1 = _wrapped(here, axes[1], periodic[1])
    g_2, u_2 = _wrapped(here, axes[2], periodic[2])
    image = (
        _image(number // (n_1 * n_2), f_0 - g_0, axes[0], periodic[0]),
        _image(number // n_2 % n_1, f_1 - g_1, axes[1], periodic[1]),
        _image(number % n_2, f_2 - g_2, axes[2], periodic[2]),
    )
    shift = (image[0] + u_0 - w_0, image[1] + u_1 - w_1, image[2] + u_2 - w_2)
    a, b, c = _scaled(rows[0], shift[0]), _scaled(rows[1], shift[1]), _scaled(rows[2], shift[2])
    vector = (
        (there[0] - here[0]) + ((a[0] + b[0]) + c[0]),
        (there[1] - here[1]) + ((a[1] + b[1]) + c[1]),
        (there[2] - here[2]) + ((a[2] + b[2]) + c[2]),
    )
    itself = (neighbor == atom) & (image[0] == 0) & (image[1] == 0) & (image[2] == 0)
    return neighbor, image, shift, vector, live & ~itself


@triton.jit
def is_first(atom, neighbor, image):
    """Whether an edge comes before its reverse."""
    ahead = (image[0] < 0) | ((image[0] == 0) & ((image[1] < 0) | ((image[1] == 0) & (image[2] < 0))))
    return (neighbor > atom) | ((neighbor == atom) & ahead)


@triton.jit
def _squared(v):
    return (v[0] * v[0] + v[1] * v[1]) + v[2] * v[2]


@triton.jit
def within(vector, CUTOFF_2: tl.constexpr):
    return _squared(vector) < tl.full((), CUTOFF_2, tl.float64)


@triton.jit
def place_of(raw, atom, room, SYSTEMS: tl.constexpr):
    """System of an atom, its first atom and number of atoms; none where the atom is no real one."""
    lane = tl.arange(0, SYSTEMS)
    start = tl.load(raw.start + lane + 1, mask=lane < room.systems, other=2**62)
    system = tl.minimum(tl.sum((start <= atom).to(tl.int32)), room.systems - 1)
    first = tl.load(raw.start + system)
    end = tl.load(raw.start + system + 1)
    # more atoms than there is room for are told later; here they must not be looked for
    n_atoms = tl.where(atom < end, tl.minimum(end, room.atoms) - first, 0)
    return system, first, n_atoms.to(tl.int32)
