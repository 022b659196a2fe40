# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton body of the sums of `fastchgnet.ops.segments`: several tables in one launch, no atomic additions.

A program adds four segments side by side, four rows of each at a time. The order of a segment's additions
depends on nothing but its length, so a crystal's sums are the same bit for bit in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import segments
from fastchgnet.ops.gpu import runtime

SEGMENTS = 4
ROWS = 4
MAX_SUMS = 6
MAX_WIDTH = 256


class Sum(NamedTuple):
    """Rows and the segments they are summed over."""

    rows: Any  # [N, width]
    start: Any  # [n + 1]
    order: Any  # [any number] rows, or None where they are as they stand
    out: Any  # [n, width]


@triton.jit
def _sum_block(job, n_segments, block, WIDTH: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr):
    lane = tl.arange(0, SEGMENTS * ROWS)
    segment = block.to(tl.int64) * SEGMENTS + lane // ROWS
    inside = segment < n_segments
    first = tl.load(job.start + segment, mask=inside, other=0)
    end = tl.load(job.start + segment + 1, mask=inside, other=0)
    BLOCK: tl.constexpr = triton.next_power_of_2(WIDTH)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([SEGMENTS * ROWS, BLOCK], job.rows.dtype.element_ty)
    for step in range(0, tl.max(end - first).to(tl.int32), ROWS):
        row = first + step + lane % ROWS
        live = row < end
        if job.order is not None:
            row = tl.load(job.order + row, mask=live, other=0)
        at = row[:, None] * WIDTH + column[None, :]
        total += tl.load(job.rows + at, mask=live[:, None] & (column < WIDTH)[None, :], other=0.0)
    total = tl.sum(total.reshape([SEGMENTS, ROWS, BLOCK]), 1)
    segment = block.to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
    at = segment[:, None] * WIDTH + column[None, :]
    tl.store(job.out + at, total, mask=(segment < n_segments)[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["n_0", "n_1", "n_2", "n_3", "n_4", "n_5"])
def _sum_kernel(
    jobs, n_0, n_1, n_2, n_3, n_4, n_5, WIDTHS: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr
):
    sizes = (n_0, n_1, n_2, n_3, n_4, n_5)
    block = tl.program_id(0)
    for job in tl.static_range(len(WIDTHS)):
        n_blocks = tl.cdiv(sizes[job], SEGMENTS)
        if (block >= 0) & (block < n_blocks):
            _sum_block(jobs[job], sizes[job], block, WIDTHS[job], SEGMENTS, ROWS)
        block -= n_blocks


def sum_all(wanted: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
    """Sum several (rows, start, order) by segment in one launch."""
    jobs = tuple(
        Sum(rows, start, order, rows.new_empty(len(start) - 1, rows.shape[1]))
        for rows, start, order in wanted
    )
    sizes = [len(job.out) for job in jobs]
    n_blocks = sum(-(-n // SEGMENTS) for n in sizes)
    runtime.launch(
        _sum_kernel,
        max(n_blocks, 1),
        jobs[0].rows.device,
        jobs,
        *sizes,
        *[0] * (MAX_SUMS - len(jobs)),
        WIDTHS=tuple(job.rows.shape[1] for job in jobs),
        SEGMENTS=SEGMENTS,
        ROWS=ROWS,
        num_warps=2,
        num_stages=1,
    )
    return [job.out for job in jobs]


def segment_sum(rows: Tensor, segment: Tensor, start: Tensor, order: Tensor | None) -> Tensor:
    """Sum rows by segment, [N, width] to [n, width]."""
    if not 0 < rows.shape[1] <= MAX_WIDTH:
        return segments.sum_rows(rows, start, order)
    return sum_all([(rows.contiguous(), start, order)])[0]
