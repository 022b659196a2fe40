# mypy: allow-untyped-defs, allow-incomplete-defs
"""Steps of `fastchgnet.ops.message` on tiles, which its kernels are made of; symbols as there.

`m` is what kernels read of the op's inputs; BRANCH is 0 for core and 1 for gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastchgnet.ops._message_inputs import EPS
from fastchgnet.ops.gpu.tiles import dot, factor, matrix, normed, read, sigmoid, vector, write, zeros

EPSILON = tl.constexpr(EPS)


@triton.jit
def segments(m, tile, n_rows, n_r, BLOCK: tl.constexpr):
    """Return the segments of a tile's rows, the rows, and n_r; and which of the rows exist."""
    row = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
    live = row < n_rows
    i = tl.load(m.i + row, mask=live, other=0)
    j = tl.load(m.j + row, mask=live, other=0)
    k = tl.load(m.k + row, mask=live, other=0)
    return (i, j, k, row, n_r), live


@triton.jit
def absent():
    # functions cannot return None
    return tl.zeros([], tl.float32)


@triton.jit
def weights(m, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return A of core and gate and W of core and gate for `held`; either may be missing."""
    rows_core, rows_gate, hidden_core, hidden_gate = absent(), absent(), absent(), absent()
    if m.a is not None:
        rows_core, rows_gate = kept(m.angle_weight, D, PRECISION), kept(m.angle_weight + D * D, D, PRECISION)
    if m.weight is not None:
        hidden_core, hidden_gate = kept(m.weight, D, PRECISION), kept(m.weight + D * D, D, PRECISION)
    return rows_core, rows_gate, hidden_core, hidden_gate


@triton.jit
def kept(weight, D: tl.constexpr, PRECISION: tl.constexpr):
    # fp32 takes twice the shared memory, and registers are few: there a matrix is read where it is used
    if PRECISION == "tf32":
        return matrix(weight, D, PRECISION)
    else:
        return weight


@triton.jit
def held(weight, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return a matrix of `weights` as a factor."""
    if PRECISION == "tf32":
        return weight
    else:
        return matrix(weight, D, PRECISION)


@triton.jit
def read_third(head, tail, index, live, BRANCH: tl.constexpr, D: tl.constexpr):
    """Read R_k of core or gate, of which the segments from n_r on may be in the tail."""
    if tail is None:
        return read(head + BRANCH * D, index[2], live, 2 * D, D)
    else:
        # one load whose rows are in either table, not two with half of their rows masked
        in_tail = index[2] >= index[4]
        row = tl.where(in_tail, index[2] - index[4], index[2])
        return read(tl.where(in_tail, tail, head)[:, None] + BRANCH * D, row, live, 2 * D, D)


@triton.jit
def gathered(
    tables, a_ND, rows_weight, index, live, BRANCH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr
):
    """Return P_i + Q_j + R_k + A a of core or gate; any part may be missing."""
    total = zeros(live.shape[0], D)
    for t in tl.static_range(2):
        if tables[t] is not None:
            total += read(tables[t] + BRANCH * D, index[t], live, 2 * D, D)
    if tables[2] is not None:
        total += read_third(tables[2], tables[3], index, live, BRANCH, D)
    if a_ND is not None:
        total = dot(a_ND, tl.trans(held(rows_weight, D, PRECISION)), total, PRECISION)
    return total


@triton.jit
def linear(s, hidden_weight, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return W s."""
    weight = tl.trans(held(hidden_weight, D, PRECISION))
    return dot(factor(s, PRECISION), weight, zeros(s.shape[0], D), PRECISION)


@triton.jit
def linear_backward(dz, hidden_weight, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return W^T dz, of a factor."""
    return dot(dz, held(hidden_weight, D, PRECISION), zeros(dz.shape[0], D), PRECISION)


@triton.jit
def rows_backward(
    dh, da, a_ND, rows_weight, sums, WITH_PARAMETERS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr
):
    """Add A^T dh of core or gate to da, and dh a^T to the sums."""
    dh = factor(dh, PRECISION)
    angle, weight, bias, scale, shift = sums
    if WITH_PARAMETERS:
        angle = dot(tl.trans(dh), a_ND, angle, PRECISION)
    return dot(dh, held(rows_weight, D, PRECISION), da, PRECISION), (angle, weight, bias, scale, shift)


@triton.jit
def norm_input(h, hidden_weight, m, BRANCH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return z of core or gate."""
    if m.weight is None:
        return h
    else:
        return linear(h * sigmoid(h), hidden_weight, D, PRECISION) + vector(m.bias + BRANCH * D, D)


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
def silu_slope(h, sigma):
    """Return S'(h)."""
    return sigma * (1 + h * (1 - sigma))


@triton.jit
def no_sums(m, D: tl.constexpr):
    """Start the sums of a branch: gradients of A, W, b, g and c."""
    row = tl.zeros([D], tl.float32)
    angle = zeros(D, D) if m.a is not None else absent()
    weight = zeros(D, D) if m.weight is not None else absent()
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
