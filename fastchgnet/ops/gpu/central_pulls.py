# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.central_pulls` in fp32; symbols as there.

A program takes tiles of bonds in turn. Its share of the gradient of the weights is one row of
[programs, 2 * D], which a second launch adds up.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import central_pulls
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.radial_basis import envelope, fraction
from fastchgnet.ops.gpu.segments import shares, sum_all
from fastchgnet.ops.gpu.tiles import read, vector, write

WIDTHS = (16, 32, 64)
ROWS = 32
WARPS = 4
PER_MULTIPROCESSOR = 2  # programs that run there at once


@triton.jit
def _bond(table, tile, n_rows, cutoff, P: tl.constexpr, BLOCK: tl.constexpr):
    """Return the rows of a tile, which of them exist, e and u(r) of these."""
    row = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
    live = row < n_rows
    x = tl.load(table + row * 3, mask=live, other=1.0)
    y = tl.load(table + row * 3 + 1, mask=live, other=0.0)
    z = tl.load(table + row * 3 + 2, mask=live, other=0.0)
    r = tl.sqrt_rn(x * x + y * y + z * z)
    unit = tl.div_rn(x, r), tl.div_rn(y, r), tl.div_rn(z, r)
    return row, live, unit, envelope(fraction(r, cutoff), P)


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
    message,
    weight,
    bonds,
    pulls,
    units,
    cutoff,
    n_rows,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK), tl.num_programs(0)):
        row, live, unit, u = _bond(bonds, tile, n_rows, cutoff, P, BLOCK)
        m = read(message, row, live, D, D)
        for n in tl.static_range(2):
            strength = tl.sum(m * vector(weight + n * D, D), 1) * u
            for c in tl.static_range(3):
                tl.store(pulls + row * 6 + n * 3 + c, strength * unit[c], mask=live)
        for c in tl.static_range(3):
            tl.store(units + row * 3 + c, unit[c], mask=live)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    by_pulls,
    message,
    weight,
    bonds,
    by_message,
    by_weight,
    cutoff,
    n_rows,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, second = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK), tl.num_programs(0)):
        row, live, unit, u = _bond(bonds, tile, n_rows, cutoff, P, BLOCK)
        t_0, t_1 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for c in tl.static_range(3):
            t_0 += tl.load(by_pulls + row * 6 + c, mask=live, other=0.0) * unit[c]
            t_1 += tl.load(by_pulls + row * 6 + 3 + c, mask=live, other=0.0) * unit[c]
        t_0, t_1 = (t_0 * u)[:, None], (t_1 * u)[:, None]
        write(by_message, row, live, t_0 * vector(weight, D) + t_1 * vector(weight + D, D), D, D)
        m = read(message, row, live, D, D)
        first += tl.sum(t_0 * m, 0)
        second += tl.sum(t_1 * m, 0)
    share = by_weight + tl.program_id(0) * 2 * D + tl.arange(0, D)
    tl.store(share, first)
    tl.store(share + D, second)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], n_programs: int, like: Tensor, *constants: Any) -> None:
    cutoff, p = constants
    runtime.launch(
        kernel,
        n_programs,
        like.device,
        *tensors,
        cutoff,
        len(like),
        P=p,
        D=like.shape[1],
        BLOCK=ROWS,
        num_warps=WARPS,
    )


def _n_programs(message: Tensor) -> int:
    return runtime.n_programs(triton.cdiv(len(message), ROWS), message.device, PER_MULTIPROCESSOR)


def forward(message: Tensor, weight: Tensor, bonds: Tensor, cutoff: float, p: int) -> tuple[Tensor, Tensor]:
    if message.shape[1] not in WIDTHS:
        return central_pulls.reference(message, weight, bonds, cutoff, p)
    message, weight, bonds = (t.contiguous() for t in (message, weight, bonds))
    found = message.new_empty(len(message), 2, 3), bonds.new_empty(bonds.shape)
    _launch(_forward_kernel, (message, weight, bonds, *found), _n_programs(message), message, cutoff, p)
    return found


def backward(
    by_pulls: Tensor, message: Tensor, weight: Tensor, bonds: Tensor, cutoff: float, p: int
) -> tuple[Tensor, Tensor]:
    if message.shape[1] not in WIDTHS:
        return central_pulls._backward(by_pulls, message, weight, bonds, cutoff, p)
    by_pulls, message, weight, bonds = (t.contiguous() for t in (by_pulls, message, weight, bonds))
    n_programs = _n_programs(message)
    by_message, of_weight = message.new_empty(message.shape), weight.new_empty(n_programs, weight.numel())
    tensors = by_pulls, message, weight, bonds, by_message, of_weight
    _launch(_backward_kernel, tensors, n_programs, message, cutoff, p)
    (by_weight,) = sum_all([shares(of_weight, weight.shape[1], ())])
    return by_message, by_weight
