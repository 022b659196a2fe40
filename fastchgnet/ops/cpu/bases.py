"""C++ bodies of `fastchgnet.ops.radial_basis` and `angular_basis` on the CPU in single precision."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastchgnet.ops.cpu import native

_MAX_FUNCTIONS = 64


def library(rows: Tensor, frequency: Tensor | None) -> ctypes.CDLL | None:
    """Return the compiled bodies where they know these inputs."""
    if frequency is None or len(frequency) > _MAX_FUNCTIONS:
        return None
    known = rows.device.type == "cpu" and rows.dtype == torch.float32
    return native.library() if known else None


def radial(compiled: ctypes.CDLL, distance: Tensor, frequency: Tensor, cutoff: float, p: int) -> Tensor:
    """Return the functions of every distance."""
    out = distance.new_empty(len(distance), len(frequency))
    _call(compiled.radial_basis, (distance, frequency), _radial_numbers(distance, frequency, cutoff, p), out)
    return out


def radial_backward(
    compiled: ctypes.CDLL, grad: Tensor, distance: Tensor, frequency: Tensor, cutoff: float, p: int
) -> Tensor:
    """Return the gradient of the distances."""
    out = torch.empty_like(distance, memory_format=torch.contiguous_format)
    numbers = _radial_numbers(distance, frequency, cutoff, p)
    _call(compiled.radial_basis_backward, (grad, distance, frequency), numbers, out)
    return out


def angular(compiled: ctypes.CDLL, short_edge: Tensor, frequency: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Return the Fourier series of every angle."""
    out = short_edge.new_empty(len(i), 1 + 2 * len(frequency))
    tensors = (short_edge, frequency, i, j)
    _call(compiled.angular_basis, tensors, _angular_numbers(short_edge, frequency, i), out)
    return out


def angular_backward(
    compiled: ctypes.CDLL, grad: Tensor, short_edge: Tensor, frequency: Tensor, index: Sequence[Tensor]
) -> Tensor:
    """Return the gradient of the short edges; of angles `index` has i, its start, j and the reverse."""
    out = torch.empty_like(short_edge, memory_format=torch.contiguous_format)
    numbers = _angular_numbers(short_edge, frequency, index[0])
    _call(compiled.angular_basis_backward, (grad, short_edge, frequency, *index), numbers, out)
    return out


def _radial_numbers(distance: Tensor, frequency: Tensor, cutoff: float, p: int) -> tuple:
    sizes = map(ctypes.c_int64, (len(distance), len(frequency)))
    return *sizes, ctypes.c_double(cutoff), ctypes.c_int64(p), _threads(distance)


def _angular_numbers(short_edge: Tensor, frequency: Tensor, i: Tensor) -> tuple:
    return *map(ctypes.c_int64, (len(short_edge), len(i), len(frequency))), _threads(i)


def _threads(rows: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(native.n_threads(len(rows)))


def _call(function: ctypes._NamedFuncPointer, tensors: Sequence[Tensor], numbers: tuple, out: Tensor) -> None:
    # contiguous copies must outlive the call
    given = [tensor.contiguous() for tensor in tensors]
    function(
        *(ctypes.c_void_p(native.pointer(tensor)) for tensor in (*given,)),
        *numbers,
        ctypes.c_void_p(native.pointer(out)),
    )
