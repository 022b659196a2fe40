# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton body of the sums of `fastchgnet.ops.segments`: several tables in one launch, no atomic additions.

A program adds four segments side by side, four rows of each at a time. The order of a segment's additions
depends on nothing but its length, so a crystal's sums are the same bit for bit in any batch. Shares of the
gradients of parameters, one of each program of a kernel, are added up in the same launch.

Tables are taken in rounds, a part of each at a time: several sums over the same rows, of which neighbours
belong to one crystal, then find them in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import segments
from fastchgnet.ops.gpu import runtime, tiles

SEGMENTS = 4
ROWS = 4
SHARES = 32  # added at a time
ROUNDS = 2 if tiles.INTERPRETED else 32  # programs without work are slow to interpret
MAX_SUMS = 7
MAX_WIDTH = 256


class Terms(NamedTuple):
    """Rows and the segments they are summed over."""

    rows: Any  # [N, width]
    start: Any  # [n + 1]; None where rows 0, n, 2n and so on are the first segment's: shares of [n, width]
    order: Any = None  # [any number] rows, or None where they are as they stand
    onto: Any = ()  # [n, width] each, what they are added to
    n_shares: int = 0  # rows of every segment, where there is no start


class Sum(NamedTuple):
    """What a kernel takes of a sum: all of the terms but a number, for which it would be compiled anew."""

    rows: Any
    start: Any
    order: Any
    onto: Any
    out: Any  # [n, width]


def shares(found: Tensor, width: int, onto: Sequence[Tensor]) -> Terms:
    """Sum the rows of a table, [number of shares, any multiple of width], to its [any multiple of width]."""
    return Terms(found.view(-1, width), None, None, tuple(t.view(-1, width) for t in onto), len(found))


@triton.jit
def _sum_block(
    job, n_segments, n_shares, block, WIDTH: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr
):
    lane = tl.arange(0, SEGMENTS * ROWS)
    segment = block.to(tl.int64) * SEGMENTS + lane // ROWS
    inside = segment < n_segments
    first, end = tl.zeros_like(segment), tl.where(inside, n_shares, 0).to(tl.int64)
    if job.start is not None:
        first = tl.load(job.start + segment, mask=inside, other=0)
        end = tl.load(job.start + segment + 1, mask=inside, other=0)
    BLOCK: tl.constexpr = triton.next_power_of_2(WIDTH)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([SEGMENTS * ROWS, BLOCK], job.out.dtype.element_ty)
    for step in range(0, tl.max(end - first).to(tl.int32), ROWS):
        row = first + step + lane % ROWS
        live = row < end
        if job.start is None:
            row = row * n_segments + segment
        if job.order is not None:
            row = tl.load(job.order + row, mask=live, other=0)
        at = row[:, None] * WIDTH + column[None, :]
        total += tl.load(job.rows + at, mask=live[:, None] & (column < WIDTH)[None, :], other=0.0)
    total = tl.sum(total.reshape([SEGMENTS, ROWS, BLOCK]), 1)
    segment = block.to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    at = segment[:, None] * WIDTH + column[None, :]
    within = (segment < n_segments)[:, None] & (column < WIDTH)[None, :]
    for n in tl.static_range(len(job.onto)):
        total += tl.load(job.onto[n] + at, mask=within, other=0.0)
    tl.store(job.out + at, total, mask=within)


@triton.jit(do_not_specialize=[f"{of}_{n}" for of in ("n", "m") for n in range(MAX_SUMS)])
def _sum_kernel(
    jobs,
    n_0,
    n_1,
    n_2,
    n_3,
    n_4,
    n_5,
    n_6,
    m_0,
    m_1,
    m_2,
    m_3,
    m_4,
    m_5,
    m_6,
    WIDTHS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    sizes = (n_0, n_1, n_2, n_3, n_4, n_5, n_6)
    shares = (m_0, m_1, m_2, m_3, m_4, m_5, m_6)
    n_of_round = tl.num_programs(0) // ROUNDS
    turn = tl.program_id(0) // n_of_round
    rest = tl.program_id(0) % n_of_round
    for job in tl.static_range(len(WIDTHS)):
        n_blocks = sizes[job] if jobs[job].start is None else tl.cdiv(sizes[job], SEGMENTS)
        n = tl.cdiv(n_blocks, ROUNDS)
        block = turn * n + rest
        if (rest >= 0) & (rest < n) & (block < n_blocks):
            if jobs[job].start is None:
                _sum_block(jobs[job], sizes[job], shares[job], block, WIDTHS[job], 1, SHARES)
            else:
                _sum_block(jobs[job], sizes[job], 0, block, WIDTHS[job], SEGMENTS, ROWS)
        rest -= n


def sum_all(wanted: Sequence[Terms]) -> list[Tensor]:
    """Sum several tables by segment in one launch, [n, width] each.

    Args:
        wanted: at most MAX_SUMS; what takes longest is best first.
    """
    jobs, n_of_round = [], 0
    for terms in wanted:
        rows, width = terms.rows, terms.rows.shape[1]
        n = len(rows) // terms.n_shares if terms.start is None else len(terms.start) - 1
        jobs.append(Sum(*terms[:4], rows.new_empty(n, width)))
        n_of_round += triton.cdiv(n if terms.start is None else triton.cdiv(n, SEGMENTS), ROUNDS)
    nothing = [0] * (MAX_SUMS - len(jobs))
    runtime.launch(
        _sum_kernel,
        ROUNDS * max(n_of_round, 1),
        jobs[0].out.device,
        tuple(jobs),
        *[len(job.out) for job in jobs],
        *nothing,
        *[terms.n_shares for terms in wanted],
        *nothing,
        WIDTHS=tuple(job.out.shape[1] for job in jobs),
        SEGMENTS=SEGMENTS,
        ROWS=ROWS,
        SHARES=SHARES,
        ROUNDS=ROUNDS,
        num_warps=2,
        num_stages=1,
    )
    return [job.out for job in jobs]


def segment_sum(rows: Tensor, segment: Tensor, start: Tensor, order: Tensor | None) -> Tensor:
    """Sum rows by segment, [N, width] to [n, width]."""
    if not 0 < rows.shape[1] <= MAX_WIDTH:
        return segments.sum_rows(rows, start, order)
    return sum_all([Terms(rows.contiguous(), start, order)])[0]
