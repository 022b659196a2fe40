# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.angular_basis` in fp32; symbols as there.

Forward, a program takes a tile of angles. Backward, it takes some short edges, four of their angles at a
time: an angle and its reverse have the same functions, so their gradients are added before anything else
and no sum needs atomic additions or a second launch. A program's share of the frequencies' gradient is one
row of [programs, F], which are then added up in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import angular_basis
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.trigonometry import angle, sine_and_cosine

ROWS = 64
EDGES = 8
STEP = 4
WARPS = 4
K = tl.constexpr(angular_basis.K)
REST = tl.constexpr(1 - angular_basis.K**2)
SCALE = tl.constexpr(1 / math.sqrt(math.pi))
CONSTANT = tl.constexpr(1 / math.sqrt(2 * math.pi))


class Angles(NamedTuple):
    """What all kernels read."""

    short_edge: Any  # [K, 3]
    frequency: Any  # [F], or None for Chebyshev polynomials
    i: Any  # [T]
    start: Any  # [K + 1]
    j: Any  # [T]
    reverse: Any  # [T]


@triton.jit
def _vector(table, row, live):
    """Read rows of [K, 3], and no zero where there is no row."""
    at = table + row * 3
    x = tl.load(at, mask=live, other=1.0)
    return x, tl.load(at + 1, mask=live, other=1.0), tl.load(at + 2, mask=live, other=1.0)


@triton.jit
def _inner(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@triton.jit
def _added(a, factor, b):
    return a[0] + factor * b[0], a[1] + factor * b[1], a[2] + factor * b[2]


@triton.jit
def _divided(a, b):
    # a true division: a product could be merged into a difference, which must be exact where it is small
    return tl.div_rn(a[0], b), tl.div_rn(a[1], b), tl.div_rn(a[2], b)


@triton.jit
def _unit(table, row, live):
    vector = _vector(table, row, live)
    length = tl.sqrt_rn(_inner(vector, vector))
    return _divided(vector, length), length


@triton.jit
def _opening(unit_i, unit_j):
    """Return w, s, c and 1 - c^2."""
    sign = tl.where(_inner(unit_i, unit_j) < 0, -1.0, 1.0)
    w = _added(unit_j, -sign, unit_i)
    rest = 0.5 * _inner(w, w)
    return w, sign, sign * (1 - rest), rest * (2 - rest)


@triton.jit
def _slope_of_cosine(w, unit, length):
    """p, from u_j - s u_i, the unit vector i and its length."""
    return _divided(_added(w, -_inner(unit, w), unit), length)


@triton.jit
def _phi(cosine, sine2):
    q = tl.sqrt_rn(K * K * sine2 + REST)
    return angle(q, K * cosine), q


@triton.jit
def _waves(angles, phi, F: tl.constexpr):
    """Sines and cosines [rows, F] with their frequencies."""
    column = tl.arange(0, triton.next_power_of_2(F))
    f = tl.load(angles.frequency + column, mask=column < F, other=0.0)[None, :]
    sine, cosine = sine_and_cosine(phi[:, None] * f)
    return sine, cosine, f


@triton.jit
def _polynomials(cosine, N: tl.constexpr):
    """Return T, T' and T'' [rows, N]."""
    column = tl.arange(0, triton.next_power_of_2(N))[None, :]
    t, t_before = cosine, cosine * 0 + 1
    d, d_before = t_before, cosine * 0
    d2, d2_before = d_before, d_before
    all_t = tl.where(column == 1, t[:, None], tl.where(column == 0, 0.7071067811865476, 0.0))
    all_d = tl.where(column == 1, d[:, None], 0.0)
    all_d2 = all_d * 0
    for n in tl.static_range(2, N):
        d2, d2_before = 2 * cosine * d2 + 4 * d - d2_before, d2
        d, d_before = 2 * cosine * d + 2 * t - d_before, d
        t, t_before = 2 * cosine * t - t_before, t
        all_t = tl.where(column == n, t[:, None], all_t)
        all_d = tl.where(column == n, d[:, None], all_d)
        all_d2 = tl.where(column == n, d2[:, None], all_d2)
    return all_t * SCALE, all_d * SCALE, all_d2 * SCALE


@triton.jit
def _at(row, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """Where columns FIRST to FIRST + WIDTH of rows of [T, N] are."""
    column = tl.arange(0, triton.next_power_of_2(WIDTH))
    return row[:, None] * N + (FIRST + column)[None, :], live[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _both(grad, row, reverse, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """Read the gradients of angles and add those of their reverses."""
    at, inside = _at(row, live, FIRST, WIDTH, N)
    found = tl.load(grad + at, mask=inside, other=0.0)
    at, inside = _at(reverse, live, FIRST, WIDTH, N)
    return found + tl.load(grad + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(angles, out, n_rows, N: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < n_rows
    unit_i, _ = _unit(angles.short_edge, tl.load(angles.i + row, mask=live, other=0), live)
    unit_j, _ = _unit(angles.short_edge, tl.load(angles.j + row, mask=live, other=0), live)
    _, _, cosine, sine2 = _opening(unit_i, unit_j)
    if angles.frequency is None:
        at, inside = _at(row, live, 0, N, N)
        values, _, _ = _polynomials(cosine, N)
        tl.store(out + at, values, mask=inside)
    else:
        F: tl.constexpr = N // 2
        phi, _ = _phi(cosine, sine2)
        sine, cosine, _ = _waves(angles, phi, F)
        tl.store(out + row * N, tl.full([BLOCK], CONSTANT, tl.float32), mask=live)
        at, inside = _at(row, live, 1, F, N)
        tl.store(out + at, sine * SCALE, mask=inside)
        tl.store(out + at + F, cosine * SCALE, mask=inside)


@triton.jit
def _edges(angles, n_edges, EDGES: tl.constexpr, STEP: tl.constexpr):
    """Return the short edge of each lane, its angles, and the most angles that any has."""
    lane = tl.arange(0, EDGES * STEP)
    i = tl.program_id(0).to(tl.int64) * EDGES + lane // STEP
    live = i < n_edges
    first = tl.load(angles.start + i, mask=live, other=0)
    end = tl.load(angles.start + i + 1, mask=live, other=0)
    return i, live, first + lane % STEP, end, tl.max(end - first)


@triton.jit
def _no_vector(length):
    none = length * 0
    return none, none, none


@triton.jit
def _store_edges(out, total, n_edges, EDGES: tl.constexpr, STEP: tl.constexpr):
    """Add up the lanes of each short edge."""
    i = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    for axis in tl.static_range(3):
        found = tl.sum(total[axis].reshape([EDGES, STEP]), 1)
        tl.store(out + i * 3 + axis, found, mask=i < n_edges)


@triton.jit
def _store_share(shares, share, F: tl.constexpr):
    if shares is not None:
        column = tl.arange(0, triton.next_power_of_2(F))
        # each angle was counted with its reverse
        tl.store(shares + tl.program_id(0) * F + column, 0.5 * share, mask=column < F)


@triton.jit(do_not_specialize=["n_edges"])
def _backward_kernel(
    grad, angles, by_edge, shares, n_edges, N: tl.constexpr, EDGES: tl.constexpr, STEP: tl.constexpr
):
    F: tl.constexpr = N // 2
    i, live, row, end, longest = _edges(angles, n_edges, EDGES, STEP)
    unit_i, length_i = _unit(angles.short_edge, i, live)
    total = _no_vector(length_i)
    share = tl.zeros([triton.next_power_of_2(F)], tl.float32)
    done = longest * 0
    while done < longest:
        inside = row < end
        reverse = tl.load(angles.reverse + row, mask=inside, other=0)
        unit_j, _ = _unit(angles.short_edge, tl.load(angles.j + row, mask=inside, other=0), inside)
        w, _, cosine, sine2 = _opening(unit_i, unit_j)
        if angles.frequency is None:
            _, slopes, _ = _polynomials(cosine, N)
            g = tl.sum(_both(grad, row, reverse, inside, 0, N, N) * slopes, 1)
        else:
            phi, q = _phi(cosine, sine2)
            sines, cosines, f = _waves(angles, phi, F)
            of_sine = _both(grad, row, reverse, inside, 1, F, N)
            m = SCALE * (of_sine * cosines - _both(grad, row, reverse, inside, 1 + F, F, N) * sines)
            g = tl.div_rn(-K, q) * tl.sum(m * f, 1)
            if shares is not None:
                share += tl.sum(m * phi[:, None], 0)
        total = _added(total, g, _slope_of_cosine(w, unit_i, length_i))
        row += STEP
        done += STEP
    _store_edges(by_edge, total, n_edges, EDGES, STEP)
    _store_share(shares, share, F)


@triton.jit
def _turning(table, row, live, unit, length):
    """Read how vectors change; return it, with the changes of their directions and lengths."""
    change = _vector(table, row, live)
    longer = _inner(unit, change)
    return change, _divided(_added(change, -longer, unit), length), longer


@triton.jit(do_not_specialize=["n_edges"])
def _second_kernel(
    cotangent,
    grad,
    angles,
    by_grad,
    by_edge,
    shares,
    n_edges,
    N: tl.constexpr,
    EDGES: tl.constexpr,
    STEP: tl.constexpr,
):
    F: tl.constexpr = N // 2
    i, live, row, end, longest = _edges(angles, n_edges, EDGES, STEP)
    unit_i, length_i = _unit(angles.short_edge, i, live)
    change_i, turn_i, longer_i = _turning(cotangent, i, live, unit_i, length_i)
    total = _no_vector(length_i)
    share = tl.zeros([triton.next_power_of_2(F)], tl.float32)
    done = longest * 0
    while done < longest:
        inside = row < end
        reverse = tl.load(angles.reverse + row, mask=inside, other=0)
        j = tl.load(angles.j + row, mask=inside, other=0)
        unit_j, length_j = _unit(angles.short_edge, j, inside)
        change_j, turn_j, _ = _turning(cotangent, j, inside, unit_j, length_j)
        w, sign, cosine, sine2 = _opening(unit_i, unit_j)
        p_i = _slope_of_cosine(w, unit_i, length_i)
        # seen from j, w is u_i - s u_j = -s w
        p_j = _slope_of_cosine((-sign * w[0], -sign * w[1], -sign * w[2]), unit_j, length_j)
        c_dot = _inner(p_i, change_i) + _inner(p_j, change_j)
        if angles.frequency is None:
            _, slopes, curvatures = _polynomials(cosine, N)
            both = _both(grad, row, reverse, inside, 0, N, N)
            g, curvature = tl.sum(both * slopes, 1), tl.sum(both * curvatures, 1)
            at, stored = _at(row, inside, 0, N, N)
            tl.store(by_grad + at, c_dot[:, None] * slopes, mask=stored)
        else:
            phi, q = _phi(cosine, sine2)
            slope = tl.div_rn(-K, q)
            sines, cosines, f = _waves(angles, phi, F)
            of_sine = _both(grad, row, reverse, inside, 1, F, N)
            of_cosine = _both(grad, row, reverse, inside, 1 + F, F, N)
            m = SCALE * (of_sine * cosines - of_cosine * sines)
            n = SCALE * (of_sine * sines + of_cosine * cosines)
            by_phi = tl.sum(m * f, 1)
            g = slope * by_phi
            curvature = slope * slope * (cosine * slope * by_phi - tl.sum(n * f * f, 1))
            along = c_dot * slope
            tl.store(by_grad + row * N, length_i * 0, mask=inside)
            at, stored = _at(row, inside, 1, F, N)
            tl.store(by_grad + at, SCALE * along[:, None] * f * cosines, mask=stored)
            tl.store(by_grad + at + F, -SCALE * along[:, None] * f * sines, mask=stored)
            share += tl.sum(along[:, None] * (m - phi[:, None] * f * n), 0)
        turned = _added(_added(turn_j, -cosine, turn_i), -c_dot, unit_i)
        p_dot = _divided(_added(turned, -longer_i, p_i), length_i)
        total = _added(_added(total, c_dot * curvature, p_i), g, p_dot)
        row += STEP
        done += STEP
    _store_edges(by_edge, total, n_edges, EDGES, STEP)
    _store_share(shares, share, F)


class _Launch:
    """Kernels of one op call."""

    def __init__(self, short_edge: Tensor, rest: tuple[Any, ...]) -> None:
        *angles, self.n_functions = (short_edge, *rest)
        self.angles = Angles(*(None if t is None else t.contiguous() for t in angles))
        self.n_edges, self.n_rows = len(short_edge), len(self.angles.i)

    def shares(self) -> Tensor | None:
        """Make a program's share of the frequencies' gradient, for each."""
        f = self.angles.frequency
        return None if f is None else f.new_empty(self._n_programs(), len(f))

    def _n_programs(self) -> int:
        return max(1, triton.cdiv(self.n_edges, EDGES))

    def over_angles(self, kernel: Any, *args: Any) -> None:
        n_programs = max(1, triton.cdiv(self.n_rows, ROWS))
        self._run(kernel, n_programs, *args, self.n_rows, BLOCK=ROWS)

    def over_edges(self, kernel: Any, *args: Any) -> None:
        self._run(kernel, self._n_programs(), *args, self.n_edges, EDGES=EDGES, STEP=STEP)

    def _run(self, kernel: Any, n_programs: int, *args: Any, **options: Any) -> None:
        device = self.angles.short_edge.device
        runtime.launch(kernel, n_programs, device, *args, N=self.n_functions, num_warps=WARPS, **options)


def forward(short_edge: Tensor, *rest: Any) -> Tensor:
    launch = _Launch(short_edge, rest)
    out = short_edge.new_empty(launch.n_rows, launch.n_functions)
    launch.over_angles(_forward_kernel, launch.angles, out)
    return out


def backward(with_parameters: bool, grad: Tensor, short_edge: Tensor, *rest: Any) -> list[Tensor | None]:
    launch = _Launch(short_edge, rest)
    by_edge, shares = short_edge.new_empty(short_edge.shape), launch.shares() if with_parameters else None
    launch.over_edges(_backward_kernel, grad.contiguous(), launch.angles, by_edge, shares)
    return [by_edge, None if shares is None else shares.sum(0)]


def backward_backward(
    cotangents: tuple[Tensor], grad: Tensor, short_edge: Tensor, *rest: Any
) -> list[Tensor | None]:
    launch = _Launch(short_edge, rest)
    by_grad, by_edge, shares = (
        grad.new_empty(grad.shape),
        short_edge.new_empty(short_edge.shape),
        launch.shares(),
    )
    cotangent = cotangents[0].contiguous()
    launch.over_edges(_second_kernel, cotangent, grad.contiguous(), launch.angles, by_grad, by_edge, shares)
    return [by_grad, by_edge, None if shares is None else shares.sum(0)]
