# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.readout` in fp32; symbols as there.

A program takes a tile of atoms through all layers, up and down again, in registers. The gradients of the
parameters that a tile leads to are one row of [tiles, parameters], 3 KB for each atom, and PyTorch adds
them up in a fixed order. Adding up in registers instead would spill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import _readout_torch
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.tiles import (
    dot,
    factor,
    matrix,
    mean,
    norm_backward,
    normed,
    read,
    sigmoid,
    vector,
    write,
    zeros,
)

WIDTHS = (16, 32, 64)
ROWS = 16
"""Atoms of a tile: a batch has some two thousand, and each multiprocessor should get some."""
WARPS = 8

EPSILON = tl.constexpr(_readout_torch.EPS)
PRECISION = tl.constexpr("fp32")


@triton.jit
def _hidden(parameters, K: tl.constexpr, HAS_NORM: tl.constexpr, D: tl.constexpr):
    """Return where the weight of a layer begins; its bias comes behind it."""
    return parameters + (2 * D if HAS_NORM else 0) + K * (D + 1) * D


@triton.jit
def _linear(s, weight):
    """Return W s of a factor."""
    return dot(s, tl.trans(weight), tl.zeros_like(s), PRECISION)


@triton.jit
def _linear_backward(dh, weight):
    """Return W^T dh of a factor."""
    return dot(dh, weight, tl.zeros_like(dh), PRECISION)


@triton.jit
def _norm(v, parameters, HAS_NORM: tl.constexpr, D: tl.constexpr):
    """Return n, x, 1 / std and g; v and nothing of use where there is no norm."""
    if HAS_NORM:
        x, rstd = normed(v, EPSILON, D)
        g = vector(parameters, D)
        return x * g + vector(parameters + D, D), x, rstd, g
    else:
        return v, v, v, v


@triton.jit
def _nothing():
    # what layers put behind each other begins with this
    return ()


@triton.jit
def _rows(features, tile, n_rows, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)
    live = row < n_rows
    return row, live, read(features, row, live, D, D)


@triton.jit(do_not_specialize=["n_rows"])
def _forward_kernel(
    features,
    parameters,
    y,
    slope,
    n_rows,
    N_LAYERS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, live, v = _rows(features, tl.program_id(0), n_rows, D, BLOCK)
    s, x, rstd, g = _norm(v, parameters, HAS_NORM, D)
    hs = _nothing()
    for k in tl.static_range(N_LAYERS):
        at = _hidden(parameters, k, HAS_NORM, D)
        h = _linear(factor(s, PRECISION), matrix(at, D, PRECISION)) + vector(at + D * D, D)
        s = h * sigmoid(h)
        hs += (h,)
    at = _hidden(parameters, N_LAYERS, HAS_NORM, D)
    w = vector(at, D)
    tl.store(y + row, tl.sum(s * w, 1) + tl.load(at + D), mask=live)
    if slope is not None:
        r = zeros(BLOCK, D) + w
        for step in tl.static_range(N_LAYERS):
            h = hs[N_LAYERS - 1 - step]
            sigma = sigmoid(h)
            q = factor(r * sigma * (1 + h * (1 - sigma)), PRECISION)
            at = _hidden(parameters, N_LAYERS - 1 - step, HAS_NORM, D)
            r = _linear_backward(q, matrix(at, D, PRECISION))
        if HAS_NORM:
            r = norm_backward(r * g, x, rstd, D)
        write(slope, row, live, r, D, D)


@triton.jit
def _up(s, s_dot, parameters, TANGENT: tl.constexpr, N_LAYERS: tl.constexpr, HAS_NORM: tl.constexpr):
    """From n and n' to s and s' of the last layer; and what comes into each layer, with h and h'."""
    D: tl.constexpr = s.shape[1]
    layers = _nothing()
    for k in tl.static_range(N_LAYERS):
        at = _hidden(parameters, k, HAS_NORM, D)
        weight = matrix(at, D, PRECISION)
        s = factor(s, PRECISION)
        h = _linear(s, weight) + vector(at + D * D, D)
        h_dot = s_dot
        if TANGENT:
            s_dot = factor(s_dot, PRECISION)
            h_dot = _linear(s_dot, weight)
        layers += ((s, s_dot, h, h_dot),)
        sigma = sigmoid(h)
        s = h * sigma
        if TANGENT:
            s_dot = h_dot * sigma * (1 + h * (1 - sigma))
    return s, s_dot, layers


@triton.jit
def _down(by_s, r, layers, share, parameters, TANGENT: tl.constexpr, HAS_NORM: tl.constexpr):
    """From s~ and r of the last layer to n~ and r of the features."""
    D: tl.constexpr = by_s.shape[1]
    N_LAYERS: tl.constexpr = len(layers)
    for step in tl.static_range(N_LAYERS):
        s, s_dot, h, h_dot = layers[N_LAYERS - 1 - step]
        sigma = sigmoid(h)
        rest = 1 - sigma
        slope = sigma * (1 + h * rest)
        by_h, q = by_s * slope, r
        if TANGENT:
            by_h += sigma * rest * (2 + h * (rest - sigma)) * h_dot * r
            q = factor(r * slope, PRECISION)
        by_bias = tl.sum(by_h, 0)
        by_h = factor(by_h, PRECISION)
        if share is not None:
            by_weight = dot(tl.trans(by_h), s, zeros(D, D), PRECISION)
            if TANGENT:
                by_weight = dot(tl.trans(q), s_dot, by_weight, PRECISION)
            row, out = tl.arange(0, D), _hidden(share, N_LAYERS - 1 - step, HAS_NORM, D)
            write(out, row, row < D, by_weight, D, D)
            tl.store(out + D * D + row, by_bias)
        weight = matrix(_hidden(parameters, N_LAYERS - 1 - step, HAS_NORM, D), D, PRECISION)
        by_s = _linear_backward(by_h, weight)
        if TANGENT:
            r = _linear_backward(q, weight)
    return by_s, r


@triton.jit
def _change(u, v_dot, r, x, rstd, g, D: tl.constexpr):
    """Return the gradient of <u, L(g r)> by v, given L(u)."""
    q = r * g
    found = x * mean(q * v_dot, D) + mean(u * x, D) * norm_backward(q, x, rstd, D) + mean(q * x, D) * v_dot
    return -found * rstd


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    features,
    parameters,
    by_y,
    by_slope,
    by_features,
    shares,
    n_rows,
    STRIDE: tl.constexpr,
    N_LAYERS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TANGENT: tl.constexpr = by_slope is not None
    share = None if shares is None else shares + tl.program_id(0).to(tl.int64) * STRIDE
    row, live, v = _rows(features, tl.program_id(0), n_rows, D, BLOCK)
    n, x, rstd, g = _norm(v, parameters, HAS_NORM, D)
    u, v_dot, n_dot = v, v, v
    if TANGENT:
        u = read(by_slope, row, live, D, D)
        v_dot, n_dot = u, u
        if HAS_NORM:
            v_dot = norm_backward(u, x, rstd, D)
            n_dot = v_dot * g
    s, s_dot, layers = _up(n, n_dot, parameters, TANGENT, N_LAYERS, HAS_NORM)
    by_row = tl.zeros([BLOCK], tl.float32)
    if by_y is not None:
        by_row = tl.load(by_y + row, mask=live, other=0.0)
    column = tl.arange(0, D)
    if share is not None:
        by_w = s * by_row[:, None]
        if TANGENT:
            by_w += s_dot
        out = _hidden(share, N_LAYERS, HAS_NORM, D)
        tl.store(out + column, tl.sum(by_w, 0))
        tl.store(out + D, tl.sum(by_row, 0))
    w = vector(_hidden(parameters, N_LAYERS, HAS_NORM, D), D)
    by_n, r = _down(by_row[:, None] * w, zeros(BLOCK, D) + w, layers, share, parameters, TANGENT, HAS_NORM)
    by_v = by_n
    if HAS_NORM:
        if share is not None:
            by_g = x * by_n
            if TANGENT:
                by_g += v_dot * r
            tl.store(share + column, tl.sum(by_g, 0))
            tl.store(share + D + column, tl.sum(by_n, 0))
        if TANGENT:
            by_v = norm_backward(by_n * g, x, rstd, D) + _change(u, v_dot, r, x, rstd, g, D)
    if TANGENT:
        write(by_features, row, live, by_v, D, D)


def _fits(features: Tensor, widths: Sequence[int]) -> bool:
    """Tell whether the kernels take layers of these widths."""
    return features.shape[1] in WIDTHS and all(width == features.shape[1] for width in widths)


def _launch(kernel: Any, tensors: Sequence[Any], has_norm: bool, n_layers: int, **options: Any) -> None:
    """Start a kernel on all tiles of rows of the first tensor."""
    features = tensors[0]
    n_rows, d = features.shape
    runtime.launch(
        kernel,
        _n_tiles(n_rows),
        features.device,
        *(None if t is None else t.contiguous() for t in tensors),
        n_rows,
        **options,
        N_LAYERS=n_layers,
        HAS_NORM=has_norm,
        D=d,
        BLOCK=ROWS,
        num_warps=WARPS,
        num_stages=1,
    )


def _n_tiles(n_rows: int) -> int:
    return max(1, triton.cdiv(n_rows, ROWS))


def forward(
    features: Tensor, parameters: Tensor, widths: Sequence[int], has_norm: bool, with_slope: bool
) -> tuple[Tensor, Tensor]:
    if not _fits(features, widths):
        return _readout_torch.forward(features, parameters, widths, has_norm, with_slope)
    y = features.new_empty(len(features))
    slope = features.new_empty(features.shape if with_slope else 0)
    tensors = (features, parameters, y, slope if with_slope else None)
    _launch(_forward_kernel, tensors, has_norm, len(widths))
    return y, slope


def backward(
    with_parameters: bool,
    by_y: Tensor | None,
    by_slope: Tensor | None,
    features: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    has_norm: bool,
) -> tuple[Tensor, Tensor]:
    if not _fits(features, widths):
        inputs = (features, parameters, widths, has_norm)
        return _readout_torch.backward(with_parameters, by_y, by_slope, *inputs)
    by_features = features.new_empty(0 if by_slope is None else features.shape)
    n = len(parameters)
    stride = triton.cdiv(n, 32) * 32  # rows begin where wide stores may
    shares = features.new_empty(_n_tiles(len(features)), stride) if with_parameters else None
    tensors = (features, parameters, by_y, by_slope, by_features, shares)
    _launch(_backward_kernel, tensors, has_norm, len(widths), STRIDE=stride)
    return by_features, parameters.new_empty(0) if shares is None else shares[:, :n].sum(0)
