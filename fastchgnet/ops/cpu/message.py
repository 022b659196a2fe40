"""C++ bodies of `fastchgnet.ops.message` on the CPU in single precision; symbols as there."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops import _message_torch
from fastchgnet.ops._message_inputs import Inputs
from fastchgnet.ops.cpu import native

_WIDTHS = (16, 64)
_DIRECTIONS = ("grad", "u_p", "u_q", "u_r", "u_w", "u_a")
_NUMBERS = ("n_i", "n_j", "n_k", "n_threads", "has_w", "has_a")
_OUTPUTS = ("y", "p", "q", "r", "w", "a", "h", "w_rows", "parameters")


class _Given(ctypes.Structure):
    # every field takes eight bytes: addresses and numbers
    _fields_ = [(name, ctypes.c_int64) for name in (*Inputs._fields, *_DIRECTIONS, *_NUMBERS)]


class _Outputs(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _OUTPUTS]


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
    _call(library, 0, m, (), [y])
    return y


def backward(with_parameters: bool, grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    """Return gradients of features and, if asked, parameters."""
    m = Inputs(*inputs)
    library = _library(m)
    if library is None:
        return _message_torch.backward(with_parameters, grad, *inputs)
    return _gradients(library, 1, m, (grad,), None, with_parameters)


def backward_backward(cotangents: tuple[Any, ...], grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    """Return gradients of grad, features and parameters."""
    m = Inputs(*inputs)
    library = _library(m)
    if library is None:
        return _message_torch.backward_backward(cotangents, grad, *inputs)
    y = m.p.new_empty(grad.shape)
    return [y, *_gradients(library, 2, m, (grad, *cotangents), y, True)]


def _gradients(
    library: ctypes.CDLL, level: int, m: Inputs, directions: tuple[Any, ...], y: Any, with_parameters: bool
) -> list[Tensor | None]:
    """Make and fill gradients of the features and, if asked, of the parameters."""
    n = len(m.i)
    found = [None if t is None else m.p.new_empty(t.shape) for t in m[:5]]
    rows = [m.p.new_empty(n, 2 * m.width), None if m.w is None else m.p.new_empty(n, m.width)]
    by_parameters = None
    if with_parameters and m.parameters is not None:
        by_parameters = m.p.new_empty(m.parameters.shape)
    _call(library, level, m, directions, [y, *found, *rows, by_parameters])
    return [*found, by_parameters]


def _call(library: ctypes.CDLL, level: int, m: Inputs, directions: tuple[Any, ...], outputs: list) -> None:
    missing = [None] * (len(_DIRECTIONS) - len(directions))
    # contiguous copies must outlive the call
    given = [t.contiguous() if isinstance(t, Tensor) else t for t in (*m, *directions, *missing)]
    lengths = (len(m.p), len(m.q), len(m.r), native.n_threads(len(m.i)))
    status = library.messages(
        level,
        ctypes.c_int64(m.width),
        ctypes.byref(_Given(*map(_word, given), *lengths, m.w is not None, m.a is not None)),
        ctypes.byref(_Outputs(*map(_word, outputs))),
    )
    assert status == 0, "a width that the compiled body does not know"


def _word(value: Any) -> int:
    """Return the address of a tensor, zero for what is missing, or the number itself."""
    return value.data_ptr() if isinstance(value, Tensor) else value or 0
