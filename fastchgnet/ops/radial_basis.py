"""Smooth radial Bessel functions of a distance, with learnable frequencies (sRBF); no op of its own.

`fastchgnet.ops.bond_tables` reads it through linear layers.

With r[N], frequencies f[R], the cutoff rc, xi = min(r / rc, 1) and the envelope u,

    y_k = A(r) sin(f_k xi)       [N, R],   A = sqrt(2 / rc) u(xi) / r

    u   = (1 - xi)^3 sum_{k<p} (k+1)(k+2)/2 xi^k
    u'  = -c xi^(p-1) (1 - xi)^2                          c = p(p+1)(p+2)/2
    u'' = -c xi^(p-2) (1 - xi) ((p-1) - (p+1) xi)

none of which cancels near the cutoff, where all three are zero. The amplitude:

    A'  = sqrt(2 / rc) / r (u' / rc - u / r)
    A'' = sqrt(2 / rc) / r (u'' / rc^2 + 2 (u / r - u' / rc) / r)

VJP, with a gradient G of y, w = f / rc, P = G sin(f xi) and Q = G cos(f xi):

    dr = A' sum_k P_k + A sum_k w_k Q_k
    df = sum over rows of A xi Q

VJP of the VJP, with the cotangent v of dr:

    G~ = v (A' sin(f xi) + A w cos(f xi))
    r~ = v sum_k (A'' P_k + 2 A' w_k Q_k - A w_k^2 P_k)
    f~ = sum over rows of v ((A' xi + A / rc) Q - A xi w P)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastchgnet.ops.cpu import bases
from fastchgnet.ops.envelope import envelope, envelope_slope


def reference(distance: Tensor, frequency: Tensor, cutoff: float, p: int) -> Tensor:
    """Compute it in plain PyTorch, differentiable to any order."""
    xi = distance / cutoff
    return math.sqrt(2 / cutoff) * envelope(xi, p) / distance * torch.sin(frequency * xi)


class _Waves:
    """Amplitudes [N, 1], sines and cosines [N, R] of all rows."""

    def __init__(self, distance: Tensor, frequency: Tensor, cutoff: float, p: int) -> None:
        self.distance, self.cutoff, self.p = distance, cutoff, p
        self.xi = (distance / cutoff).clamp(max=1.0)
        phase = self.xi * frequency
        self.sin, self.cos = phase.sin(), phase.cos()
        self.over_r = 1 / distance
        self.scale = math.sqrt(2 / cutoff) * self.over_r
        self.u = envelope(self.xi, p)
        self.u_slope = envelope_slope(self.xi, p) / cutoff

    def amplitude(self) -> Tensor:
        """A."""
        return self.scale * self.u

    def slope(self) -> Tensor:
        """A'."""
        return self.scale * (self.u_slope - self.u * self.over_r)

    def curvature(self) -> Tensor:
        """A''."""
        p, xi = self.p, self.xi
        coefficient = p * (p + 1) * (p + 2) / (2 * self.cutoff**2)
        u_curvature = -coefficient * xi ** (p - 2) * (1 - xi) * ((p - 1) - (p + 1) * xi)
        return self.scale * (u_curvature + 2 * self.over_r * (self.u * self.over_r - self.u_slope))


def forward(distance: Tensor, frequency: Tensor, cutoff: float, p: int) -> Tensor:
    """Expand distances [N, 1], A, in R functions, [N, R]; zero from the cutoff on, as its derivatives are."""
    if compiled := bases.library(distance, frequency):
        return bases.radial(compiled, distance, frequency, cutoff, p)
    return reference(distance, frequency, cutoff, p)


def backward(
    with_parameters: bool, grad: Tensor, distance: Tensor, frequency: Tensor, cutoff: float, p: int
) -> list[Tensor]:
    """Return dr and, if asked, df."""
    compiled = None if with_parameters else bases.library(distance, frequency)
    if compiled is not None:
        return [bases.radial_backward(compiled, grad, distance, frequency, cutoff, p)]
    waves = _Waves(distance, frequency, cutoff, p)
    by_sin, by_cos = grad * waves.sin, grad * waves.cos
    a = waves.amplitude()
    by_distance = waves.slope() * by_sin.sum(1, keepdim=True) + a * (by_cos @ (frequency / cutoff))[:, None]
    if not with_parameters:
        return [by_distance]
    return [by_distance, by_cos.t() @ (a * waves.xi)[:, 0]]


def backward_backward(
    v: Tensor, grad: Tensor, distance: Tensor, frequency: Tensor, cutoff: float, p: int
) -> list[Tensor]:
    """Return G~, r~ and f~."""
    waves, w = _Waves(distance, frequency, cutoff, p), frequency / cutoff
    by_sin, by_cos = grad * waves.sin, grad * waves.cos
    a, slope = waves.amplitude(), waves.slope()
    by_grad = torch.addcmul(waves.sin * (v * slope), waves.cos * w, v * a)
    by_distance = v * (
        waves.curvature() * by_sin.sum(1, keepdim=True)
        + 2 * slope * (by_cos @ w)[:, None]
        - a * (by_sin @ w**2)[:, None]
    )
    by_frequency = by_cos.t() @ (v * (slope * waves.xi + a / cutoff))[:, 0]
    return [by_grad, by_distance, by_frequency - w * (by_sin.t() @ (v * a * waves.xi)[:, 0])]
