"""Gather rows of a table, and sum rows by segment: each the derivative of the other.

With y[N, D], t[n, D] and the segment s(k) of each row k:

    gather       y_k = t_s(k)                     VJP: segment_sum
    segment_sum  t_s = sum of y_k over s(k) = s   VJP: gather

A segment's rows are added in the order in which the index lists them, so that results repeat bit for bit;
nothing is saved. Both are linear, so the chain of derivatives never ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastchgnet.graph import Index
from fastchgnet.ops._register import define, implement, shape_of
from fastchgnet.ops.cpu import native
from fastchgnet.ops.gpu import runtime


def gather(table: Tensor, index: Index) -> Tensor:
    """Read the row of every segment, [n, D] to [N, D]."""
    return _gather(table, index.segment, index.start, index.order)


def segment_sum(rows: Tensor, index: Index) -> Tensor:
    """Sum rows by segment, [N, D] to [n, D]; segments without rows are zero."""
    return _segment_sum(rows, index.segment, index.start, index.order)


def reference(rows: Tensor, index: Index) -> Tensor:
    """Sum rows by segment in plain PyTorch."""
    return rows.new_zeros(index.n_segments, rows.shape[1]).index_add(0, index.segment, rows)


def sum_rows(rows: Tensor, start: Tensor, order: Tensor | None) -> Tensor:
    """Sum rows by segment, from the transpose alone."""
    if not len(rows) or len(start) == 1 or (order is not None and not len(order)):
        return rows.new_zeros(len(start) - 1, rows.shape[1])
    library = native.library() if rows.dtype == torch.float32 and rows.device.type == "cpu" else None
    if library is not None:
        return _native_sum(library, rows.contiguous(), start, order)
    if order is None:
        order = torch.arange(len(rows), device=rows.device)
    # the fastest sum over ragged segments that PyTorch has on CPUs, and one without atomic additions on GPUs
    total, *_ = torch.ops.aten._embedding_bag(rows, order, start, False, 0, False, None, True)
    return total


def _native_sum(library: Any, rows: Tensor, start: Tensor, order: Tensor | None) -> Tensor:
    out = rows.new_empty(len(start) - 1, rows.shape[1])
    sizes = (len(start) - 1, rows.shape[1], native.n_threads(len(rows)))
    pointers = [ctypes.c_void_p(native.pointer(t)) for t in (rows, order, start, out)]
    library.sum_rows(*pointers[:3], *map(ctypes.c_int64, sizes), pointers[3])
    return out


def _gather_derivative(
    inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]
) -> tuple[Any, ...]:
    (grad,) = grads
    return None if grad is None else _segment_sum(grad.contiguous(), *inputs[1:]), None, None, None


def _sum_derivative(inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]) -> tuple[Any, ...]:
    (grad,) = grads
    return None if grad is None else _gather(grad, *inputs[1:]), None, None, None


def _body(rows: Tensor, segment: Tensor, start: Tensor, order: Tensor | None) -> Tensor:
    return sum_rows(rows, start, order)


_SCHEMA = "(Tensor rows, Tensor segment, Tensor start, Tensor? order) -> Tensor"
_gather = define("gather", _SCHEMA, _gather_derivative)
_segment_sum = define("segment_sum", _SCHEMA, _sum_derivative)
implement("gather", lambda table, segment, start, order: table.index_select(0, segment))
implement(
    "segment_sum", _body, runtime.body("segments", "segment_sum", _body, (torch.float32, torch.float64))
)
shape_of("gather", lambda table, segment, start, order: table.new_empty(len(segment), table.shape[1]))
shape_of("segment_sum", lambda rows, segment, start, order: rows.new_empty(len(start) - 1, rows.shape[1]))
