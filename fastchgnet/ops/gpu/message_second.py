# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton body of the backward of the backward of `fastchgnet.ops.message`; symbols as there.

A tile goes up once, both branches with their tangents, and down once, branch by branch.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import _message_torch
from fastchgnet.ops.gpu.message import Launch, Tile, fits
from fastchgnet.ops.gpu.message_tiles import (
    affine,
    gathered,
    linear,
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
from fastchgnet.ops.gpu.tiles import dot, factor, mean, norm_backward, read, sigmoid, write, zeros

SECOND = Tile(rows=16, warps=4, per_multiprocessor=2)
SECOND_OF_BONDS = Tile(rows=16, warps=8, per_multiprocessor=1)
"""Their four matrices and as many sums leave no room for two programs."""


@triton.jit
def _branch_up(
    h,
    u,
    hidden,
    m,
    BRANCH: tl.constexpr,
    N_NORMS: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From h of core or gate and its tangent u to n and n'; and x, 1 / std, L(z') and mean(z' x)."""
    z_dot = u
    if m.weight is not None:
        z_dot = linear(u * silu_slope(h, sigmoid(h)), hidden, D, PRECISION)
    x, rstd = norm(norm_input(h, hidden, m, BRANCH, D, PRECISION), m, D)
    n = affine(x, m, BRANCH, N_NORMS, D)
    if m.scale is None:
        return (n, z_dot), (x, rstd, z_dot, rstd)
    else:
        along = mean(z_dot * x, D)
        normed_dot = (z_dot - mean(z_dot, D) - x * along) * rstd
        n_dot = normed_dot * norm_row(m.scale, BRANCH, N_NORMS, D)
        return (n, n_dot), (x, rstd, normed_dot, along)


@triton.jit
def _second_of_gate(n_core, n_gate, n_dot_core, n_dot_gate):
    """Return m and m', its slopes and how they change along n', of core and gate."""
    s_core, s_gate = sigmoid(n_core), sigmoid(n_gate)
    rest_core, rest_gate = 1 - s_core, 1 - s_gate
    core = n_core * s_core
    message = core * s_gate
    by_core, by_gate = s_gate * (s_core + core * rest_core), message * rest_gate
    mixed = by_core * rest_gate
    core_twice = s_gate * rest_core * (2 * s_core + core * (rest_core - s_core))
    change_core = core_twice * n_dot_core + mixed * n_dot_gate
    change_gate = mixed * n_dot_core + by_gate * (rest_gate - s_gate) * n_dot_gate
    return message, by_core * n_dot_core + by_gate * n_dot_gate, by_core, by_gate, change_core, change_gate


@triton.jit
def _branch_down(
    bars,
    state,
    h,
    u,
    u_a,
    hidden,
    m,
    sums,
    BRANCH: tl.constexpr,
    N_NORMS: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From n~ and n'~ of core or gate to h~."""
    angle, weight, bias, scale, shift = sums
    x, rstd, normed_dot, along = state
    n_bar, n_dot_bar = bars
    z_bar, z_dot_bar = n_bar, n_dot_bar
    if m.scale is not None:
        scale += tl.sum(x * n_bar + normed_dot * n_dot_bar, 0)
        shift += tl.sum(n_bar, 0)
        g = norm_row(m.scale, BRANCH, N_NORMS, D)
        q = n_dot_bar * g
        z_dot_bar = norm_backward(q, x, rstd, D)
        change = x * mean(q * normed_dot, D) + along * z_dot_bar + normed_dot * mean(q * x, D)
        z_bar = norm_backward(n_bar * g, x, rstd, D) - rstd * change
    h_bar, first = z_bar, z_dot_bar
    if m.weight is not None:
        sigma = sigmoid(h)
        slope = silu_slope(h, sigma)
        curvature = sigma * (1 - sigma) * (2 + h * (1 - 2 * sigma))
        bias += tl.sum(z_bar, 0)
        # one after the other: a factor takes eight times a tile's registers
        z_dot_bar = factor(z_dot_bar, PRECISION)
        weight = dot(tl.trans(z_dot_bar), factor(u * slope, PRECISION), weight, PRECISION)
        s_dot_bar = linear_backward(z_dot_bar, hidden, D, PRECISION)
        z_bar = factor(z_bar, PRECISION)
        weight = dot(tl.trans(z_bar), factor(h * sigma, PRECISION), weight, PRECISION)
        h_bar = linear_backward(z_bar, hidden, D, PRECISION) * slope + curvature * u * s_dot_bar
        first = s_dot_bar * slope
    if m.a is not None and u_a is not None:
        angle = dot(tl.trans(factor(first, PRECISION)), u_a, angle, PRECISION)
    return h_bar, (angle, weight, bias, scale, shift)


@triton.jit
def _gathered_twice(
    m, cotangents, a_ND, u_a, rows_weight, at, BRANCH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr
):
    """Return h of core or gate and its tangent u_h."""
    directions = (cotangents[0], cotangents[1], cotangents[2], cotangents[3])
    h = gathered((m.p, m.q, m.r, m.r_tail), a_ND, rows_weight, at[0], at[1], BRANCH, D, PRECISION)
    return h, gathered(directions, u_a, rows_weight, at[0], at[1], BRANCH, D, PRECISION)


@triton.jit
def _gate(m, cotangents, grad, found, core, gate, at, D: tl.constexpr):
    """From n and n' of core and gate to n~ and n'~; write what comes of them by G and by w."""
    message, m_dot, by_core, by_gate, core_bar, gate_bar = _second_of_gate(core[0], gate[0], core[1], gate[1])
    index, live = at
    row = index[3]
    tangent = m_dot
    g = read(grad, index[0] if m.w is not None else row, live, D, D)
    weighted = g
    if m.w is not None:
        write(found.w, row, live, g * m_dot, D, D)
        w = read(m.w, index[2], live, D, D)
        weighted *= w
        tangent *= w
    core_bar *= weighted
    gate_bar *= weighted
    if cotangents[4] is not None:
        u_w = read(cotangents[4], index[2], live, D, D)
        tangent += u_w * message
        core_bar += by_core * g * u_w
        gate_bar += by_gate * g * u_w
    if m.w is None and cotangents[5] is not None:
        # read again: the factor is rounded
        tangent += read(cotangents[5], row, live, D, D)
    write(found.tangent, row, live, tangent, D, D)
    return (core_bar, by_core * weighted), (gate_bar, by_gate * weighted)


@triton.jit(do_not_specialize=["n_rows", "n_r"])
def _second_kernel(
    cotangents,
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
    sums_core, sums_gate = no_sums(m, D), no_sums(m, D)
    rows_core, rows_gate, hidden_core, hidden_gate = weights(m, D, PRECISION)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK), tl.num_programs(0)):
        at = segments(m, tile, n_rows, n_r, BLOCK)
        row, live = at[0][3], at[1]
        a_ND = factor(read(m.a, row, live, D, D), PRECISION) if m.a is not None else None
        u_a = factor(read(cotangents[5], row, live, D, D), PRECISION) if cotangents[5] is not None else None
        # fmt: off
        h_core, u_core = _gathered_twice(m, cotangents, a_ND, u_a, rows_core, at, 0, D, PRECISION)
        core, state_core = _branch_up(h_core, u_core, hidden_core, m, 0, N_NORMS, D, PRECISION)
        h_gate, u_gate = _gathered_twice(m, cotangents, a_ND, u_a, rows_gate, at, 1, D, PRECISION)
        gate, state_gate = _branch_up(h_gate, u_gate, hidden_gate, m, 1, N_NORMS, D, PRECISION)
        core, gate = _gate(m, cotangents, grad, found, core, gate, at, D)
        # registers are few: what takes no product is gathered again and not kept
        if m.a is None:
            h_gate, u_gate = _gathered_twice(m, cotangents, a_ND, u_a, rows_gate, at, 1, D, PRECISION)
        gate, sums_gate = _branch_down(
            gate, state_gate, h_gate, u_gate, u_a, hidden_gate, m, sums_gate, 1, N_NORMS, D, PRECISION
        )
        write(found.h + D, row, live, gate, 2 * D, D)
        if m.a is None:
            h_core, u_core = _gathered_twice(m, cotangents, a_ND, u_a, rows_core, at, 0, D, PRECISION)
        core, sums_core = _branch_down(
            core, state_core, h_core, u_core, u_a, hidden_core, m, sums_core, 0, N_NORMS, D, PRECISION
        )
        write(found.h, row, live, core, 2 * D, D)
        # fmt: on
        if m.a is not None:
            da = zeros(BLOCK, D)
            da, sums_core = rows_backward(core, da, a_ND, rows_core, sums_core, True, D, PRECISION)
            da, sums_gate = rows_backward(gate, da, a_ND, rows_gate, sums_gate, True, D, PRECISION)
            write(found.a, row, live, da, D, D)
    if found.parameters is not None:
        out = found.parameters + tl.program_id(0) * N_PARAMETERS
        write_sums(out, m, sums_core, sums_gate, N_NORMS, D)


def backward_backward(
    cotangents: tuple[Tensor | None, ...], grad: Tensor, *inputs: Any
) -> list[Tensor | None]:
    if not fits(inputs):
        return _message_torch.backward_backward(cotangents, grad, *inputs)
    launch = Launch(inputs)
    tile = SECOND_OF_BONDS if launch.of_bonds else SECOND
    found = launch.gradients(tile, with_parameters=True, with_tangent=True)
    u_p, u_q, u_r, u_tail, u_w, u_a = cotangents
    wanted = (u_p, u_q, *launch.m.halves(u_r, u_tail), u_w, u_a)
    directions = tuple(None if u is None else u.contiguous() for u in wanted)
    launch.run(
        _second_kernel,
        tile,
        directions,
        grad.contiguous(),
        launch.kernel_inputs(),
        found,
        N_PARAMETERS=launch.n_parameters,
    )
    return launch.sums(found)
