"""Angular basis of pairs of short edges: a Fourier series with learnable frequencies, or Chebyshev's.

Angle t lies between the short edges i and j, r[K, 3], of one centre; the angle with i and j exchanged is
another row, its reverse. With unit vectors u, c = cos theta = u_i . u_j and o = 1 / sqrt(pi):

    Fourier     y = o (1 / sqrt 2, sin(f_k phi), cos(f_k phi)),   phi = atan2(q, k c),  q = sqrt(1 - k^2 c^2)
    Chebyshev   y = o (1 / sqrt 2, T_1(c), T_2(c), ...)           T_n(c) = cos(n theta)

Published weights know the angle as phi = acos(k c) with k = 1 - 1e-6, whose derivative is finite at
collinear angles: phi' = -k / q and phi'' = -k^3 c / q^3 by c. There neither c nor u_j - c u_i have digits
left in float32, so all comes from w = u_j - s u_i with s = sign c, a difference that is exact where it is
small: 1 - |c| = |w|^2 / 2 = h, c = s (1 - h), 1 - c^2 = h (2 - h), u_j - c u_i = w - (u_i . w) u_i.

Derivatives by r go through c alone. With a dot for the change along any dr:

    c. = p_i . dr_i + p_j . dr_j,     p_i = (u_j - c u_i) / |r_i|,   p_j that of the reverse
    p_i. = (u_j. - c. u_i - c u_i.) / |r_i| - p_i |r_i|. / |r_i|,    u. = (dr - u |r|.) / |r|,  |r|. = u . dr

VJP, with a gradient G of y and g = G . dy/dc:

    dr = sum over angles of i of (g + g of the reverse) p_i
    Fourier: g = phi' M . f,  df = sum over rows of phi M,   M = o (G_sin cos(f phi) - G_cos sin(f phi))

VJP of the VJP, with the cotangent V of dr, along which everything is now dotted: the loss is sum g c., so

    G~ = c. dy/dc
    r~ = sum over angles of i of (h + h of the reverse) p_i + (g + g of the reverse) p_i.
    h  = c. G . d2y/dc2
    Fourier: G . d2y/dc2 = phi'' M . f - phi'^2 N . f^2,     N = o (G_sin sin(f phi) + G_cos cos(f phi))
             f~ = sum over rows of c. phi' (M - phi f N)

since the second derivative of c is symmetric: the VJP of c. is the tangent of p. Saved: the inputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastchgnet.graph import Index
from fastchgnet.ops._register import Family, adding
from fastchgnet.ops.cpu import bases
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.segments import sum_rows

K = 1 - 1e-6
"""The factor of the cosine in published weights."""

_SCALE = 1 / math.sqrt(math.pi)


def angular_basis(
    short_edge: Tensor, frequency: Tensor | None, n_functions: int, by_i: Index, by_j: Index
) -> Tensor:
    """Expand angles between short edges.

    Args:
        short_edge: [K, 3] vectors from the centre, A.
        frequency: [F] of a Fourier series of n_functions = 1 + 2 F; None for Chebyshev polynomials.
        n_functions: how many functions.
        by_i: angles by their first short edge, sorted.
        by_j: angles by their second short edge; its `order` lists the reverse of every angle.

    Returns:
        [T, n_functions].
    """
    return _family(short_edge, frequency, by_i.segment, by_i.start, by_j.segment, by_j.order, n_functions)


def reference(
    short_edge: Tensor, frequency: Tensor | None, n_functions: int, by_i: Index, by_j: Index
) -> Tensor:
    """Compute the op in plain PyTorch, differentiable to any order."""
    unit = short_edge / short_edge.norm(dim=1, keepdim=True)
    cosine = (unit[by_i.segment] * unit[by_j.segment]).sum(1)
    if frequency is None:
        return _scaled(_chebyshev(cosine[:, None], n_functions))
    phase = torch.acos(K * cosine)[:, None] * frequency
    return _scaled([torch.ones_like(phase[:, :1]), phase.sin(), phase.cos()])


def _scaled(columns: list[Tensor]) -> Tensor:
    """Put the constant function and the others, [T, *] each, side by side."""
    constant, *others = columns
    return torch.cat([constant / math.sqrt(2), *others], dim=1) * _SCALE


def _chebyshev(cosine: Tensor, n: int) -> list[Tensor]:
    """T_0 to T_{n-1}, [T, 1] each."""
    terms = [torch.ones_like(cosine), cosine]
    while len(terms) < n:
        terms.append(2 * cosine * terms[-1] - terms[-2])
    return terms[:n]


class _Angles:
    """Geometry of all angles, and its change along vectors of the short edges."""

    def __init__(self, short_edge: Tensor, i: Tensor, start: Tensor, j: Tensor, reverse: Tensor) -> None:
        self.i, self.start, self.j, self.reverse = i, start, j, reverse
        self.length = short_edge.norm(dim=1, keepdim=True)
        self.unit = short_edge / self.length
        self.unit_i, unit_j = self.unit.index_select(0, i), self.unit.index_select(0, j)
        sign = torch.where((self.unit_i * unit_j).sum(1, keepdim=True) < 0, -1.0, 1.0).to(unit_j)
        w = unit_j - sign * self.unit_i
        # one minus the modulus of the cosine
        rest = w.square().sum(1, keepdim=True) / 2
        self.cosine, self.sine2 = sign * (1 - rest), rest * (2 - rest)
        across = w - (self.unit_i * w).sum(1, keepdim=True) * self.unit_i
        self.length_i = self.length.index_select(0, i)
        self.p_i = across / self.length_i

    def both(self, rows: Tensor) -> Tensor:
        """Add to each angle its reverse."""
        return rows + rows.index_select(0, self.reverse)

    def summed(self, rows_T3: Tensor) -> Tensor:
        """Sum over the angles of each short edge, [K, 3]."""
        return sum_rows(rows_T3, self.start, None)

    def tangent(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Change of the cosine, [T, 1], and of p_i, [T, 3], along [K, 3]."""
        longer = (self.unit * change).sum(1, keepdim=True)
        turn = (change - self.unit * longer) / self.length
        c_dot = self.both((self.p_i * change.index_select(0, self.i)).sum(1, keepdim=True))
        p_dot = turn.index_select(0, self.j) - self.cosine * turn.index_select(0, self.i)
        p_dot = p_dot - c_dot * self.unit_i - longer.index_select(0, self.i) * self.p_i
        return c_dot, p_dot / self.length_i


class _Fourier:
    """The series in phi, and what gradients G make of its derivatives."""

    def __init__(self, cosine: Tensor, sine2: Tensor, frequency: Tensor) -> None:
        self.f, self.cosine = frequency, cosine
        self.q = (K**2 * sine2 + (1 - K**2)).sqrt()
        self.phi = torch.atan2(self.q, K * cosine)
        self.slope = -K / self.q
        phase = self.phi * frequency
        self.sin, self.cos = phase.sin(), phase.cos()

    def values(self) -> Tensor:
        return _scaled([torch.ones_like(self.phi), self.sin, self.cos])

    def values_dot(self, c_dot: Tensor) -> Tensor:
        """Return c. dy/dc."""
        along = c_dot * self.slope * self.f
        return _scaled([torch.zeros_like(c_dot), along * self.cos, -along * self.sin])

    def first(self, grad: Tensor) -> Tensor:
        """G . dy/dc, [T, 1]."""
        _, by_sin, by_cos = grad.split([1, len(self.f), len(self.f)], dim=1)
        self.m = torch.addcmul(by_sin * self.cos, by_cos, self.sin, value=-1).mul_(_SCALE)
        self.n = torch.addcmul(by_sin * self.sin, by_cos, self.cos).mul_(_SCALE)
        return self.slope * (self.m @ self.f)[:, None]

    def second(self) -> Tensor:
        """G . d2y/dc2, [T, 1]; after `first`."""
        curvature = -(K**3) * self.cosine / self.q**3
        return curvature * (self.m @ self.f)[:, None] - self.slope**2 * (self.n @ self.f**2)[:, None]

    def by_frequency(self) -> Tensor:
        return self.m.t() @ self.phi[:, 0]

    def by_frequency_dot(self, c_dot: Tensor) -> Tensor:
        along = c_dot * self.slope
        return self.m.t() @ along[:, 0] - self.f * (self.n.t() @ (along * self.phi)[:, 0])


class _Chebyshev:
    """The polynomials of c with their first and second derivatives, as `_Fourier`."""

    def __init__(self, cosine: Tensor, n: int) -> None:
        self.cosine, self.t = cosine, _chebyshev(cosine, n)
        one, zero = torch.ones_like(cosine), torch.zeros_like(cosine)
        d = [zero, one]
        for t in self.t[1:-1]:
            d.append(2 * cosine * d[-1] + 2 * t - d[-2])
        self.d = d[:n]

    def _curvatures(self) -> Tensor:
        d2 = [torch.zeros_like(self.cosine)] * 2
        for d in self.d[1:-1]:
            d2.append(2 * self.cosine * d2[-1] + 4 * d - d2[-2])
        return _scaled(d2[: len(self.t)])

    def values_dot(self, c_dot: Tensor) -> Tensor:
        return c_dot * _scaled(self.d)

    def first(self, grad: Tensor) -> Tensor:
        self.grad = grad
        return (grad * _scaled(self.d)).sum(1, keepdim=True)

    def second(self) -> Tensor:
        return (self.grad * self._curvatures()).sum(1, keepdim=True)

    def by_frequency(self) -> None:
        return None

    def by_frequency_dot(self, c_dot: Tensor) -> None:
        return None


def _series(angles: _Angles, frequency: Tensor | None, n_functions: int) -> _Fourier | _Chebyshev:
    if frequency is None:
        return _Chebyshev(angles.cosine, n_functions)
    return _Fourier(angles.cosine, angles.sine2, frequency)


def _forward(
    short_edge: Tensor,
    frequency: Tensor | None,
    i: Tensor,
    start: Tensor,
    j: Tensor,
    reverse: Tensor,
    n_functions: int,
) -> Tensor:
    if frequency is not None and (compiled := bases.library(short_edge, frequency)):
        return bases.angular(compiled, short_edge, frequency, i, j)
    angles = _Angles(short_edge, i, start, j, reverse)
    if frequency is None:
        return _scaled(_chebyshev(angles.cosine, n_functions))
    return _Fourier(angles.cosine, angles.sine2, frequency).values()


def _backward(with_parameters: bool, grad: Tensor, short_edge: Tensor, *rest: Any) -> list[Tensor | None]:
    frequency, *index, n_functions = rest
    compiled = None if with_parameters else bases.library(short_edge, frequency)
    if compiled is not None:
        return [bases.angular_backward(compiled, grad, short_edge, frequency, index)]
    angles = _Angles(short_edge, *index)
    series = _series(angles, frequency, n_functions)
    by_short_edge = angles.summed(angles.both(series.first(grad)) * angles.p_i)
    return [by_short_edge, series.by_frequency()] if with_parameters else [by_short_edge]


def _backward_backward(
    cotangents: tuple[Tensor], grad: Tensor, short_edge: Tensor, *rest: Any
) -> list[Tensor | None]:
    frequency, *index, n_functions = rest
    angles = _Angles(short_edge, *index)
    series = _series(angles, frequency, n_functions)
    c_dot, p_dot = angles.tangent(cotangents[0])
    g = angles.both(series.first(grad))
    h = angles.both(c_dot * series.second())
    by_short_edge = angles.summed(torch.addcmul(h * angles.p_i, g, p_dot))
    return [series.values_dot(c_dot), by_short_edge, series.by_frequency_dot(c_dot)]


_family = Family(
    "angular_basis",
    features=["Tensor short_edge"],
    parameters=["Tensor? frequency"],
    constants=["Tensor i", "Tensor i_start", "Tensor j", "Tensor reverse", "int n_functions"],
    forward=_forward,
    backward=adding(_backward),
    backward_backward=_backward_backward,
    shape=lambda short_edge, frequency, i, start, j, reverse, n: short_edge.new_empty(len(i), n),
)
_family.on_cuda(
    runtime.body("angular_basis", "forward", _forward),
    adding(runtime.body("angular_basis", "backward", _backward)),
    runtime.body("angular_basis", "backward_backward", _backward_backward),
)
