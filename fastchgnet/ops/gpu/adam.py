# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton body of `fastchgnet.train.optim.Optimizer.update`, behind the norm: one pass over the buffers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops.gpu import runtime
from fastchgnet.train import optim

BLOCK = 1024
WARPS = 4


@triton.jit
def _adam_kernel(
    gradient,
    weights,
    average,
    mean,
    square,
    norm,
    sizes,
    n,
    CLIP: tl.constexpr,
    BETA_MEAN: tl.constexpr,
    BETA_SQUARE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    g, w, a = tl.load(gradient + at, live), tl.load(weights + at, live), tl.load(average + at, live)
    m, s = tl.load(mean + at, live), tl.load(square + at, live)
    if CLIP is not None:
        g *= tl.minimum(CLIP / (tl.load(norm) + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    m += (1 - BETA_MEAN) * (g - m)
    s = BETA_SQUARE * s + (1 - BETA_SQUARE) * g * g
    size, variance, follow = tl.load(sizes), tl.load(sizes + 1), tl.load(sizes + 2)
    w -= size.to(tl.float32) * (m / (tl.sqrt(s) * variance.to(tl.float32) + EPS))
    a += follow.to(tl.float32) * (w - a)
    tl.store(weights + at, w, live)
    tl.store(average + at, a, live)
    tl.store(mean + at, m, live)
    tl.store(square + at, s, live)


def move(
    gradient: Tensor,
    weights: Tensor,
    average: Tensor,
    mean: Tensor,
    square: Tensor,
    norm: Tensor,
    sizes: Tensor,
    clip_norm: float | None,
) -> None:
    runtime.launch(
        _adam_kernel,
        triton.cdiv(len(weights), BLOCK),
        weights.device,
        gradient,
        weights,
        average,
        mean,
        square,
        norm,
        sizes,
        len(weights),
        CLIP=clip_norm,
        BETA_MEAN=optim.BETA_MEAN,
        BETA_SQUARE=optim.BETA_SQUARE,
        EPS=optim.EPS,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
