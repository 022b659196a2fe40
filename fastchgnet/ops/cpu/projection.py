"""C++ bodies of `fastchgnet.ops.projection` on the CPU in single precision; symbols as there."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from fastchgnet.ops.cpu import native

_WIDTHS = (16, 64)


def library(m: Any) -> ctypes.CDLL | None:
    """Return the compiled bodies where they know these inputs."""
    s = m.s
    known = s.device.type == "cpu" and s.dtype == torch.float32 and s.shape[1] in _WIDTHS
    return native.library() if known else None


def forward(compiled: ctypes.CDLL, m: Any) -> list[Any]:
    """Return the new state, None where nothing was sent, and the projections."""
    n, d = m.s.shape
    x = None if m.t is None else m.s.new_empty(n, d)
    n_ends = n if m.end_row is None else m.end_row.shape[0]
    lengths = [n_ends if part < m.n_at_ends else n for part in range(m.n_parts)]
    made = [x, *(m.s.new_empty(length, 2 * d) for length in lengths)]
    _call(compiled, m, made, None, None)
    return made


def backward(compiled: ctypes.CDLL, m: Any, grads: Sequence[Any]) -> list[Any]:
    """Return gradients of the features."""
    found = [None if t is None else t.new_empty(t.shape) for t in (m.s, m.t, m.w)]
    _call(compiled, m, None, grads[: 1 + m.n_parts], found)
    return found


def _call(compiled: ctypes.CDLL, m: Any, made: Any, grads: Any, found: Any) -> None:
    # contiguous copies must outlive the call
    given = [None if t is None else t.contiguous() for t in (*m[:5], m.row_ends)]
    n, d = m.s.shape
    n_biases = 0 if m.bias is None else m.bias.shape[0] // (2 * d)
    numbers = (n, m.n_at_ends, m.n_parts, n_biases, native.n_threads(n))
    states = (None if of is None else native.block(of) for of in (made, grads, found))
    status = compiled.project(ctypes.c_int64(d), native.block(given, numbers), *states)
    assert status == 0, "a width that the compiled body does not know"
