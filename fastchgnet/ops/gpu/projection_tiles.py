# mypy: allow-untyped-defs, allow-incomplete-defs
"""Programs of `fastchgnet.ops.projection`, which its kernels are made of; symbols as there.

`m` is what x is made of and multiplied with. An index holds the rows of a tile, their two ends, and which of
the rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastchgnet.ops.gpu.tiles import dot, factor, matrix, plus, read, transposed, vector, write, zeros


@triton.jit
def _tile(m, tile, n_rows, BLOCK: tl.constexpr):
    """Return the rows of a tile, their ends and which of them exist."""
    row = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
    live = row < n_rows
    first, second = row, row
    if m.row_ends is not None:
        first = tl.load(m.row_ends + 2 * row, mask=live, other=0)
        second = tl.load(m.row_ends + 2 * row + 1, mask=live, other=0)
    return row, first, second, live


@triton.jit
def _summed(table, index, ENDS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Read rows, or the sum of the rows at their ends."""
    row, first, second, live = index
    if ENDS:
        total = read(table, first, live, WIDTH, D) + read(table, second, live, WIDTH, D)
    else:
        total = read(table, row, live, WIDTH, D)
    return total


@triton.jit
def _put(table, index, values, ENDS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Write rows, or write them at both of their ends."""
    row, first, second, live = index
    if ENDS:
        write(table, first, live, values, WIDTH, D)
        write(table, second, live, values, WIDTH, D)
    else:
        write(table, row, live, values, WIDTH, D)


@triton.jit
def _put_onto(table, before, index, values, ENDS: tl.constexpr, D: tl.constexpr):
    """Write rows, or write them at both of their ends, added to what was there before."""
    row, first, second, live = index
    if ENDS:
        write(table, first, live, plus(values, before, first, live, D), D, D)
        write(table, second, live, plus(values, before, second, live, D), D, D)
    else:
        write(table, row, live, plus(values, before, row, live, D), D, D)


@triton.jit
def _sent(m, index, BLOCK: tl.constexpr, D: tl.constexpr):
    """Return t^; zeros where nothing was sent."""
    ENDS: tl.constexpr = m.row_ends is not None
    row, _, _, live = index
    sent = zeros(BLOCK, D)
    if m.t is not None:
        sent = _summed(m.t, index, ENDS, D, D)
        if m.w is not None:
            sent *= read(m.w, row, live, D, D)
    if m.more_w is not None:
        sent += read(m.more_w, row, live, D, D) * _summed(m.more_t, index, ENDS, D, D)
    return sent


@triton.jit
def project(
    m,
    made,
    program,
    n_rows,
    n_groups,
    N_PARTS: tl.constexpr,
    N_AT_ENDS: tl.constexpr,
    N_BIASES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write t^ and x of a tile and, of every n_groups-th part, y_m."""
    group = program % n_groups
    index = _tile(m, program // n_groups, n_rows, BLOCK)
    row, _, _, live = index
    x = read(m.s, row, live, D, D) if m.s is not None else zeros(BLOCK, D)
    if (m.t is not None) or (m.more_w is not None):
        sent = _sent(m, index, BLOCK, D)
        if made.sent is not None:
            write(made.sent, row, live & (group == 0), sent, D, D)
        x = dot(factor(sent, "fp32"), transposed(m.out, D, "fp32"), x, "fp32")
    if made.x is not None:
        write(made.x, row, live & (group == 0), x, D, D)
    x = factor(x, "fp32")
    for part in tl.static_range(N_PARTS):
        if made.parts[part] is not None and part % n_groups == group:
            for half in tl.static_range(2):
                y = zeros(BLOCK, D)
                if part < N_BIASES:
                    y += vector(m.bias + (2 * part + half) * D, D)
                weight = transposed(m.weight + (2 * part + half) * D * D, D, "fp32")
                y = dot(x, weight, y, "fp32")
                _put(made.parts[part] + half * D, index, y, part < N_AT_ENDS, 2 * D, D)


@triton.jit
def pull(
    m,
    grads,
    found,
    program,
    n_rows,
    N_PARTS: tl.constexpr,
    N_AT_ENDS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write ds of a tile, and dt and dw."""
    ENDS: tl.constexpr = m.row_ends is not None
    index = _tile(m, program, n_rows, BLOCK)
    row, _, _, live = index
    ds = read(grads.x, row, live, D, D) if grads.x is not None else zeros(BLOCK, D)
    for part in tl.static_range(N_PARTS):
        if grads.parts[part] is not None:
            for half in tl.static_range(2):
                y = _summed(grads.parts[part] + half * D, index, part < N_AT_ENDS, 2 * D, D)
                weight = matrix(m.weight + (2 * part + half) * D * D, D, "fp32")
                ds = dot(factor(y, "fp32"), weight, ds, "fp32")
    write(found.s, row, live, ds, D, D)
    if m.out is not None:
        h = dot(factor(ds, "fp32"), matrix(m.out, D, "fp32"), zeros(BLOCK, D), "fp32")
        if found.w is not None:
            _put_onto(found.w, found.onto_w, index, h * _summed(m.t, index, ENDS, D, D), False, D)
        if found.t is not None:
            if found.t_weight is not None:
                h *= read(found.t_weight, row, live, D, D)
            _put_onto(found.t, found.onto_t, index, h, ENDS, D)


@triton.jit
def _product(
    m, left, right, rows, ENDS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Multiply two tables over every n_chunks-th tile, and sum the left one; zeros where one is missing."""
    chunk, n_chunks, n_rows = rows
    product, total = zeros(D, D), tl.zeros([D], tl.float32)
    if (left is not None) and (right is not None):
        for tile in range(chunk, tl.cdiv(n_rows, BLOCK), n_chunks):
            index = _tile(m, tile, n_rows, BLOCK)
            row, _, _, live = index
            values = _summed(left, index, ENDS, WIDTH, D)
            total += tl.sum(values, 0)
            other = factor(read(right, row, live, D, D), "fp32")
            product = dot(tl.trans(factor(values, "fp32")), other, product, "fp32")
    return product, total


@triton.jit
def weigh(
    m,
    grads,
    factors,
    by_weight,
    by_bias,
    program,
    n_rows,
    N_PARTS: tl.constexpr,
    N_AT_ENDS: tl.constexpr,
    N_BIASES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a chunk's share of dB, or of a half of dW_m and db_m."""
    FIRST: tl.constexpr = 1 if m.out is not None else 0
    N_WEIGHTS: tl.constexpr = (FIRST + 2 * N_PARTS) * D * D
    program, n_chunks = program
    chunk, matrix = program % n_chunks, program // n_chunks
    rows = chunk, n_chunks, n_rows
    share = by_weight + chunk.to(tl.int64) * N_WEIGHTS
    column = tl.arange(0, D)
    if m.out is not None and matrix == 0:
        product, _ = _product(m, factors.ds, factors.sent, rows, False, D, D, BLOCK)
        write(share, column, column >= 0, product, D, D)
    for half in tl.static_range(2 * N_PARTS):
        if matrix == FIRST + half:
            # a table that is missing has no half
            y = grads.parts[half // 2] + half % 2 * D if grads.parts[half // 2] is not None else None
            product, total = _product(m, y, factors.x, rows, half // 2 < N_AT_ENDS, 2 * D, D, BLOCK)
            write(share + (FIRST + half) * D * D, column, column >= 0, product, D, D)
            if half // 2 < N_BIASES:
                tl.store(by_bias + chunk.to(tl.int64) * (2 * N_BIASES * D) + half * D + column, total)
