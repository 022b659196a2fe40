"""Losses and gradients of a training step whose fused ops all run as Triton kernels; prints them as JSON.

Run as a script, in a process of its own: it registers the bodies for CUDA on the CPU too, where Triton's
interpreter takes them.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import interpreted  # noqa: F401, first: Triton decides at its import whether it interprets
import torch
from torch._library.custom_ops import CustomOpDef
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode

_NO_KERNEL = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "alias", "detach", "expand", "as_strided"),
    *("t", "transpose", "permute", "unsqueeze", "squeeze", "select", "slice", "narrow", "unbind"),
    *("split", "split_with_sizes", "chunk", "unflatten", "flatten", "view_as", "contiguous"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"),
}


class Counting(TorchDispatchMode):
    """Count what would be a kernel on a GPU: PyTorch's operators but views, and launches of our own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, name, *_ = str(op).split(".")
        if namespace == "aten" and name not in _NO_KERNEL and not self.paused:
            self.kernels[name] += 1
        return op(*args, **(kwargs or {}))


counting = Counting()
_impl, _register = Library.impl, CustomOpDef.register_kernel


def _counted(body: Any) -> Any:
    def call(*args: Any) -> Any:
        with counting:
            return body(*args)

    return call


def _impl_everywhere(self: Library, name: Any, body: Any, key: str = "", **options: Any) -> None:
    if key == "CompositeExplicitAutograd":  # serves on a GPU where there is no other
        body = _counted(body)
    _impl(self, name, body, key, **options)
    if key == "CUDA":
        _impl(self, name, _counted(body), "CPU", **options)


def _register_everywhere(self: CustomOpDef, device_types: Any, body: Any = None, /) -> Any:
    if device_types != "cuda":
        return _register(self, device_types, body)
    if body is None:
        return lambda given: _register_everywhere(self, device_types, given)
    _register(self, "cuda", body)
    return _register(self, "cpu", _counted(body))


Library.impl = _impl_everywhere  # type: ignore[method-assign]
CustomOpDef.register_kernel = _register_everywhere  # type: ignore[method-assign]

from step_case import step_case  # noqa: E402, ops are registered at their import

from fastchgnet import model  # noqa: E402
from fastchgnet.ops.gpu import runtime  # noqa: E402
from fastchgnet.ops.readout import fused_readout, pack  # noqa: E402


def main(kind: str, out: str) -> None:
    """Write the gradients of the parameters to a file and print what was counted."""
    case = step_case(kind)
    counted_launch = runtime.launch

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        counting.kernels[kernel.fn.__name__] += 1
        counting.paused = True  # the interpreter uses PyTorch itself
        counted_launch(kernel, *args, **options)
        counting.paused = False

    runtime.launch = launch  # type: ignore[assignment]
    model.readout = lambda atom_AD, norm, layers: fused_readout(atom_AD, *pack(norm, layers))
    with counting:
        gradients = case.gradients()
    torch.save(gradients, out)
    print(json.dumps({"kernels": sum(counting.kernels.values()), **dict(counting.kernels.most_common())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
