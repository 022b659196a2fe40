# mypy: allow-untyped-defs, allow-incomplete-defs
"""Programs of `fastchgnet.ops.bond_tables`, which its kernels are made of; symbols as there.

`m` is what kernels read of the op's inputs; layers are D columns each, wider ones several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastchgnet.ops.gpu.radial_basis import amplitudes, waves
from fastchgnet.ops.gpu.tiles import dot, factor, rounded, zeros


@triton.jit
def _tile(m, tile, n_rows, BLOCK: tl.constexpr):
    """Return a tile's rows, which of them exist, and their lengths."""
    row = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
    live = row < n_rows
    return row, live, tl.load(m.distance + row, mask=live, other=1.0)


@triton.jit
def _of_layer(m, tables, layer, sizes, N_LAYERS: tl.constexpr, PER_LONG: tl.constexpr, D: tl.constexpr):
    """Return a layer's part of a table, its width, and its first row and last; no row where there is none."""
    n_rows, n_short = sizes[0], sizes[1]
    part, end = m.distance, layer * 0  # any tensor: no row of it is live
    for n in tl.static_range(N_LAYERS):
        if tables[n if n < 2 else 2 + (n - 2) // PER_LONG] is not None:
            table = tables[n if n < 2 else 2 + (n - 2) // PER_LONG]
            part = tl.where(layer == n, table + (0 if n < 2 else (n - 2) % PER_LONG * D), part)
            end = tl.where(layer == n, n_rows, end)
    if m.long_weight is None:
        return part, D, 0, end
    else:
        width, begin = tl.where(layer < 2, 1, PER_LONG) * D, tl.where(layer < 2, 0, n_short)
        return part, width, begin, tl.where(layer == 0, tl.minimum(end, n_short), end)


@triton.jit
def _places(m, tables, layer, row, sizes, N_LAYERS: tl.constexpr, PER_LONG: tl.constexpr, D: tl.constexpr):
    """Return where a layer's rows [BLOCK, D] are, and which of them there are."""
    part, width, begin, end = _of_layer(m, tables, layer, sizes, N_LAYERS, PER_LONG, D)
    at = (row - begin)[:, None] * width + tl.arange(0, D)[None, :]
    return part + at, ((row >= begin) & (row < end))[:, None]


@triton.jit
def _numbers(width, MOST: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr):
    """Return where the numbers of a layer or of several are [MOST, COLUMNS], and which of them there are."""
    row, column = tl.arange(0, MOST)[:, None], tl.arange(0, COLUMNS)[None, :]
    return row * R + column, (row < width) & (column < R)


@triton.jit
def _weight(m, layer, D: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr):
    """Read a layer as a factor [D, COLUMNS]."""
    at, inside = _numbers(D, D, R, COLUMNS)
    weight = m.weight + layer * (D * R)
    if m.long_weight is not None:
        weight = tl.where(layer < 2, weight, m.long_weight + (layer - 2) * (D * R))
    return rounded(tl.load(weight + at, mask=inside, other=0.0), True, "fp32")


@triton.jit
def _multiply(
    m,
    tables,
    basis,
    row,
    sizes,
    N_LAYERS: tl.constexpr,
    PER_LONG: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
):
    """Write rows of all tables."""
    # not unrolled here and below: loads of many layers at once would take all registers
    for layer in range(N_LAYERS):
        weight = _weight(m, layer, D, R, basis.shape[1])
        y = dot(basis, tl.trans(weight), zeros(basis.shape[0], D), "fp32")
        place, inside = _places(m, tables, layer, row, sizes, N_LAYERS, PER_LONG, D)
        tl.store(place, y, mask=inside)


@triton.jit
def multiply(
    m,
    tables,
    program,
    sizes,
    constants,
    N_LAYERS: tl.constexpr,
    PER_LONG: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a tile of all tables."""
    cutoff, scale = constants
    row, _, r = _tile(m, program, sizes[0], BLOCK)
    xi, _, sine, _ = waves(r, m.frequency, cutoff, R, COLUMNS)
    amplitude, _, _ = amplitudes(r, xi, cutoff, scale, P)
    basis = factor(amplitude[:, None] * sine, "fp32")
    _multiply(m, tables, basis, row, sizes, N_LAYERS, PER_LONG, D, R)


@triton.jit
def _pulled(
    m,
    grads,
    row,
    sizes,
    N_LAYERS: tl.constexpr,
    PER_LONG: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return rows of dZ."""
    by_basis = zeros(row.shape[0], COLUMNS)
    for layer in range(N_LAYERS):
        place, inside = _places(m, grads, layer, row, sizes, N_LAYERS, PER_LONG, D)
        g = tl.load(place, mask=inside, other=0.0)
        by_basis = dot(factor(g, "fp32"), _weight(m, layer, D, R, COLUMNS), by_basis, "fp32")
    return by_basis


@triton.jit
def _tangent(v, a, slope, w, sine, cosine):
    """Return z' = v dZ/dr."""
    return sine * (v * slope)[:, None] + cosine * w * (v * a)[:, None]


@triton.jit
def by_lengths(
    m,
    cotangent,
    grads,
    found,
    program,
    sizes,
    constants,
    N_LAYERS: tl.constexpr,
    PER_LONG: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what dZ leads to, tile after tile."""
    n_rows, _, n_programs = sizes
    cutoff, scale = constants
    by_frequency = tl.zeros([COLUMNS], tl.float32)
    for tile in range(program, tl.cdiv(n_rows, BLOCK), n_programs):
        row, live, r = _tile(m, tile, n_rows, BLOCK)
        xi, w, sine, cosine = waves(r, m.frequency, cutoff, R, COLUMNS)
        a, slope, curvature = amplitudes(r, xi, cutoff, scale, P)
        if cotangent is not None:
            v = tl.load(cotangent + row, mask=live, other=0.0)
            tangent = factor(_tangent(v, a, slope, w, sine, cosine), "fp32")
            _multiply(m, found.tables, tangent, row, sizes, N_LAYERS, PER_LONG, D, R)
        by_basis = _pulled(m, grads, row, sizes, N_LAYERS, PER_LONG, D, R, COLUMNS)
        p, q = by_basis * sine, by_basis * cosine
        if cotangent is None:
            by_r = slope * tl.sum(p, 1) + a * tl.sum(q * w, 1)
            by_f = q * (a * xi)[:, None]
        else:
            by_r = curvature * tl.sum(p, 1) + 2 * slope * tl.sum(q * w, 1) - a * tl.sum(p * w * w, 1)
            by_r *= v
            by_f = q * (v * (slope * xi + tl.div_rn(a, cutoff)))[:, None] - p * w * (v * a * xi)[:, None]
        for n in tl.static_range(len(found.onto)):
            by_r += tl.load(found.onto[n] + row, mask=live, other=0.0)
        tl.store(found.distance + row, by_r, mask=live)
        by_frequency += tl.sum(by_f, 0)
    if found.frequency is not None:
        column = tl.arange(0, COLUMNS)
        tl.store(found.frequency + program * R + column, by_frequency, mask=column < R)


@triton.jit
def by_weight(
    m,
    cotangent,
    grads,
    found,
    program,
    sizes,
    constants,
    N_LAYERS: tl.constexpr,
    PER_LONG: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a chunk's share of the gradient of a table's layers."""
    cutoff, scale = constants
    n_chunks = sizes[2]
    table, chunk = program // n_chunks, program % n_chunks
    layer = table if PER_LONG == 1 else tl.where(table < 2, table, 2 + (table - 2) * PER_LONG)
    grad, width, begin, end = _of_layer(m, grads, layer, sizes, N_LAYERS, PER_LONG, D)
    WIDEST: tl.constexpr = D if N_LAYERS < 3 else triton.next_power_of_2(PER_LONG) * D
    number = tl.arange(0, WIDEST)
    total = zeros(WIDEST, COLUMNS)
    HALF: tl.constexpr = BLOCK // 2  # the sum for several layers takes the registers of the rest
    for tile in range(chunk, tl.cdiv(end - begin, HALF), n_chunks):
        row = tl.full([HALF], HALF, tl.int64) * tile + tl.arange(0, HALF)
        live = begin + row < end
        r = tl.load(m.distance + begin + row, mask=live, other=1.0)
        xi, w, sine, cosine = waves(r, m.frequency, cutoff, R, COLUMNS)
        a, slope, _ = amplitudes(r, xi, cutoff, scale, P)
        other = a[:, None] * sine
        if cotangent is not None:
            v = tl.load(cotangent + begin + row, mask=live, other=0.0)
            other = _tangent(v, a, slope, w, sine, cosine)
        at = row[:, None] * width + number[None, :]
        g = tl.load(grad + at, mask=live[:, None] & (number < width)[None, :], other=0.0)
        total = dot(tl.trans(factor(g, PRECISION)), factor(other, PRECISION), total, PRECISION)
    at, inside = _numbers(width, WIDEST, R, COLUMNS)
    N_FIRST: tl.constexpr = N_LAYERS if N_LAYERS < 2 else 2
    chunk = chunk.to(tl.int64)
    share = found.weight + (chunk * N_FIRST + layer) * (D * R)
    if found.long_weight is not None:
        long_share = found.long_weight + (chunk * (N_LAYERS - N_FIRST) + layer - N_FIRST) * (D * R)
        share = tl.where(layer < N_FIRST, share, long_share)
    tl.store(share + at, total, mask=inside)
