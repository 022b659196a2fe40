# mypy: allow-untyped-defs, allow-incomplete-defs
"""Steps of `fastchgnet.ops.message` on tiles, which its kernels are made of; symbols as there.

`m` is what kernels read of the op's inputs; BRANCH is 0 for core and 1 for gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastchgnet.ops._message_inputs import EPS
from fastchgnet.ops._tiles import dot, matrix, normed, read, transposed, vector, write, zeros

EPSILON = tl.constexpr(EPS)


@triton.jit
def segments(m, tile, n_rows, BLOCK: tl.constexpr):
    """Return the rows of a tile with their segments, and which of them exist."""
    row = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
    live = row < n_rows
    i = tl.load(m.i + row, mask=live, other=0)
    j = tl.load(m.j + row, mask=live, other=0)
    k = tl.load(m.k + row, mask=live, other=0)
    return (i, j, k, row), live


@triton.jit
def gathered(tables, a_ND, m, index, live, BRANCH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return P_i + Q_j + R_k + A a of core or gate; any part may be missing."""
    total = zeros(live.shape[0], D)
    for t in tl.static_range(3):
        if tables[t] is not None:
            total += read(tables[t] + BRANCH * D, index[t], live, 2 * D, D)
    if a_ND is not None:
        total = dot(a_ND, transposed(m.angle_weight + BRANCH * D * D, D), total, PRECISION)
    return total


@triton.jit
def linear(s, m, BRANCH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return W s."""
    return dot(s, transposed(m.weight + BRANCH * D * D, D), zeros(s.shape[0], D), PRECISION)


@triton.jit
def linear_backward(dz, m, BRANCH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return W^T dz."""
    return dot(dz, matrix(m.weight + BRANCH * D * D, D), zeros(dz.shape[0], D), PRECISION)


@triton.jit
def norm_input(h, m, BRANCH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return z, of core or gate."""
    if m.weight is None:
        return h
    else:
        return linear(h * tl.sigmoid(h), m, BRANCH, D, PRECISION) + vector(m.bias + BRANCH * D, D)


@triton.jit
def norm(z, m, D: tl.constexpr):
    """Return x and 1 / std z; z and nothing of use where there is no norm."""
    if m.scale is None:
        return z, z
    else:
        return normed(z, EPSILON, D)


@triton.jit
def norm_row(table, BRANCH: tl.constexpr, N_NORMS: tl.constexpr, D: tl.constexpr):
    """Read g or c of core or gate, which may share it."""
    return vector(table + (BRANCH * D if N_NORMS == 2 else 0), D)


@triton.jit
def affine(x, m, BRANCH: tl.constexpr, N_NORMS: tl.constexpr, D: tl.constexpr):
    """Return n = g x + c."""
    if m.scale is None:
        return x
    else:
        return x * norm_row(m.scale, BRANCH, N_NORMS, D) + norm_row(m.shift, BRANCH, N_NORMS, D)


@triton.jit
def silu_slope(h, sigmoid):
    """Return S'(h)."""
    return sigmoid * (1 + h * (1 - sigmoid))


@triton.jit
def no_sums(m, D: tl.constexpr):
    """Start the sums of a branch: gradients of A, W, b, g and c."""
    absent = tl.zeros([], tl.float32)
    row = tl.zeros([D], tl.float32)
    angle = zeros(D, D) if m.a is not None else absent
    weight = zeros(D, D) if m.weight is not None else absent
    return angle, weight, row, row, row


@triton.jit
def write_sums(out, m, core, gate, N_NORMS: tl.constexpr, D: tl.constexpr):
    """Write the sums of a program."""
    row, live = tl.arange(0, D), tl.full([D], True, tl.int1)
    column = tl.arange(0, D)
    if m.a is not None:
        write(out, row, live, core[0], D, D)
        write(out, row + D, live, gate[0], D, D)
        out += 2 * D * D
    if m.weight is not None:
        write(out, row, live, core[1], D, D)
        write(out, row + D, live, gate[1], D, D)
        tl.store(out + 2 * D * D + column, core[2])
        tl.store(out + (2 * D + 1) * D + column, gate[2])
        out += (2 * D + 2) * D
    for part in tl.static_range(3, 5):
        if N_NORMS == 2:
            tl.store(out + column, core[part])
            tl.store(out + D + column, gate[part])
        elif N_NORMS == 1:
            tl.store(out + column, core[part] + gate[part])
        out += N_NORMS * D
