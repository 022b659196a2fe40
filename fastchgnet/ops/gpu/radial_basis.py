# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.radial_basis` and `envelope` in fp32; symbols as there.

A program takes a tile of distances. Its share of the frequencies' gradient is one row of [programs, R],
which are then added up in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.trigonometry import sine_and_cosine

ROWS = 32
WARPS = 4


@triton.jit
def _power(x, N: tl.constexpr):
    found = x * 0 + 1
    for _ in tl.static_range(N):
        found *= x
    return found


@triton.jit
def _fraction(r, cutoff):
    """Return xi; a distance that is not a number stays none."""
    return tl.minimum(tl.div_rn(r, cutoff), 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _envelope(xi, P: tl.constexpr):
    series = xi * 0 + P * (P + 1) / 2
    for step in tl.static_range(P - 1):
        series = series * xi + (P - 1 - step) * (P - step) / 2
    return _power(1 - xi, 3) * series


@triton.jit
def _amplitudes(r, xi, cutoff, scale, P: tl.constexpr):
    """A, A' and A''."""
    u = _envelope(xi, P)
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
def _rows(distance, frequency, n_rows, cutoff, R: tl.constexpr, BLOCK: tl.constexpr):
    """Return a program's rows, their distances and the frequencies, and where [rows, R] is in memory."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = row < n_rows
    column = tl.arange(0, triton.next_power_of_2(R))
    r = tl.load(distance + row, mask=live, other=1.0)
    xi = _fraction(r, cutoff)
    f = tl.load(frequency + column, mask=column < R, other=0.0)
    at = row[:, None] * R + column[None, :]
    return row, live, r, xi, f, at, live[:, None] & (column < R)[None, :]


@triton.jit
def _store_share(shares, share, R: tl.constexpr):
    column = tl.arange(0, triton.next_power_of_2(R))
    tl.store(shares + tl.program_id(0) * R + column, share, mask=column < R)


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
    distance, frequency, out, cutoff, scale, n_rows, R: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr
):
    _, _, r, xi, f, at, inside = _rows(distance, frequency, n_rows, cutoff, R, BLOCK)
    sine, _ = sine_and_cosine(xi[:, None] * f[None, :])
    amplitude = tl.div_rn(scale * _envelope(xi, P), r)
    tl.store(out + at, amplitude[:, None] * sine, mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    grad,
    distance,
    frequency,
    by_distance,
    shares,
    cutoff,
    scale,
    n_rows,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, live, r, xi, f, at, inside = _rows(distance, frequency, n_rows, cutoff, R, BLOCK)
    a, slope, _ = _amplitudes(r, xi, cutoff, scale, P)
    sine, cosine = sine_and_cosine(xi[:, None] * f[None, :])
    g = tl.load(grad + at, mask=inside, other=0.0)
    w = tl.div_rn(f, cutoff)[None, :]
    found = slope * tl.sum(g * sine, 1) + a * tl.sum(g * cosine * w, 1)
    tl.store(by_distance + row, found, mask=live)
    if shares is not None:
        _store_share(shares, tl.sum(g * cosine * (a * xi)[:, None], 0), R)


@triton.jit(do_not_specialize=["n_rows"])
def _second_kernel(
    cotangent,
    grad,
    distance,
    frequency,
    by_grad,
    by_distance,
    shares,
    cutoff,
    scale,
    n_rows,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, live, r, xi, f, at, inside = _rows(distance, frequency, n_rows, cutoff, R, BLOCK)
    v = tl.load(cotangent + row, mask=live, other=0.0)
    a, slope, curvature = _amplitudes(r, xi, cutoff, scale, P)
    sine, cosine = sine_and_cosine(xi[:, None] * f[None, :])
    g = tl.load(grad + at, mask=inside, other=0.0)
    w = tl.div_rn(f, cutoff)[None, :]
    along = sine * (v * slope)[:, None] + cosine * w * (v * a)[:, None]
    tl.store(by_grad + at, along, mask=inside)
    by_sine, by_cosine = g * sine, g * cosine
    found = curvature * tl.sum(by_sine, 1) + 2 * slope * tl.sum(by_cosine * w, 1)
    found = v * (found - a * tl.sum(by_sine * w * w, 1))
    tl.store(by_distance + row, found, mask=live)
    of_cosine = (v * (slope * xi + tl.div_rn(a, cutoff)))[:, None]
    share = tl.sum(by_cosine * of_cosine - by_sine * w * (v * a * xi)[:, None], 0)
    _store_share(shares, share, R)


@triton.jit(do_not_specialize=["n_rows"])
def _envelope_kernel(distance, out, cutoff, n_rows, P: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xi = _fraction(tl.load(distance + row, mask=row < n_rows, other=0.0), cutoff)
    tl.store(out + row, _envelope(xi, P), mask=row < n_rows)


def envelope(distance: Tensor, cutoff: float, p: int) -> Tensor:
    given, n_rows = distance.contiguous(), distance.numel()
    out = given.new_empty(given.shape)
    n_programs = max(1, triton.cdiv(n_rows, 256))
    runtime.launch(_envelope_kernel, n_programs, out.device, given, out, cutoff, n_rows, P=p, BLOCK=256)
    return out


def _run(kernel: Any, tensors: tuple[Tensor | None, ...], n_rows: int, n: int, cutoff: float, p: int) -> None:
    device = next(t.device for t in tensors if t is not None)
    runtime.launch(
        kernel,
        _n_programs(n_rows),
        device,
        *tensors,
        cutoff,
        math.sqrt(2 / cutoff),
        n_rows,
        R=n,
        P=p,
        BLOCK=ROWS,
        num_warps=WARPS,
    )


def _n_programs(n_rows: int) -> int:
    return max(1, triton.cdiv(n_rows, ROWS))


def _shares(distance: Tensor, frequency: Tensor) -> Tensor:
    return distance.new_empty(_n_programs(len(distance)), len(frequency))


def forward(distance: Tensor, frequency: Tensor, cutoff: float, p: int) -> Tensor:
    out = distance.new_empty(len(distance), len(frequency))
    tensors = (distance.contiguous(), frequency.contiguous(), out)
    _run(_forward_kernel, tensors, len(distance), len(frequency), cutoff, p)
    return out


def backward(
    with_parameters: bool, grad: Tensor, distance: Tensor, frequency: Tensor, cutoff: float, p: int
) -> list[Tensor]:
    by_distance = distance.new_empty(distance.shape)
    shares = _shares(distance, frequency) if with_parameters else None
    tensors = (grad.contiguous(), distance.contiguous(), frequency.contiguous(), by_distance, shares)
    _run(_backward_kernel, tensors, len(distance), len(frequency), cutoff, p)
    return [by_distance] if shares is None else [by_distance, shares.sum(0)]


def backward_backward(
    cotangents: tuple[Tensor], grad: Tensor, distance: Tensor, frequency: Tensor, cutoff: float, p: int
) -> list[Tensor]:
    by_grad, by_distance = grad.new_empty(grad.shape), distance.new_empty(distance.shape)
    shares = _shares(distance, frequency)
    given = (t.contiguous() for t in (*cotangents, grad, distance, frequency))
    tensors = (*given, by_grad, by_distance, shares)
    _run(_second_kernel, tensors, len(distance), len(frequency), cutoff, p)
    return [by_grad, by_distance, shares.sum(0)]
