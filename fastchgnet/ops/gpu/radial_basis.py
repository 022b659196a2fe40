# mypy: allow-untyped-defs, allow-incomplete-defs
"""The radial basis and its envelope in Triton kernels; symbols as in `fastchgnet.ops.radial_basis`."""

from __future__ import annotations

import triton
import triton.language as tl

from fastchgnet.ops.gpu.trigonometry import sine_and_cosine


@triton.jit
def _power(x, N: tl.constexpr):
    found = x * 0 + 1
    for _ in tl.static_range(N):
        found *= x
    return found


@triton.jit
def fraction(r, cutoff):
    """Return xi; a distance that is not a number stays none."""
    return tl.minimum(tl.div_rn(r, cutoff), 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def envelope(xi, P: tl.constexpr):
    series = xi * 0 + P * (P + 1) / 2
    for step in tl.static_range(P - 1):
        series = series * xi + (P - 1 - step) * (P - step) / 2
    return _power(1 - xi, 3) * series


@triton.jit
def amplitudes(r, xi, cutoff, scale, P: tl.constexpr):
    """A, A' and A''."""
    u = envelope(xi, P)
    coefficient = P * (P + 1) * (P + 2) / 2
    rest = 1 - xi
    slope = tl.div_rn(-coefficient * _power(xi, P - 1) * rest * rest, cutoff)
    curvature = -coefficient * _power(xi, P - 2) * rest * ((P - 1) - (P + 1) * xi)
    curvature = tl.div_rn(curvature, cutoff * cutoff)
    over_r = tl.div_rn(1.0, r)
    scale *= over_r
    falling = u * over_r - slope
    return scale * u, -scale * falling, scale * (curvature + 2 * over_r * falling)


@triton.jit
def waves(r, frequency, cutoff, R: tl.constexpr, COLUMNS: tl.constexpr):
    """Return xi of rows, w of the functions, and sines and cosines [rows, COLUMNS]."""
    xi = fraction(r, cutoff)
    column = tl.arange(0, COLUMNS)
    f = tl.load(frequency + column, mask=column < R, other=0.0)
    sine, cosine = sine_and_cosine(xi[:, None] * f[None, :])
    return xi, tl.div_rn(f, cutoff)[None, :], sine, cosine
