# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.bond_tables` in fp32; symbols as there.

Forward, a program takes a tile of bonds, computes its basis and multiplies that with all layers. Backward,
programs compute dZ of tiles, and what that leads to; beside them, others multiply the gradients of a layer
with the basis of a chunk of its rows. A second launch adds up their shares of the gradients of parameters.
Layers are D columns each, wider ones several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import bond_tables
from fastchgnet.ops._register import adding
from fastchgnet.ops.bond_tables import MAX_LONG, Inputs
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.bond_table_tiles import by_lengths, by_weight, multiply
from fastchgnet.ops.gpu.segments import shares, sum_all

WIDTHS = (16, 32, 64)
FUNCTIONS = 32  # as many as a tile has registers for
FEWEST = 16  # columns that a factor must have
LAYERS = 4  # of a long table, as many as a sum of gradients has registers for
pytorch_backward = adding(bond_tables._backward)
ROWS = 64  # of a tile
WARPS = 4


class Given(NamedTuple):
    """What kernels read of `Inputs`."""

    distance: Any
    frequency: Any
    weight: Any
    long_weight: Any


class Found(NamedTuple):
    """What a derivative writes."""

    tables: tuple[Any, ...]  # gradients of G_m, in the second derivative
    distance: Any  # [U, 1]
    onto: Any  # [U, 1] each, what `distance` is added to
    frequency: Any  # [programs, R], shares of the programs
    weight: Any  # [chunks, numbers of W_0 and W_1], shares of the chunks
    long_weight: Any  # [chunks, numbers of W_2 and so on]


@triton.jit(do_not_specialize=["n_rows", "n_short"])
def _forward_kernel(
    m,
    tables,
    cutoff,
    scale,
    n_rows,
    n_short,
    N_LAYERS: tl.constexpr,
    PER_LONG: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sizes, constants = (n_rows, n_short), (cutoff, scale)
    multiply(m, tables, tl.program_id(0), sizes, constants, N_LAYERS, PER_LONG, P, D, R, COLUMNS, BLOCK)


@triton.jit(do_not_specialize=["n_rows", "n_short", "n_programs", "n_chunks"])
def _backward_kernel(
    m,
    cotangent,
    grads,
    found,
    n_programs,
    n_chunks,
    cutoff,
    scale,
    n_rows,
    n_short,
    N_LAYERS: tl.constexpr,
    PER_LONG: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    constants = cutoff, scale
    # fmt: off
    if program < n_programs:
        by_lengths(
            m, cotangent, grads, found, program, (n_rows, n_short, n_programs), constants,
            N_LAYERS, PER_LONG, P, D, R, COLUMNS, BLOCK,
        )
    elif found.weight is not None:
        by_weight(
            m, cotangent, grads, found, program - n_programs, (n_rows, n_short, n_chunks), constants,
            N_LAYERS, PER_LONG, P, D, R, COLUMNS, BLOCK, PRECISION,
        )
    # fmt: on


class Launch:
    """Kernels of one op call."""

    def __init__(self, inputs: Sequence[Any], grads: Sequence[Any] = ()) -> None:
        contiguous: Any = (t.contiguous() if isinstance(t, Tensor) else t for t in inputs)
        self.m = m = Inputs(*contiguous)
        self.n_rows, self.n_functions = len(m.distance), len(m.frequency)
        self.width = _width(m)
        self.per_long = 1 if m.long_weight is None else m.long_weight.shape[1] // self.width
        n_first, n_long = len(m.weight) // self.width, 0 if m.long_weight is None else len(m.long_weight)
        self.n_layers, self.n_tables = n_first + n_long * self.per_long, n_first + n_long
        self.grads = tuple(None if g is None else g.contiguous() for g in grads)

    def forward(self) -> list[Tensor]:
        """Compute all tables."""
        tables = bond_tables._shapes(*self.m)
        n_programs = max(1, triton.cdiv(self.n_rows, ROWS))
        self._run(_forward_kernel, n_programs, _padded(tables))
        return tables

    def backward(
        self, cotangent: Any, tables: Any, with_parameters: bool, onto: Sequence[Any] = ((),) * 4
    ) -> list[Any]:
        """Compute gradients of lengths and parameters, or what takes their place in the second derivative."""
        distance, n_tiles = self.m.distance, triton.cdiv(self.n_rows, ROWS)
        # two at once on a multiprocessor: one of each kind, which then find what the other read in the cache
        n_programs = runtime.n_programs(n_tiles, distance.device, 1 if with_parameters else 2)
        n_chunks = max(1, runtime.n_programs(n_tiles * self.n_tables, distance.device) // self.n_tables)
        counts = n_programs, n_chunks, n_chunks
        found_shares: list[Any] = [None] * len(counts)
        n_all = n_programs
        if with_parameters:
            given = zip(self.m[1:4], counts, strict=True)
            found_shares = [None if t is None else t.new_empty(n, t.numel()) for t, n in given]
            n_all += n_chunks * self.n_tables
        found = Found(tables, distance.new_empty(distance.shape), onto[0], *found_shares)
        args = _padded(self.grads), found, n_programs, n_chunks
        # of parameters' gradients only
        precision = runtime.current_precision() if with_parameters else "fp32"
        self._run(_backward_kernel, n_all, cotangent, *args, PRECISION=precision)
        return [found.distance, *(self._sums(found_shares, onto[1:]) if with_parameters else [])]

    def _sums(self, found: Sequence[Any], onto: Sequence[Any]) -> list[Any]:
        """Add up shares, and what there is already of the gradients of parameters."""
        pairs = [(t, before) for t, before in zip(found, onto, strict=True) if t is not None]
        sums = sum_all([shares(t, self.n_functions, before) for t, before in pairs])
        return [total.view(t.shape) for total, t in zip(sums, self.m[1:], strict=False)]

    def _run(self, kernel: Any, n_programs: int, *args: Any, **constants: Any) -> None:
        m = self.m
        runtime.launch(
            kernel,
            n_programs,
            m.distance.device,
            Given(*m[:4]),
            *args,
            m.cutoff,
            math.sqrt(2 / m.cutoff),
            self.n_rows,
            m.n_short,
            N_LAYERS=self.n_layers,
            PER_LONG=self.per_long,
            P=m.p,
            D=self.width,
            R=self.n_functions,
            COLUMNS=max(FEWEST, triton.next_power_of_2(self.n_functions)),
            BLOCK=ROWS,
            **constants,
            num_warps=WARPS,
            num_stages=1,
        )


def _padded(tables: Sequence[Any]) -> tuple[Any, ...]:
    return (*tables, *[None] * (2 + MAX_LONG - len(tables)))


def _width(m: Inputs) -> int:
    return len(m.weight) if m.long_weight is None else len(m.weight) // 2


def fits(inputs: Sequence[Any]) -> bool:
    """Tell whether the kernels take so many functions and layers of these widths."""
    m = Inputs(*inputs)
    width = _width(m)
    n_layers, rest = (1, 0) if m.long_weight is None else divmod(m.long_weight.shape[1], width)
    return rest == 0 and n_layers <= LAYERS and width in WIDTHS and len(m.frequency) <= FUNCTIONS


def forward(*inputs: Any) -> list[Tensor]:
    return Launch(inputs).forward() if fits(inputs) else bond_tables._forward(*inputs)


def backward(onto: Sequence[Any], with_parameters: bool, grads: Sequence[Any], *inputs: Any) -> list[Any]:
    if not fits(inputs):
        return pytorch_backward(onto, with_parameters, grads, *inputs)
    return Launch(inputs, grads).backward(None, None, with_parameters, onto)


def backward_backward(cotangents: Sequence[Any], grads: Sequence[Any], *inputs: Any) -> list[Any]:
    if not fits(inputs):
        return bond_tables._backward_backward(cotangents, grads, *inputs)
    launch = Launch(inputs, grads)
    tables = _padded([None if g is None else g.new_empty(g.shape) for g in launch.grads])
    found = launch.backward(cotangents[0].contiguous(), tables, with_parameters=True)
    return [*tables, *found]
