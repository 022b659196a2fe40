# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.geometry` in fp32; symbols as there.

Every level is one launch. A program takes a tile of bonds and the short edges of the same numbers; vectors
are rows of four columns, of which the last is zero.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops.gpu import runtime

ROWS = 128
WARPS = 4


@triton.jit
def _rows(ROWS: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def _at(row, live):
    """Where vectors of rows are in memory."""
    column = tl.arange(0, 4)[None, :]
    return row[:, None] * 3 + column, live[:, None] & (column < 3)


@triton.jit
def _vector(table, row, live):
    at, inside = _at(row, live)
    return tl.load(table + at, mask=inside, other=0.0)


@triton.jit
def _write(table, row, live, values):
    at, inside = _at(row, live)
    tl.store(table + at, values, mask=inside)


@triton.jit
def _length(v):
    return tl.sqrt_rn(tl.sum(v * v, 1))


@triton.jit
def _divisor(v):
    """Lengths; infinite where they are zero."""
    length = _length(v)
    return tl.where(length == 0, float("inf"), length)


@triton.jit
def _turn(rows, short_bond, short_sign, out, edge, n_edges):
    """Write the row of each short edge's bond, times its sign."""
    live = edge < n_edges
    bond = tl.load(short_bond + edge, mask=live, other=0)
    sign = tl.load(short_sign + edge, mask=live, other=0).to(tl.float32)
    _write(out, edge, live, sign[:, None] * _vector(rows, bond, live))


@triton.jit(do_not_specialize=["n_bonds", "n_edges"])
def _forward_kernel(
    bond_vector, short_bond, short_sign, distance, short_edge, n_bonds, n_edges, ROWS: tl.constexpr
):
    row = _rows(ROWS)
    live = row < n_bonds
    tl.store(distance + row, _length(_vector(bond_vector, row, live)), mask=live)
    _turn(bond_vector, short_bond, short_sign, short_edge, row, n_edges)


@triton.jit(do_not_specialize=["n_bonds", "n_short"])
def _backward_kernel(
    by_distance, by_edge, bond_vector, bond_short, by_vector, n_bonds, n_short, ROWS: tl.constexpr
):
    row = _rows(ROWS)
    live = row < n_bonds
    total = tl.zeros([ROWS, 4], tl.float32)
    if by_distance is not None:
        v = _vector(bond_vector, row, live)
        g = tl.load(by_distance + row, mask=live, other=0.0)
        total += tl.div_rn(g, _divisor(v))[:, None] * v
    if by_edge is not None:
        short = row < n_short
        along = tl.load(bond_short + 2 * row, mask=short, other=0)
        against = tl.load(bond_short + 2 * row + 1, mask=short, other=0)
        total += _vector(by_edge, along, short) - _vector(by_edge, against, short)
    _write(by_vector, row, live, total)


@triton.jit(do_not_specialize=["n_bonds", "n_edges"])
def _second_kernel(
    cotangent,
    by_distance,
    bond_vector,
    short_bond,
    short_sign,
    of_distance,
    of_edge,
    of_vector,
    n_bonds,
    n_edges,
    ROWS: tl.constexpr,
):
    row = _rows(ROWS)
    live = row < n_bonds
    across = tl.zeros([ROWS, 4], tl.float32)
    if by_distance is not None:
        u, v = _vector(cotangent, row, live), _vector(bond_vector, row, live)
        length = _divisor(v)
        longer = tl.div_rn(tl.sum(v * u, 1), length)
        tl.store(of_distance + row, longer, mask=live)
        g = tl.load(by_distance + row, mask=live, other=0.0)
        across = tl.div_rn(g, length)[:, None] * (u - tl.div_rn(longer, length)[:, None] * v)
    _write(of_vector, row, live, across)
    if of_edge is not None:
        _turn(cotangent, short_bond, short_sign, of_edge, row, n_edges)


def _run(kernel: Any, tensors: tuple[Tensor | None, ...], n_bonds: int, n_others: int) -> None:
    """Start a kernel that works on bonds and on short edges or short bonds."""
    device = next(t.device for t in tensors if t is not None)
    given = (None if t is None else t.contiguous() for t in tensors)
    n_programs = max(1, triton.cdiv(max(n_bonds, n_others), ROWS))
    runtime.launch(kernel, n_programs, device, *given, n_bonds, n_others, ROWS=ROWS, num_warps=WARPS)


def forward(
    bond_vector: Tensor, short_bond: Tensor, short_sign: Tensor, bond_short: Tensor
) -> tuple[Tensor, Tensor]:
    n_bonds, n_edges = len(bond_vector), len(short_bond)
    found = bond_vector.new_empty(n_bonds, 1), bond_vector.new_empty(n_edges, 3)
    _run(_forward_kernel, (bond_vector, short_bond, short_sign, *found), n_bonds, n_edges)
    return found


def backward(
    with_parameters: bool,
    grads: tuple[Tensor | None, Tensor | None],
    bond_vector: Tensor,
    short_bond: Tensor,
    short_sign: Tensor,
    bond_short: Tensor,
) -> list[Tensor]:
    by_vector = bond_vector.new_empty(bond_vector.shape)
    tensors = (*grads, bond_vector, bond_short, by_vector)
    _run(_backward_kernel, tensors, len(bond_vector), len(bond_short))
    return [by_vector]


def backward_backward(
    cotangents: tuple[Tensor],
    grads: tuple[Tensor | None, Tensor | None],
    bond_vector: Tensor,
    short_bond: Tensor,
    short_sign: Tensor,
    bond_short: Tensor,
) -> list[Tensor | None]:
    by_distance, _ = grads
    found = [None if t is None else t.new_empty(t.shape) for t in (*grads, bond_vector)]
    tensors = (*cotangents, by_distance, bond_vector, short_bond, short_sign, *found)
    _run(_second_kernel, tensors, len(bond_vector), len(short_bond))
    return found
