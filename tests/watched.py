"""Let Triton's interpreter fail where a GPU may go wrong and the interpreter does not.

The interpreter runs the programs of a launch one after another, each as whole arrays, and reads zeros where
a mask leaves a value open. On a GPU programs and the threads of a program run side by side, and such a value
is anything. So here programs run backwards, open values are not numbers, and what a launch reads and writes
is noted:

- all of it lies within the tensors that the launch was given;
- nothing is written twice, or read by another program than the one that writes it;
- a program does not read what it has written, and what it has read it writes from the same lanes only: there
  what is written depends on what was read, which orders the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

ANY_NUMBER = -1_234_567_890_123
"""What may be where nobody has written: as an index it leads out of every table."""


class Fault(BaseException):
    """What a GPU may compute otherwise; nothing between a kernel and its test may catch it."""


class _Accesses:
    """Elements that a launch reads, or those that it writes, and when and where it does."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, address: np.ndarray, live: np.ndarray, program: int, time: int) -> None:
        lane = np.flatnonzero(live)
        when = (np.full(len(lane), program), np.full(len(lane), time))
        self._parts.append((address.ravel()[lane], lane, *when))

    def by_address(self) -> tuple[np.ndarray, ...]:
        """Return addresses in order, and the lane, the program and the time of each."""
        if not self._parts:
            return (np.zeros(0, np.int64),) * 4
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return tuple(column[order] for column in columns)


class _Launch:
    """What a launch may touch, and what it has touched."""

    def __init__(self, args: Any) -> None:
        self.reads, self.writes, self.time = _Accesses(), _Accesses(), 0
        self.is_open = False  # whether the last load says nothing about what is masked off
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.numel()]
        ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
        self._begin = np.array([begin for begin, _ in ranges], np.int64)
        # a tensor may be part of another
        self._end = np.maximum.accumulate(np.array([end for _, end in ranges], np.int64))

    def touch(self, accesses: _Accesses, pointers: TensorHandle, mask: TensorHandle, program: int) -> None:
        address, live = np.broadcast_arrays(pointers.data.astype(np.int64), mask.data.astype(bool))
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        table = np.searchsorted(self._begin, address[live], side="right") - 1
        if (table < 0).any() or (address[live] + size > self._end[table]).any():
            raise Fault("touches memory beyond the tensors of its launch")
        self.time += 1
        accesses.add(address, live, program, self.time)

    def check(self) -> None:
        """Find what depends on the order of programs or of threads."""
        written, lane, program, time = self.writes.by_address()
        if not len(written):
            return
        if (written[1:] == written[:-1]).any():
            raise Fault("writes an element twice")
        read, read_lane, read_program, read_time = self.reads.by_address()
        at = np.searchsorted(written, read).clip(max=len(written) - 1)
        both = written[at] == read
        if (both & (program[at] != read_program)).any():
            raise Fault("reads what another program writes")
        if (both & (time[at] < read_time)).any():
            raise Fault("reads what it has written")
        if (both & (lane[at] != read_lane)).any():
            raise Fault("writes from one lane what it has read from another")


def _anything(pointers: TensorHandle) -> TensorHandle:
    """Return what loads may return where they are masked off."""
    kind = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    value = np.array(np.nan if dtype.kind == "f" else ANY_NUMBER).astype(dtype)
    return TensorHandle(np.full_like(pointers.data, value, dtype), kind)


def watch() -> None:
    """Watch all launches from now on."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    call, ask, set_program = GridExecutor.__call__, TritonSemantic.load, InterpreterBuilder.set_grid_idx
    launches: list[_Launch] = []

    def watched_call(self: Any, *args: Any, **options: Any) -> None:
        launches.append(_Launch((args, options)))
        try:
            call(self, *args, **options)
            launches[-1].check()
        except Fault as fault:
            raise Fault(f"{self.fn.__name__} {fault}") from fault
        finally:
            launches.pop()

    def backwards(self: Any, x: int, y: int, z: int) -> None:
        set_program(self, self.grid_dim[0] - 1 - x, y, z)

    def asked_load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        # the interpreter takes a single zero for nothing
        launches[-1].is_open = other is None
        return ask(self, pointers, mask, other, *options)

    def watched_load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        launch = launches[-1]
        launch.touch(launch.reads, pointers, mask, self.grid_idx[0])
        other = _anything(pointers) if launch.is_open else other
        return load(self, pointers, mask, other, *options)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        launch = launches[-1]
        launch.touch(launch.writes, pointers, mask, self.grid_idx[0])
        return store(self, pointers, value, mask, *options)

    GridExecutor.__call__ = watched_call
    TritonSemantic.load = asked_load
    InterpreterBuilder.create_masked_load = watched_load
    InterpreterBuilder.create_masked_store = watched_store
    InterpreterBuilder.set_grid_idx = backwards
    # on a GPU the lesser of a number and NaN is the number
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
