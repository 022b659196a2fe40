# mypy: allow-untyped-defs, allow-incomplete-defs
"""Programs of `fastchgnet.ops.bond_tables`, which its kernels are made of; symbols as there.

`m` is what kernels read of the op's inputs; layers are D columns each, wider ones several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastchgnet.ops.gpu.radial_basis import amplitudes, waves
from fastchgnet.ops.gpu.tiles import dot, factor, read, rounded, write, zeros


@triton.jit
def _tile(m, tile, n_rows, BLOCK: tl.constexpr):
    """Return a tile's rows, which of them exist, and their lengths."""
    row = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
    live = row < n_rows
    return row, live, tl.load(m.distance + row, mask=live, other=1.0)


@triton.jit
def _rows(m, rows, N: tl.constexpr):
    """Return which rows of its table layer N reads, and which of them there are."""
    row, live, n_short = rows
    if m.long_weight is None or N == 1:
        return row, live
    elif N == 0:
        return row, live & (row < n_short)
    else:
        return row - n_short, live & (row >= n_short)


@triton.jit
def _numbers(D: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr):
    """Return where the numbers of a layer are, and which columns are there."""
    row, column = tl.arange(0, D)[:, None], tl.arange(0, COLUMNS)[None, :]
    return row * R + column, (row < D) & (column < R)


@triton.jit
def _weight(m, N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr):
    """Read layer N as a factor [D, COLUMNS]."""
    at, inside = _numbers(D, R, COLUMNS)
    weight = m.weight + N * D * R if N < 2 else m.long_weight + (N - 2) * D * R
    return rounded(tl.load(weight + at, mask=inside, other=0.0), True, "fp32")


@triton.jit
def _multiply(m, tables, basis, weight, rows, N: tl.constexpr, PER_LONG: tl.constexpr, D: tl.constexpr):
    """Write the columns of layer N."""
    TABLE: tl.constexpr = N if N < 2 else 2 + (N - 2) // PER_LONG
    COLUMN: tl.constexpr = 0 if N < 2 else (N - 2) % PER_LONG * D
    WIDTH: tl.constexpr = D if N < 2 else PER_LONG * D
    row, live = _rows(m, rows, N)
    y = dot(basis, tl.trans(weight), zeros(basis.shape[0], D), "fp32")
    if tables[TABLE] is not None:
        write(tables[TABLE] + COLUMN, row, live, y, WIDTH, D)


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
    n_rows, n_short = sizes
    cutoff, scale = constants
    row, live, r = _tile(m, program, n_rows, BLOCK)
    xi, _, sine, _ = waves(r, m.frequency, cutoff, R, COLUMNS)
    amplitude, _, _ = amplitudes(r, xi, cutoff, scale, P)
    basis, rows = factor(amplitude[:, None] * sine, "fp32"), (row, live, n_short)
    for n in tl.static_range(N_LAYERS):
        _multiply(m, tables, basis, _weight(m, n, D, R, COLUMNS), rows, n, PER_LONG, D)


@triton.jit
def _pull(grads, by_basis, weight, m, rows, N: tl.constexpr, PER_LONG: tl.constexpr, D: tl.constexpr):
    """Add layer N's share to dZ."""
    TABLE: tl.constexpr = N if N < 2 else 2 + (N - 2) // PER_LONG
    COLUMN: tl.constexpr = 0 if N < 2 else (N - 2) % PER_LONG * D
    WIDTH: tl.constexpr = D if N < 2 else PER_LONG * D
    if grads[TABLE] is not None:
        row, live = _rows(m, rows, N)
        g = factor(read(grads[TABLE] + COLUMN, row, live, WIDTH, D), "fp32")
        by_basis = dot(g, weight, by_basis, "fp32")
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
    n_rows, n_short, n_programs = sizes
    cutoff, scale = constants
    by_frequency = tl.zeros([COLUMNS], tl.float32)
    for tile in range(program, tl.cdiv(n_rows, BLOCK), n_programs):
        row, live, r = _tile(m, tile, n_rows, BLOCK)
        rows = row, live, n_short
        xi, w, sine, cosine = waves(r, m.frequency, cutoff, R, COLUMNS)
        a, slope, curvature = amplitudes(r, xi, cutoff, scale, P)
        by_basis = zeros(BLOCK, COLUMNS)
        for n in tl.static_range(N_LAYERS):
            by_basis = _pull(grads, by_basis, _weight(m, n, D, R, COLUMNS), m, rows, n, PER_LONG, D)
        p, q = by_basis * sine, by_basis * cosine
        if cotangent is None:
            by_r = slope * tl.sum(p, 1) + a * tl.sum(q * w, 1)
            by_f = q * (a * xi)[:, None]
        else:
            v = tl.load(cotangent + row, mask=live, other=0.0)
            by_r = curvature * tl.sum(p, 1) + 2 * slope * tl.sum(q * w, 1) - a * tl.sum(p * w * w, 1)
            by_r *= v
            by_f = q * (v * (slope * xi + tl.div_rn(a, cutoff)))[:, None] - p * w * (v * a * xi)[:, None]
            tangent = factor(_tangent(v, a, slope, w, sine, cosine), "fp32")
            for n in tl.static_range(N_LAYERS):
                _multiply(m, found.tables, tangent, _weight(m, n, D, R, COLUMNS), rows, n, PER_LONG, D)
        for n in tl.static_range(len(found.onto)):
            by_r += tl.load(found.onto[n] + row, mask=live, other=0.0)
        tl.store(found.distance + row, by_r, mask=live)
        by_frequency += tl.sum(by_f, 0)
    if found.frequency is not None:
        column = tl.arange(0, COLUMNS)
        tl.store(found.frequency + program * R + column, by_frequency, mask=column < R)


@triton.jit
def _of_layer(
    m, grads, layer, n_rows, n_short, N_LAYERS: tl.constexpr, PER_LONG: tl.constexpr, D: tl.constexpr
):
    """Return the gradient of a layer, its width, and its first row and last; no row where it has none."""
    grad, width, end = m.distance, layer * 0, layer * 0
    for n in tl.static_range(N_LAYERS):
        if grads[n if n < 2 else 2 + (n - 2) // PER_LONG] is not None:
            table = grads[n if n < 2 else 2 + (n - 2) // PER_LONG]
            grad = tl.where(layer == n, table + (0 if n < 2 else (n - 2) % PER_LONG * D), grad)
            width = tl.where(layer == n, D if n < 2 else PER_LONG * D, width)
            end = tl.where(layer == n, n_rows, end)
    if m.long_weight is None:
        return grad, width, layer * 0, end
    else:
        return (
            grad,
            width,
            tl.where(layer < 2, 0, n_short),
            tl.where(layer == 0, tl.minimum(end, n_short), end),
        )


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
):
    """Write a chunk's share of the gradient of a layer."""
    n_rows, n_short, n_chunks = sizes
    cutoff, scale = constants
    layer, chunk = program // n_chunks, program % n_chunks
    grad, width, begin, end = _of_layer(m, grads, layer, n_rows, n_short, N_LAYERS, PER_LONG, D)
    total = zeros(D, COLUMNS)
    for tile in range(chunk, tl.cdiv(end - begin, BLOCK), n_chunks):
        row = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
        live = begin + row < end
        r = tl.load(m.distance + begin + row, mask=live, other=1.0)
        xi, w, sine, cosine = waves(r, m.frequency, cutoff, R, COLUMNS)
        a, slope, _ = amplitudes(r, xi, cutoff, scale, P)
        other = a[:, None] * sine
        if cotangent is not None:
            v = tl.load(cotangent + begin + row, mask=live, other=0.0)
            other = _tangent(v, a, slope, w, sine, cosine)
        at = row[:, None] * width + tl.arange(0, D)[None, :]
        g = factor(tl.load(grad + at, mask=live[:, None], other=0.0), "fp32")
        total = dot(tl.trans(g), factor(other, "fp32"), total, "fp32")
    at, inside = _numbers(D, R, COLUMNS)
    N_FIRST: tl.constexpr = N_LAYERS if N_LAYERS < 2 else 2
    chunk = chunk.to(tl.int64)
    share = found.weight + (chunk * N_FIRST + layer) * (D * R)
    if found.long_weight is not None:
        long_share = found.long_weight + (chunk * (N_LAYERS - N_FIRST) + layer - N_FIRST) * (D * R)
        share = tl.where(layer < N_FIRST, share, long_share)
    tl.store(share + at, total, mask=inside)
