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


@triton.jit
def _by_distance(by_all, by_short, row, live, short, ROWS: tl.constexpr):
    """Gradients of distances, all in all."""
    total = tl.zeros([ROWS], tl.float32)
    if by_all is not None:
        total += tl.load(by_all + row, mask=live, other=0.0)
    if by_short is not None:
        total += tl.load(by_short + row, mask=short, other=0.0)
    return total


@triton.jit(do_not_specialize=["n_bonds", "n_short", "n_edges"])
def _forward_kernel(
    bond_vector,
    short_bond,
    short_sign,
    distance,
    short_distance,
    short_edge,
    n_bonds,
    n_short,
    n_edges,
    ROWS: tl.constexpr,
):
    row = _rows(ROWS)
    live = row < n_bonds
    length = _length(_vector(bond_vector, row, live))
    tl.store(distance + row, length, mask=live)
    tl.store(short_distance + row, length, mask=row < n_short)
    _turn(bond_vector, short_bond, short_sign, short_edge, row, n_edges)


@triton.jit(do_not_specialize=["n_bonds", "n_short"])
def _backward_kernel(
    by_distance,
    by_short,
    by_edge,
    bond_vector,
    bond_short,
    by_vector,
    n_bonds,
    n_short,
    ROWS: tl.constexpr,
):
    row = _rows(ROWS)
    live, short = row < n_bonds, row < n_short
    total = tl.zeros([ROWS, 4], tl.float32)
    if by_distance is not None or by_short is not None:
        v = _vector(bond_vector, row, live)
        g = _by_distance(by_distance, by_short, row, live, short, ROWS)
        total += tl.div_rn(g, _divisor(v))[:, None] * v
    if by_edge is not None:
        along = tl.load(bond_short + 2 * row, mask=short, other=0)
        against = tl.load(bond_short + 2 * row + 1, mask=short, other=0)
        total += _vector(by_edge, along, short) - _vector(by_edge, against, short)
    _write(by_vector, row, live, total)


@triton.jit(do_not_specialize=["n_bonds", "n_short", "n_edges"])
def _second_kernel(
    cotangent,
    by_distance,
    by_short,
    bond_vector,
    short_bond,
    short_sign,
    of_distance,
    of_short,
    of_edge,
    of_vector,
    n_bonds,
    n_short,
    n_edges,
    ROWS: tl.constexpr,
):
    row = _rows(ROWS)
    live, short = row < n_bonds, row < n_short
    across = tl.zeros([ROWS, 4], tl.float32)
    if by_distance is not None or by_short is not None:
        u, v = _vector(cotangent, row, live), _vector(bond_vector, row, live)
        length = _divisor(v)
        longer = tl.div_rn(tl.sum(v * u, 1), length)
        if of_distance is not None:
            tl.store(of_distance + row, longer, mask=live)
        if of_short is not None:
            tl.store(of_short + row, longer, mask=short)
        g = _by_distance(by_distance, by_short, row, live, short, ROWS)
        across = tl.div_rn(g, length)[:, None] * (u - tl.div_rn(longer, length)[:, None] * v)
    _write(of_vector, row, live, across)
    if of_edge is not None:
        _turn(cotangent, short_bond, short_sign, of_edge, row, n_edges)


def _run(kernel: Any, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    """Start a kernel that works on as many bonds, short bonds and, perhaps, short edges."""
    device = next(t.device for t in tensors if t is not None)
    given = (None if t is None else t.contiguous() for t in tensors)
    n_programs = max(1, triton.cdiv(max(sizes), ROWS))
    runtime.launch(kernel, n_programs, device, *given, *sizes, ROWS=ROWS, num_warps=WARPS)


def forward(
    bond_vector: Tensor, short_bond: Tensor, short_sign: Tensor, bond_short: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = n_bonds, n_short, n_edges = len(bond_vector), len(bond_short), len(short_bond)
    distance, short_distance = (bond_vector.new_empty(n, 1) for n in (n_bonds, n_short))
    found = distance, short_distance, bond_vector.new_empty(n_edges, 3)
    _run(_forward_kernel, (bond_vector, short_bond, short_sign, *found), sizes)
    return found


def backward(
    with_parameters: bool,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    bond_vector: Tensor,
    short_bond: Tensor,
    short_sign: Tensor,
    bond_short: Tensor,
) -> list[Tensor]:
    by_vector = bond_vector.new_empty(bond_vector.shape)
    tensors = (*grads, bond_vector, bond_short, by_vector)
    _run(_backward_kernel, tensors, (len(bond_vector), len(bond_short)))
    return [by_vector]


def backward_backward(
    cotangents: tuple[Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    bond_vector: Tensor,
    short_bond: Tensor,
    short_sign: Tensor,
    bond_short: Tensor,
) -> list[Tensor | None]:
    by_distance, by_short, _ = grads
    found = [None if t is None else t.new_empty(t.shape) for t in (*grads, bond_vector)]
    tensors = (*cotangents, by_distance, by_short, bond_vector, short_bond, short_sign, *found)
    _run(_second_kernel, tensors, (len(bond_vector), len(bond_short), len(short_bond)))
    return found
