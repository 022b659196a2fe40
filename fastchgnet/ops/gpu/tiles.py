# mypy: allow-untyped-defs, allow-incomplete-defs
"""What Triton kernels on tiles of rows share; only such kernels import this.

A tile is BLOCK rows of D features, in registers.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded(x, PURE: tl.constexpr, PRECISION: tl.constexpr):
    # The matrix units ignore the last 13 bits. Cutting them off shifts energies by 3 meV/atom, rounding
    # by 0.1.
    if INTERPRETED:
        if PRECISION == "tf32":
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return x
    else:
        HOW: tl.constexpr = "cvt.rna.tf32.f32 $0, $1;" if PRECISION == "tf32" else "mov.b32 $0, $1;"
        return tl.inline_asm_elementwise(HOW, "=r,r", [x], tl.float32, PURE, 1)


@triton.jit
def factor(x, PRECISION: tl.constexpr):
    """Round a tile that is a factor to what the matrix units read, or leave it as it is."""
    # Impure, so that the compiler computes x once: it would move what leads to x behind the change to the
    # layout of factors, in which up to four warps hold and compute the same row.
    return rounded(x, False, PRECISION)


@triton.jit
def dot(x, y, total, PRECISION: tl.constexpr):
    """Add x y to a total, of factors rounded already."""
    # three products of what tf32 keeps and what it drops are as exact as fp32
    HOW: tl.constexpr = "tf32" if PRECISION == "tf32" else "tf32x3"
    return tl.dot(x, y, total, input_precision=HOW)


@triton.jit
def zeros(BLOCK: tl.constexpr, D: tl.constexpr):
    """Return a tile of zeros."""
    return tl.zeros([BLOCK, D], tl.float32)


@triton.jit
def read(table, row, live, WIDTH: tl.constexpr, D: tl.constexpr):
    """Read D features of rows of a table of some width; zeros where there is no row."""
    at = row[:, None] * WIDTH + tl.arange(0, D)[None, :]
    return tl.load(table + at, mask=live[:, None], other=0.0)


@triton.jit
def plus(values, before, row, live, D: tl.constexpr):
    """Add rows of every table of a tuple, [n, D] each."""
    for n in tl.static_range(len(before)):
        values += read(before[n], row, live, D, D)
    return values


@triton.jit
def write(table, row, live, values, WIDTH: tl.constexpr, D: tl.constexpr):
    """Write D features of the rows that there are."""
    at = row[:, None] * WIDTH + tl.arange(0, D)[None, :]
    tl.store(table + at, values, mask=live[:, None])


@triton.jit
def matrix(weight, D: tl.constexpr, PRECISION: tl.constexpr):
    """Read a matrix [D, D] as a factor."""
    at = tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    return rounded(tl.load(weight + at), True, PRECISION)


@triton.jit
def transposed(weight, D: tl.constexpr, PRECISION: tl.constexpr):
    """Read the transpose of a matrix [D, D] as a factor."""
    at = tl.arange(0, D)[None, :] * D + tl.arange(0, D)[:, None]
    return rounded(tl.load(weight + at), True, PRECISION)


@triton.jit
def vector(weight, D: tl.constexpr):
    """Read a vector [D] as a row."""
    return tl.load(weight + tl.arange(0, D))[None, :]


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), for infinite x and NaN, too."""
    # Four instructions. Triton's own takes twelve, for exponentials that are subnormal, which are nothing
    # beside 1, and for those close to overflow, where the quotient is 0. Impure, or it would be computed
    # again where that spares a change of layout.
    if INTERPRETED:
        return tl.sigmoid(x)
    else:
        HOW: tl.constexpr = """{
            .reg .f32 t;
            mul.ftz.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.ftz.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
        }"""
        return tl.inline_asm_elementwise(HOW, "=f,f", [x], tl.float32, False, 1)


@triton.jit
def mean(x, D: tl.constexpr):
    """Return the mean of each row as a column."""
    return (tl.sum(x, 1) / D)[:, None]


@triton.jit
def normed(z, EPSILON: tl.constexpr, D: tl.constexpr):
    """Normalise rows; return them and what they were multiplied with."""
    centred = z - mean(z, D)
    rstd = tl.rsqrt(mean(centred * centred, D) + EPSILON)
    return centred * rstd, rstd


@triton.jit
def norm_backward(q, x, rstd, D: tl.constexpr):
    """Return L(q) = (q - mean q - x mean(q x)) / std."""
    return (q - mean(q, D) - x * mean(q * x, D)) * rstd
