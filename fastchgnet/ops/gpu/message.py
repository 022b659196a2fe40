# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.message` in fp32: forward and backward; symbols as there.

A program takes tiles of rows in turn and does the whole op on each in registers: no intermediate of a row
reaches memory. A second launch sums rows of results for all tables, and the programs' shares of the
gradients of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import _message_torch
from fastchgnet.ops._message_inputs import Inputs
from fastchgnet.ops._register import adding
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.message_tiles import (
    affine,
    gathered,
    linear_backward,
    no_sums,
    norm,
    norm_input,
    norm_row,
    rows_backward,
    segments,
    silu_slope,
    weights,
    write_sums,
)
from fastchgnet.ops.gpu.segments import Terms, shares, sum_all
from fastchgnet.ops.gpu.tiles import dot, factor, norm_backward, plus, read, sigmoid, write, zeros

WIDTHS = (16, 32, 64)
pytorch_backward = adding(_message_torch.backward)


class Tile(NamedTuple):
    """How a kernel runs."""

    rows: int
    warps: int
    per_multiprocessor: int  # programs that run there at once


FORWARD = {
    "tf32": Tile(rows=64, warps=4, per_multiprocessor=2),
    "fp32": Tile(rows=32, warps=4, per_multiprocessor=2),
}


def _backward_tile(of_bonds: bool, with_parameters: bool) -> Tile:
    # Two programs a multiprocessor, of which one works while the other waits at a barrier; sums of gradients
    # leave few registers for rows. Bonds have four matrices: those of two programs are too much for shared
    # memory in tf32, and for registers in fp32.
    if of_bonds:
        return Tile(rows=32, warps=8, per_multiprocessor=1)
    return Tile(rows=16 if with_parameters else 32, warps=4, per_multiprocessor=2)


class Rows(NamedTuple):
    """What kernels read of `Inputs`."""

    p: Any
    q: Any
    r: Any
    r_tail: Any
    w: Any
    a: Any
    angle_weight: Any
    weight: Any
    bias: Any
    scale: Any
    shift: Any
    i: Any
    j: Any
    k: Any


class Gradients(NamedTuple):
    """What kernels write: rows, and sums of each program."""

    tangent: Any  # [N, D]
    h: Any  # [N, 2D]
    w: Any  # [N, D]
    a: Any  # [N, D]
    onto_a: Any  # [N, D] each, what a is added to
    parameters: Any  # [programs, number of parameters]


@triton.jit(do_not_specialize=["n_rows", "n_r"])
def _forward_kernel(
    m,
    out,
    n_rows,
    n_r,
    N_NORMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows_core, rows_gate, hidden_core, hidden_gate = weights(m, D, PRECISION)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK), tl.num_programs(0)):
        index, live = segments(m, tile, n_rows, n_r, BLOCK)
        tables = (m.p, m.q, m.r, m.r_tail)
        a_ND = factor(read(m.a, index[3], live, D, D), PRECISION) if m.a is not None else None
        h = gathered(tables, a_ND, rows_core, index, live, 0, D, PRECISION)
        x, _ = norm(norm_input(h, hidden_core, m, 0, D, PRECISION), m, D)
        n = affine(x, m, 0, N_NORMS, D)
        message = n * sigmoid(n)
        h = gathered(tables, a_ND, rows_gate, index, live, 1, D, PRECISION)
        x, _ = norm(norm_input(h, hidden_gate, m, 1, D, PRECISION), m, D)
        message *= sigmoid(affine(x, m, 1, N_NORMS, D))
        if m.w is not None:
            message *= read(m.w, index[2], live, D, D)
        elif m.a is not None:
            # read again: the factor is rounded
            message += read(m.a, index[3], live, D, D)
        write(out, index[3], live, message, D, D)


@triton.jit
def _branch_backward(
    dn,
    x,
    rstd,
    h,
    hidden,
    m,
    sums,
    BRANCH: tl.constexpr,
    WITH_PARAMETERS: tl.constexpr,
    N_NORMS: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From dn of core or gate to dh."""
    angle, weight, bias, scale, shift = sums
    dz = dn
    if m.scale is not None:
        if WITH_PARAMETERS:
            scale += tl.sum(x * dn, 0)
            shift += tl.sum(dn, 0)
        dz = norm_backward(dn * norm_row(m.scale, BRANCH, N_NORMS, D), x, rstd, D)
    dh = dz
    if m.weight is not None:
        sigma = sigmoid(h)
        if WITH_PARAMETERS:
            bias += tl.sum(dz, 0)
        dz = factor(dz, PRECISION)
        if WITH_PARAMETERS:
            weight = dot(tl.trans(dz), factor(h * sigma, PRECISION), weight, PRECISION)
        dh = linear_backward(dz, hidden, D, PRECISION) * silu_slope(h, sigma)
    return dh, (angle, weight, bias, scale, shift)


@triton.jit(do_not_specialize=["n_rows", "n_r"])
def _backward_kernel(
    grad,
    m,
    found,
    n_rows,
    n_r,
    N_PARAMETERS: tl.constexpr,
    N_NORMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WITH_PARAMETERS: tl.constexpr = found.parameters is not None
    sums_core, sums_gate = no_sums(m, D), no_sums(m, D)
    rows_core, rows_gate, hidden_core, hidden_gate = weights(m, D, PRECISION)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK), tl.num_programs(0)):
        index, live = segments(m, tile, n_rows, n_r, BLOCK)
        tables = (m.p, m.q, m.r, m.r_tail)
        a_ND = factor(read(m.a, index[3], live, D, D), PRECISION) if m.a is not None else None
        h_core = gathered(tables, a_ND, rows_core, index, live, 0, D, PRECISION)
        h_gate = gathered(tables, a_ND, rows_gate, index, live, 1, D, PRECISION)
        x_core, rstd_core = norm(norm_input(h_core, hidden_core, m, 0, D, PRECISION), m, D)
        x_gate, rstd_gate = norm(norm_input(h_gate, hidden_gate, m, 1, D, PRECISION), m, D)
        n_core = affine(x_core, m, 0, N_NORMS, D)
        s_core, s_gate = sigmoid(n_core), sigmoid(affine(x_gate, m, 1, N_NORMS, D))
        core = n_core * s_core
        if m.w is not None:
            g = read(grad, index[0], live, D, D)
            write(found.w, index[3], live, g * core * s_gate, D, D)
            g *= read(m.w, index[2], live, D, D)
        else:
            g = read(grad, index[3], live, D, D)
        dn_core = g * s_gate * (s_core + core * (1 - s_core))
        dn_gate = g * core * s_gate * (1 - s_gate)
        # fmt: off
        dh_core, sums_core = _branch_backward(
            dn_core, x_core, rstd_core, h_core, hidden_core, m, sums_core,
            0, WITH_PARAMETERS, N_NORMS, D, PRECISION,
        )
        write(found.h, index[3], live, dh_core, 2 * D, D)
        dh_gate, sums_gate = _branch_backward(
            dn_gate, x_gate, rstd_gate, h_gate, hidden_gate, m, sums_gate,
            1, WITH_PARAMETERS, N_NORMS, D, PRECISION,
        )
        # fmt: on
        write(found.h + D, index[3], live, dh_gate, 2 * D, D)
        if m.a is not None:
            da = zeros(BLOCK, D) if m.w is not None else read(grad, index[3], live, D, D)
            da = plus(da, found.onto_a, index[3], live, D)
            da, sums_core = rows_backward(
                dh_core, da, a_ND, rows_core, sums_core, WITH_PARAMETERS, D, PRECISION
            )
            da, sums_gate = rows_backward(
                dh_gate, da, a_ND, rows_gate, sums_gate, WITH_PARAMETERS, D, PRECISION
            )
            write(found.a, index[3], live, da, D, D)
    if WITH_PARAMETERS:
        out = found.parameters + tl.program_id(0) * N_PARAMETERS
        write_sums(out, m, sums_core, sums_gate, N_NORMS, D)


class Launch:
    """Kernels of one op call: what they all take, and the sums that follow them."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        contiguous: Any = (t.contiguous() if isinstance(t, Tensor) else t for t in inputs)
        self.m = m = Inputs(*contiguous)
        self.n_rows, self.width = len(m.i), m.width
        self.of_bonds = m.has_hidden and m.a is not None
        self.n_parameters = 0 if m.parameters is None else m.parameters.numel()

    def rows(self, width: int) -> Tensor:
        """Make [N, width]."""
        return self.m.p.new_empty(self.n_rows, width)

    def n_programs(self, tile: Tile) -> int:
        """Programs that share the rows."""
        return runtime.n_programs(
            triton.cdiv(self.n_rows, tile.rows), self.m.p.device, tile.per_multiprocessor
        )

    def gradients(
        self, tile: Tile, with_parameters: bool, with_tangent: bool, onto_a: tuple[Tensor, ...] = ()
    ) -> Gradients:
        """Make what a kernel writes."""
        m, d = self.m, self.width
        return Gradients(
            self.rows(d) if with_tangent else None,
            self.rows(2 * d),
            None if m.w is None else self.rows(d),
            None if m.a is None else self.rows(d),
            onto_a,
            m.p.new_empty(self.n_programs(tile), self.n_parameters)
            if with_parameters and self.n_parameters
            else None,
        )

    def run(self, kernel: Any, tile: Tile, *args: Any, **constants: Any) -> None:
        """Start a kernel on all rows."""
        runtime.launch(
            kernel,
            self.n_programs(tile),
            self.m.p.device,
            *args,
            self.n_rows,
            len(self.m.r),
            **constants,
            N_NORMS=self.m.n_norms,
            D=self.width,
            BLOCK=tile.rows,
            PRECISION=runtime.current_precision(),
            num_warps=tile.warps,
            num_stages=1,
        )

    def kernel_inputs(self) -> Rows:
        """What kernels read."""
        m = self.m
        return Rows(*m[:6], *m.unpacked(m.parameters), m.i, m.j, m.k)

    def sums(self, found: Gradients, onto: Sequence[Any] = ((),) * 7) -> list[Tensor | None]:
        """Sum rows and shares: gradients of G, unless there is none, of features and parameters."""
        m, n_r = self.m, len(self.m.r)
        wanted = {
            0: Terms(found.h, m.i_start, None, onto[0]),
            1: Terms(found.h, m.j_start, m.j_order, onto[1]),
            2: Terms(found.h, m.k_start[: n_r + 1], m.k_order, onto[2]),
        }
        if m.r_tail is not None:
            wanted[3] = Terms(found.h, m.k_start[n_r:], m.k_order, onto[3])
        if m.w is not None:
            wanted[4] = Terms(found.w, m.k_start, m.k_order, onto[4])
        if found.parameters is not None:
            wanted[6] = shares(found.parameters, self.width, onto[6])
        if found.tangent is not None and m.w is not None:
            wanted[-1] = Terms(found.tangent, m.i_start, None)
        sums = dict(zip(wanted, sum_all(list(wanted.values())), strict=True))
        by_grad = [] if found.tangent is None else [sums.get(-1, found.tangent)]
        by_parameters = sums[6].flatten() if 6 in sums else None
        return [*by_grad, *(sums.get(n) for n in range(5)), found.a, by_parameters]


def fits(inputs: tuple[Any, ...]) -> bool:
    """Tell whether the kernels take features of this width."""
    return Inputs(*inputs).width in WIDTHS


def forward(*inputs: Any) -> Tensor:
    if not fits(inputs):
        return _message_torch.forward(*inputs)
    launch = Launch(inputs)
    rows_ND = launch.rows(launch.width)
    launch.run(_forward_kernel, FORWARD[runtime.current_precision()], launch.kernel_inputs(), rows_ND)
    if launch.m.w is None:
        return rows_ND
    return sum_all([Terms(rows_ND, launch.m.i_start, None)])[0]


def backward(
    onto: Sequence[tuple[Tensor, ...]], with_parameters: bool, grad: Tensor, *inputs: Any
) -> list[Tensor | None]:
    if not fits(inputs):
        return pytorch_backward(onto, with_parameters, grad, *inputs)
    launch = Launch(inputs)
    tile = _backward_tile(launch.of_bonds, with_parameters)
    found = launch.gradients(tile, with_parameters, with_tangent=False, onto_a=onto[5])
    launch.run(
        _backward_kernel,
        tile,
        grad.contiguous(),
        launch.kernel_inputs(),
        found,
        N_PARAMETERS=launch.n_parameters,
    )
    return launch.sums(found, onto)
