# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.projection` in fp32; symbols as there.

There are few rows, some 2,000 atoms or 8,000 short bonds, so that waiting counts for more than work.
Forward is one launch: a program computes x of a tile of rows and then all y_m of these, or only some of
them where the tiles are too few to fill the GPU. Backward is one launch too, of programs that each compute
ds of a tile from all Y_m. Those of x, which the parameters' gradients need, run beside them, and so do
those of all projections of x' in the second derivative. A second launch multiplies tables with each other
for the gradients of the parameters, all rows of a chunk for one matrix [D, D] in a program; a third adds up
the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import projection
from fastchgnet.ops._register import added, adding
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.projection_tiles import project, pull, weigh
from fastchgnet.ops.gpu.segments import shares, sum_all
from fastchgnet.ops.projection import MAX_PARTS, Inputs

WIDTHS = (16, 32, 64)
pytorch_backward = adding(projection._backward)
WARPS = 4
ROWS = 32  # of a tile
FEW_ROWS = 16  # where tiles of as few rows as the matrix units take all run at once
PER_MULTIPROCESSOR = 2  # programs, of which each takes up to half of the registers


class Given(NamedTuple):
    """What x is made of, s + B (w sum of t + more_w sum of more_t), and what it is multiplied with."""

    s: Any  # [n, D]
    t: Any  # [n_ends or n, D]
    w: Any  # [n, D]
    more_t: Any  # [n_ends or n, D]
    more_w: Any  # [n, D]
    out: Any  # [D, D], B
    weight: Any  # [sum of 2D, D]
    bias: Any  # [2D for each of the first parts]
    row_ends: Any  # [n, 2]


class Made(NamedTuple):
    """Tables by rows, and projections."""

    sent: Any  # [n, D], t^
    x: Any  # [n, D]
    parts: tuple[Any, ...]  # [n or n_ends, 2D], MAX_PARTS of them


class Grads(NamedTuple):
    """X and Y_m."""

    x: Any  # [n, D]
    parts: tuple[Any, ...]  # [n or n_ends, 2D], MAX_PARTS of them


class Pulled(NamedTuple):
    """What ds leads to, and a factor of h in it."""

    s: Any  # [n, D], ds
    t: Any  # [n_ends or n, D]
    t_weight: Any  # [n, D], what h is multiplied with for t
    w: Any  # [n, D]
    onto_t: Any = ()  # [n_ends or n, D] each, what t is added to
    onto_w: Any = ()  # [n, D] each


class Factors(NamedTuple):
    """Tables whose products make gradients of parameters."""

    ds: Any  # [n, D]
    sent: Any  # [n, D]
    x: Any  # [n, D]


@triton.jit(do_not_specialize=["n_rows", "n_groups"])
def _forward_kernel(
    m,
    made,
    n_rows,
    n_groups,
    N_PARTS: tl.constexpr,
    N_AT_ENDS: tl.constexpr,
    N_BIASES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    project(m, made, tl.program_id(0), n_rows, n_groups, N_PARTS, N_AT_ENDS, N_BIASES, D, BLOCK)


@triton.jit(do_not_specialize=["n_rows"])
def _backward_kernel(
    m,
    grads,
    found,
    made,
    n_rows,
    N_PARTS: tl.constexpr,
    N_AT_ENDS: tl.constexpr,
    N_BIASES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PULLS: tl.constexpr,  # whether there is `found`; Triton 3.6 does not compare tuples with None
    MAKES: tl.constexpr,  # whether there is `made`
):
    program, n_tiles = tl.program_id(0), tl.cdiv(n_rows, BLOCK)
    if PULLS:
        if program < n_tiles:
            pull(m, grads, found, program, n_rows, N_PARTS, N_AT_ENDS, D, BLOCK)
        program -= n_tiles
    if MAKES and program >= 0:
        project(m, made, program, n_rows, 1, N_PARTS, N_AT_ENDS, 0, D, BLOCK)


@triton.jit(do_not_specialize=["n_rows", "n_chunks"])
def _weigh_kernel(
    m,
    grads,
    factors,
    by_weight,
    by_bias,
    n_rows,
    n_chunks,
    N_PARTS: tl.constexpr,
    N_AT_ENDS: tl.constexpr,
    N_BIASES: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0), n_chunks
    weigh(m, grads, factors, by_weight, by_bias, program, n_rows, N_PARTS, N_AT_ENDS, N_BIASES, D, BLOCK)


class Launch:
    """Kernels of one op call."""

    def __init__(self, inputs: Sequence[Any], grads: Sequence[Any] = ()) -> None:
        self.m = m = Inputs(*_contiguous(inputs))
        self.n_rows, self.width = m.s.shape
        self.n_parts = m.n_parts
        self.grads = Grads(None, ())
        if grads:
            by_x, *by_parts = _contiguous(grads[: 1 + m.n_parts])
            self.grads = Grads(by_x, _padded(by_parts))

    def given(self, s: Any, t: Any, more: tuple[Any, Any], bias: Any) -> Given:
        """What x, or x', is made of."""
        m = self.m
        out, weight = (None, m.weight) if m.t is None else (m.weight[: self.width], m.weight[self.width :])
        return Given(s, t, m.w, *more, out, weight, bias, m.row_ends)

    def parts(self) -> tuple[Any, ...]:
        """Make what projections write."""
        m = self.m
        n_ends = 0 if m.end_row is None else len(m.end_row)
        rows = [n_ends if k < m.n_at_ends else self.n_rows for k in range(m.n_parts)]
        return _padded([m.s.new_empty(n, 2 * self.width) for n in rows])

    def forward(self, given: Given, made: Made) -> None:
        """Compute x and its projections."""
        n_tiles = triton.cdiv(self.n_rows, ROWS)
        n_groups = max(1, min(self.n_parts, self._at_once() // max(1, n_tiles)))
        self._run(_forward_kernel, n_tiles * n_groups, ROWS, given, made, self.n_rows, n_groups)

    def backward(self, given: Given, found: Pulled | None, made: Made | None) -> None:
        """Compute ds and what it leads to, and x or x' and projections of this; or either."""
        pulls, makes = found is not None, made is not None
        kinds = pulls + makes
        many = kinds * triton.cdiv(self.n_rows, FEW_ROWS) > self._at_once()
        rows = ROWS if many else FEW_ROWS
        n_programs = kinds * triton.cdiv(self.n_rows, rows)
        args = (given, self.grads, found, made, self.n_rows)
        self._run(_backward_kernel, n_programs, rows, *args, PULLS=pulls, MAKES=makes)

    def parameters(self, given: Given, factors: Factors, onto: Sequence[Any] = ((), ())) -> list[Any]:
        """Return the gradients of the weights and of the biases, added to what there is of them."""
        m, bias = self.m, given.bias
        n_matrices = m.weight.numel() // self.width**2
        n_chunks = max(1, min(triton.cdiv(self.n_rows, ROWS), self._at_once() // n_matrices))
        found = [m.s.new_empty(n_chunks, t.numel()) for t in (m.weight, bias) if t is not None]
        by_bias = None if bias is None else found[1]
        args = (given, self.grads, factors, found[0], by_bias, self.n_rows, n_chunks)
        # while one tile is multiplied, rows of the next and ends of the one after that are read
        self._run(_weigh_kernel, n_chunks * n_matrices, ROWS, *args, num_stages=3)
        terms = [shares(t, self.width, before) for t, before in zip(found, onto, strict=False)]
        by_weight, *by_biases = sum_all(terms)
        return [by_weight, by_biases[0].flatten() if by_biases else None]

    def _at_once(self) -> int:
        """Programs that run at once, if there are as many rows."""
        return runtime.n_programs(self.n_rows, self.m.s.device, PER_MULTIPROCESSOR)

    def _run(
        self,
        kernel: Any,
        n_programs: int,
        rows: int,
        given: Given,
        *args: Any,
        num_stages: int = 1,
        **options: Any,
    ) -> None:
        runtime.launch(
            kernel,
            max(n_programs, 1),
            self.m.s.device,
            given,
            *args,
            N_PARTS=self.n_parts,
            N_AT_ENDS=self.m.n_at_ends,
            N_BIASES=0 if given.bias is None else len(given.bias) // (2 * self.width),
            D=self.width,
            BLOCK=rows,
            num_warps=WARPS,
            num_stages=num_stages,
            **options,
        )


def _contiguous(given: Sequence[Any]) -> list[Any]:
    return [t.contiguous() if isinstance(t, Tensor) else t for t in given]


def _like(t: Any) -> Any:
    """Make a tensor of the shape of another, if there is one."""
    return None if t is None else t.new_empty(t.shape)


def _padded(parts: Sequence[Any]) -> tuple[Any, ...]:
    return (*parts, *[None] * (MAX_PARTS - len(parts)))


def fits(inputs: Sequence[Any]) -> bool:
    """Tell whether the kernels take features of this width."""
    return Inputs(*inputs).s.shape[1] in WIDTHS


def forward(*inputs: Any) -> tuple[Any, ...]:
    if not fits(inputs):
        return projection._forward(*inputs)
    launch = Launch(inputs)
    m = launch.m
    made = Made(None, None if m.t is None else _like(m.s), launch.parts())
    launch.forward(launch.given(m.s, m.t, (None, None), m.bias), made)
    return made.x, *made.parts[: m.n_parts]


def backward(onto: Sequence[Any], with_parameters: bool, grads: Sequence[Any], *inputs: Any) -> list[Any]:
    if not fits(inputs):
        return pytorch_backward(onto, with_parameters, grads, *inputs)
    launch = Launch(inputs, grads)
    m = launch.m
    given = launch.given(m.s, m.t, (None, None), m.bias)
    found = Pulled(_like(m.s), _like(m.t), m.w, _like(m.w), *onto[1:3])
    # x is s where nothing was sent
    update = with_parameters and m.t is not None
    made = Made(_like(m.s), _like(m.s), _padded([])) if update else None
    launch.backward(given, found, made)
    (by_s,) = added([found.s.clone() if onto[0] else found.s], onto[:1])  # itself, it is a factor below
    features = [by_s, found.t, found.w]
    if not with_parameters:
        return features
    factors = Factors(found.s, *((None, m.s) if made is None else (made.sent, made.x)))
    return [*features, *launch.parameters(given, factors, onto[3:])]


def backward_backward(cotangents: Sequence[Any], grads: Sequence[Any], *inputs: Any) -> list[Any]:
    if not fits(inputs):
        return projection._backward_backward(cotangents, grads, *inputs)
    launch = Launch(inputs, grads)
    m = launch.m
    u_s, u_t, u_w = _contiguous(cotangents)
    given = launch.given(u_s, u_t, (None if u_w is None else m.t, u_w), None)
    by_t, by_w = None if u_w is None else _like(m.t), None if u_t is None else _like(m.w)
    # without t' nothing depends on ds
    has_sent = u_t is not None or u_w is not None
    found = Pulled(_like(m.s), by_t, u_w, by_w) if has_sent else None
    sent, x = _like(m.s) if has_sent else None, _like(m.s) if m.t is not None else None
    made = Made(sent, x, launch.parts())
    launch.backward(given, found, made)
    factors = Factors(None if found is None else found.s, sent, u_s if x is None else x)
    by_weight, _ = launch.parameters(given, factors)
    return [x, *made.parts, None, by_t, by_w, by_weight]
