"""Take the trainer's own step with Triton kernels for all ops, count what a GPU would execute, and print it.

python tests/triton_step.py conservative 2 OUT

Run as a script, in a process of its own: it registers the bodies for CUDA on the CPU too, where Triton's
interpreter takes them. One step counts, as replayed from a recording; OUT gets what it computes, and the
counts are printed as JSON, by part of the step and by name.

Counted are our launches, copies from the host, and PyTorch's operators but for those that only allocate or
return a view. An operator counts as one kernel, where it is not known to be several.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import interpreted  # noqa: F401, first: Triton decides at its import whether it interprets
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATES = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_TWO = {"select_backward", "slice_backward", "embedding_dense_backward", "dot"}
"""Operators that begin with a fill, or end with a sum, in a kernel of its own."""
_MOST_TENSORS = 64
"""What one launch of an operator on lists of tensors takes; tensors that do not lie alike take one each."""


class Counting(TorchDispatchMode):
    """Count what would be a kernel on a GPU, by part of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.part = "inputs"
        self.paused = False
        self.of_forces = range(0)  # numbers of the functions that the derivative for forces has left behind

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = op(*args, **(kwargs or {}))
        namespace, name, *_ = str(op).split(".")
        if namespace == "aten" and name not in _ALLOCATES and not _is_view(op, args, found):
            self.add(f"aten::{name}", _launches(name, args))
        return found

    def add(self, name: str, n: int = 1) -> None:
        """Count a kernel."""
        if not self.paused:
            self.kernels[self._part()][name] += n

    def _part(self) -> str:
        if self.part != "backward":
            return self.part
        node = torch._C._current_autograd_node()
        of_forces = node is not None and node._sequence_nr() in self.of_forces
        return "second derivatives" if of_forces else "derivatives"

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count for a part of the step."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def _is_view(op: Any, args: tuple, found: Any) -> bool:
    """Tell whether all that an operator returns is what it was given, unchanged."""
    given, made = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in (args, found))
    storages = {t.untyped_storage().data_ptr() for t in given}
    return not op._schema.is_mutable and all(t.untyped_storage().data_ptr() in storages for t in made)


def _launches(name: str, args: tuple) -> int:
    """How many kernels an operator is."""
    if not name.startswith("_foreach"):
        return 2 if name in _TWO else 1
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    alike = len({t.dtype for tensors in lists for t in tensors}) == 1
    alike &= all(len({t.stride() for t in together}) == 1 for together in zip(*lists, strict=True))
    return -(-len(lists[0]) // _MOST_TENSORS) if alike else len(lists[0])


counting = Counting()
_impl, _register = Library.impl, CustomOpDef.register_kernel


def _counted(body: Any) -> Any:
    def call(*args: Any) -> Any:
        with counting:
            return body(*args)

    return call


def _impl_everywhere(self: Library, name: Any, body: Any, key: str = "", **options: Any) -> None:
    if self.ns != "fastchgnet":  # torch's own
        _impl(self, name, body, key, **options)
        return
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
    Library.impl = _impl  # type: ignore[method-assign]
    try:
        _register(self, "cuda", body)
        return _register(self, "cpu", _counted(body))
    finally:
        Library.impl = _impl_everywhere  # type: ignore[method-assign]


Library.impl = _impl_everywhere  # type: ignore[method-assign]
CustomOpDef.register_kernel = _register_everywhere  # type: ignore[method-assign]

from trainer_step import trainer_step  # noqa: E402, ops are registered at their import

from fastchgnet import potential  # noqa: E402
from fastchgnet.heads import PairHeads  # noqa: E402
from fastchgnet.ops.gpu import runtime  # noqa: E402
from fastchgnet.potential import Potential  # noqa: E402
from fastchgnet.record import Recorder  # noqa: E402
from fastchgnet.train import source, step  # noqa: E402
from fastchgnet.train.gradient import Gradient  # noqa: E402
from fastchgnet.train.optim import Optimizer  # noqa: E402
from fastchgnet.train.resident import ResidentFrames  # noqa: E402

PARTS = (
    (ResidentFrames, "gather", "frames"),
    (source, "build_graph", "graph"),
    (Potential, "forward", "forward"),
    (PairHeads, "forward", "forces"),
    (potential, "forces_and_stress", "forces"),
    (step, "tally", "loss"),
    (Gradient, "take", "gradient buffer"),
    (Optimizer, "update", "optimizer"),
)
"""What is called where in a step, and which part of it that is."""

ORDER = (
    *("inputs", "frames", "graph", "forward", "forces", "loss", "second derivatives", "derivatives"),
    *("gradient buffer", "optimizer", "statistics"),
)


def _watch() -> None:
    """Have everything counted, for its part."""
    launch, grad = runtime.launch, torch.autograd.grad

    def counted_launch(kernel: Any, *args: Any, **options: Any) -> None:
        module, name = kernel.fn.__module__.split(".")[-1], kernel.fn.__name__
        counting.add(f"{module}.{name.strip('_').removesuffix('_kernel')}")
        with counting.pause():  # the interpreter uses PyTorch itself
            launch(kernel, *args, **options)

    def counted_grad(*args: Any, **options: Any) -> Any:
        if counting.part != "forward":
            with counting.within("backward"):
                return grad(*args, **options)
        first = _functions_so_far()
        with counting.within("forces"):
            found = grad(*args, **options)
        counting.of_forces = range(first, _functions_so_far())
        return found

    runtime.launch = counted_launch  # type: ignore[assignment]
    runtime.serves = lambda tensor: True
    runtime.current_precision = lambda: "fp32"  # rounding to tf32 would hide mistakes below 1e-3
    torch.autograd.grad = counted_grad
    for place, name, part in PARTS:
        setattr(place, name, _labelled(getattr(place, name), part))
    step.Step.__call__ = _labelled(step.Step.__call__, "statistics")  # type: ignore[method-assign]
    Recorder._make = _uncounted(Recorder._make)  # type: ignore[method-assign]
    Recorder.__call__ = _counted(Recorder.__call__)  # type: ignore[method-assign]


def _functions_so_far() -> int:
    """The number that autograd gives to its next function."""
    with counting.pause():
        made = torch.zeros((), requires_grad=True).view(1)
    assert made.grad_fn is not None
    return made.grad_fn._sequence_nr()


def _labelled(function: Callable, part: str) -> Callable:
    def call(*args: Any, **options: Any) -> Any:
        with counting.within(part):
            return function(*args, **options)

    return call


def _uncounted(function: Callable) -> Callable:
    def call(*args: Any) -> Any:
        with counting.pause():
            return function(*args)

    return call


class _Anything(set):
    def __contains__(self, value: object) -> bool:
        return True


def main(readout: str, n_frames: str, out: str) -> None:
    """Write what a step computes to a file, and print what was counted."""
    _watch()

    def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # the result is always in the same place, and called again the function writes it there
        return function, case.steps.step.gradient.numbers[: len(step.Outcome._fields)]

    with tempfile.TemporaryDirectory() as folder:
        case = trainer_step(readout, int(n_frames), Path(folder), record=record)
        case.steps._recorder._seen = _Anything()  # as if such a step had been taken before
        case.take()
    torch.save(case.found(), out)
    assert counting.kernels.keys() <= set(ORDER)
    print(json.dumps({part: dict(counting.kernels[part].most_common()) for part in ORDER}))


if __name__ == "__main__":
    main(*sys.argv[1:])
