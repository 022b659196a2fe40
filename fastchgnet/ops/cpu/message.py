"""C++ bodies of `fastchgnet.ops.message` on the CPU in single precision; symbols as there."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops import _message_torch
from fastchgnet.ops._message_inputs import Inputs
from fastchgnet.ops.cpu import native
from fastchgnet.ops.segments import sum_rows

_WIDTHS = (16, 64)
_POINTERS = (
    *("p", "q", "r", "w", "a", "angle_weight", "weight", "bias", "scale", "shift"),
    *("i", "i_start", "j", "k", "grad", "u_p", "u_q", "u_r", "u_w", "u_a"),
)
_SIZES = ("n_segments", "n_norms", "n_threads")
_OUTPUTS = ("y", "p", "h", "w", "a", "angle_weight", "weight", "bias", "scale", "shift")


class _Inputs(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in _POINTERS] + [(n, ctypes.c_int64) for n in _SIZES]


class _Outputs(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in _OUTPUTS]


def _library(m: Inputs) -> ctypes.CDLL | None:
    """Return the compiled bodies where they know these inputs."""
    known = m.p.device.type == "cpu" and m.p.dtype == torch.float32 and m.p.shape[1] // 2 in _WIDTHS
    return native.library() if known else None


def forward(*inputs: Any) -> Tensor:
    """Return messages or their sums."""
    m = Inputs(*inputs)
    library = _library(m)
    if library is None:
        return _message_torch.forward(*inputs)
    width = m.p.shape[1] // 2
    y = m.p.new_empty(len(m.i), width) if m.w is None else m.p.new_zeros(len(m.p), width)
    _call(library, 0, m, {}, {"y": y})
    return y


def backward(with_parameters: bool, grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    """Return gradients of features and, if asked, parameters."""
    m = Inputs(*inputs)
    library = _library(m)
    if library is None:
        return _message_torch.backward(with_parameters, grad, *inputs)
    outputs = _row_gradients(m) | (_parameter_gradients(m) if with_parameters else {})
    _call(library, 1, m, {"grad": grad}, outputs)
    return _collected(m, outputs, with_parameters)


def backward_backward(cotangents: tuple[Any, ...], grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    """Return gradients of grad, features and parameters."""
    m = Inputs(*inputs)
    library = _library(m)
    if library is None:
        return _message_torch.backward_backward(cotangents, grad, *inputs)
    directions = dict(zip(("u_p", "u_q", "u_r", "u_w", "u_a"), cotangents, strict=True))
    y = torch.empty_like(grad) if m.w is None else torch.zeros_like(grad)
    outputs = {"y": y, **_row_gradients(m), **_parameter_gradients(m)}
    _call(library, 2, m, {"grad": grad, **directions}, outputs)
    return [y, *_collected(m, outputs, True)]


def _row_gradients(m: Inputs) -> dict[str, Any]:
    n, width = len(m.i), m.p.shape[1] // 2
    return {
        "p": torch.zeros_like(m.p),
        "h": m.p.new_empty(n, 2 * width),
        "w": None if m.w is None else m.p.new_empty(n, width),
        "a": None if m.a is None else torch.empty_like(m.a),
    }


def _parameter_gradients(m: Inputs) -> dict[str, Any]:
    """Room for the sums of every thread."""
    n_threads, width = native.n_threads(len(m.i)), m.p.shape[1] // 2

    def room(like: Any, *shape: int) -> Any:
        return None if like is None else m.p.new_zeros(n_threads, *shape)

    return {
        "angle_weight": room(m.angle_weight, 2 * width, width),
        "weight": room(m.weight, 2, width, width),
        "bias": room(m.bias, 2, width),
        "scale": room(m.scale, 2, width),
        "shift": room(m.shift, 2, width),
    }


def _call(library: ctypes.CDLL, level: int, m: Inputs, directions: dict, outputs: dict) -> None:
    given = {name: t for name, t in (m._asdict() | directions).items() if name in _POINTERS}
    # contiguous copies must outlive the call
    tensors = {name: None if t is None else t.contiguous() for name, t in given.items()}
    sizes = {
        "n_segments": len(m.p),
        "n_norms": 0 if m.scale is None else len(m.scale),
        "n_threads": native.n_threads(len(m.i)),
    }
    inputs = _Inputs(**{name: native.pointer(t) for name, t in tensors.items()}, **sizes)
    results = _Outputs(**{name: native.pointer(t) for name, t in outputs.items()})
    status = library.messages(
        level, ctypes.c_int64(m.p.shape[1] // 2), ctypes.byref(inputs), ctypes.byref(results)
    )
    assert status == 0, "a width that the compiled body does not know"


def _collected(m: Inputs, found: dict[str, Any], with_parameters: bool) -> list[Tensor | None]:
    """Sum gradients of rows for the tables and those of parameters over threads; in the order of `Inputs`."""
    q = sum_rows(found["h"], m.j_start, m.j_order)
    r = sum_rows(found["h"], m.k_start, m.k_order)
    w = None if m.w is None else sum_rows(found["w"], m.k_start, m.k_order)
    features = [found["p"], q, r, w, found["a"]]
    if not with_parameters:
        return features
    parameters = {n: found[n] for n in ("angle_weight", "weight", "bias", "scale", "shift")}
    sums: dict[str, Any] = {name: None if t is None else t.sum(0) for name, t in parameters.items()}
    for name in ("scale", "shift"):
        if sums[name] is not None:
            sums[name] = sums[name].sum_to_size(getattr(m, name).shape)
    return [*features, *sums.values()]
