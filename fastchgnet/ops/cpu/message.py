"""C++ bodies of `fastchgnet.ops.message` on the CPU in single precision; symbols as there."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops import _message_torch
from fastchgnet.ops._message_inputs import Inputs
from fastchgnet.ops._register import added
from fastchgnet.ops.cpu import native

_WIDTHS = (16, 64)
_N_DIRECTIONS = 7  # of the struct Given: grad, u_p, u_q, u_r, u_tail, u_w, u_a
_N_ONTO = 12  # of the struct Onto: two for each feature


def _library(m: Inputs) -> ctypes.CDLL | None:
    """Return the compiled bodies where they know these inputs."""
    known = m.p.device.type == "cpu" and m.p.dtype == torch.float32 and m.width in _WIDTHS
    return native.library() if known else None


def forward(*inputs: Any) -> Tensor:
    """Return messages or their sums."""
    m = Inputs(*inputs)
    library = _library(m)
    if library is None:
        return _message_torch.forward(*inputs)
    y = m.p.new_empty(len(m.i) if m.w is None else len(m.p), m.width)
    _call(library, 0, m, (), [y, *[None] * (9 + _N_ONTO)])
    return y


def backward(
    onto: Sequence[tuple[Tensor, ...]], with_parameters: bool, grad: Tensor, *inputs: Any
) -> list[Tensor | None]:
    """Return gradients of features and, if asked, parameters."""
    m = Inputs(*inputs)
    library = _library(m)
    if library is None:
        return added(_message_torch.backward(with_parameters, grad, *inputs), onto)
    *features, by_parameters = _gradients(library, 1, m, (grad,), None, with_parameters, onto)
    return [*features, *added([by_parameters], onto[6:])]


def backward_backward(cotangents: tuple[Any, ...], grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    """Return gradients of grad, features and parameters."""
    m = Inputs(*inputs)
    library = _library(m)
    if library is None:
        return _message_torch.backward_backward(cotangents, grad, *inputs)
    y = m.p.new_empty(grad.shape)
    return [y, *_gradients(library, 2, m, (grad, *cotangents), y, True)]


def _gradients(
    library: ctypes.CDLL,
    level: int,
    m: Inputs,
    directions: tuple[Any, ...],
    y: Any,
    with_parameters: bool,
    onto: Sequence[tuple[Tensor, ...]] = (),
) -> list[Tensor | None]:
    """Make and fill gradients of the features, added to what there is, and, if asked, of the parameters."""
    n = len(m.i)
    found = [None if t is None else m.p.new_empty(t.shape) for t in m[:6]]
    rows = [m.p.new_empty(n, 2 * m.width), None if m.w is None else m.p.new_empty(n, m.width)]
    by_parameters = None
    if with_parameters and m.parameters is not None:
        by_parameters = m.p.new_empty(m.parameters.shape)
    before = [t for some in onto[:6] for t in (*some, None, None)[:2]] or [None] * _N_ONTO
    _call(library, level, m, directions, [y, *found, *rows, by_parameters, *before])
    return [*found, by_parameters]


def _call(library: ctypes.CDLL, level: int, m: Inputs, directions: tuple[Any, ...], outputs: list) -> None:
    missing = [None] * (_N_DIRECTIONS - len(directions))
    # contiguous copies must outlive the call
    given = [None if t is None else t.contiguous() for t in (*m[:7], *m[9:], *directions, *missing)]
    segments = (m.p.shape[0], m.q.shape[0], m.r.shape[0], m.k_start.shape[0] - 1)
    n_threads = native.n_threads(m.i.shape[0])
    numbers = (m.has_hidden, m.n_norms, *segments, n_threads, m.w is not None, m.a is not None)
    status = library.messages(
        level, ctypes.c_int64(m.width), native.block(given, numbers), native.block(outputs)
    )
    assert status == 0, "a width that the compiled body does not know"
