# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.magmom` in fp32; symbols as there.

Backward, a program takes tiles of atoms in turn; a second launch adds up their shares of dw and db.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import magmom
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.segments import shares, sum_all
from fastchgnet.ops.gpu.tiles import read, vector, write

WIDTHS = (16, 32, 64)
ROWS = 16
WARPS = 4


@triton.jit
def _tile(features, weight, bias, tile, n_rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """Return the rows of a tile, which of them exist, v and s."""
    row = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
    live = row < n_rows
    v = read(features, row, live, D, D)
    return row, live, v, tl.sum(v * vector(weight, D), 1) + tl.load(bias)


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(features, weight, bias, y, n_rows, D: tl.constexpr, BLOCK: tl.constexpr):
    row, live, _, s = _tile(features, weight, bias, tl.program_id(0), n_rows, D, BLOCK)
    tl.store(y + row, tl.abs(s), mask=live)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    features,
    weight,
    bias,
    grad,
    by_features,
    of_weight,
    of_bias,
    n_rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by_weight, by_bias = tl.zeros([D], tl.float32), 0.0
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK), tl.num_programs(0)):
        row, live, v, s = _tile(features, weight, bias, tile, n_rows, D, BLOCK)
        g = tl.load(grad + row, mask=live, other=0.0)
        t = tl.where(s > 0, g, tl.where(s < 0, -g, s * 0))
        write(by_features, row, live, t[:, None] * vector(weight, D), D, D)
        by_weight += tl.sum(t[:, None] * v, 0)
        by_bias += tl.sum(t, 0)
    tl.store(of_weight + tl.program_id(0) * D + tl.arange(0, D), by_weight)
    tl.store(of_bias + tl.program_id(0), by_bias)


def _launch(kernel, n_programs: int, features: Tensor, *others: Tensor) -> None:
    n_rows, d = features.shape
    tensors = (features, *others)
    runtime.launch(kernel, n_programs, features.device, *tensors, n_rows, D=d, BLOCK=ROWS, num_warps=WARPS)


def forward(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if features.shape[1] not in WIDTHS:
        return magmom.reference(features, weight, bias)
    y = features.new_empty(len(features))
    given = (t.contiguous() for t in (features, weight, bias))
    _launch(_forward_kernel, max(1, triton.cdiv(len(y), ROWS)), *given, y)
    return y


def backward(grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if features.shape[1] not in WIDTHS:
        return magmom._backward(grad, features, weight, bias)
    given = [t.contiguous() for t in (features, weight, bias, grad)]
    n_programs = runtime.n_programs(triton.cdiv(len(features), ROWS), features.device)
    by_features = features.new_empty(features.shape)
    of_weight, of_bias = (features.new_empty(n_programs, t.numel()) for t in (weight, bias))
    _launch(_backward_kernel, n_programs, *given, by_features, of_weight, of_bias)
    by_weight, by_bias = sum_all([shares(of_weight, len(weight[0]), ()), shares(of_bias, 1, ())])
    return by_features, by_weight, by_bias.flatten()
