"""PyTorch bodies of `fastchgnet.ops.message`, on any device and in any precision; symbols as there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastchgnet.ops._message_inputs import EPS, MLP, Inputs
from fastchgnet.ops.segments import sum_rows

ROWS = 2048
"""Rows of a piece for each thread: some twenty [rows, 2D] tensors that about fit the cache of a core."""


class _Piece(NamedTuple):
    """Some rows, and the segments of i that they fill."""

    rows: slice
    segments: slice


def _pieces(m: Inputs) -> Iterator[_Piece]:
    """Cut the rows, between segments of i, into pieces that fit a CPU's cache; elsewhere take all as one."""
    n_rows, n_segments = len(m.i), len(m.p)
    if m.i.device.type != "cpu":
        yield _Piece(slice(0, n_rows), slice(0, n_segments))
        return
    size = ROWS * torch.get_num_threads()
    targets = torch.arange(size, max(n_rows, size), size)
    ends = [*torch.searchsorted(m.i_start, targets).unique_consecutive().tolist(), n_segments]
    first = 0
    for end in ends:
        if end > first:
            yield _Piece(slice(int(m.i_start[first]), int(m.i_start[end])), slice(first, end))
        first = end


def _gathered(tables: tuple[Any, ...], row_part: Any, m: Inputs, angle: Any, at: slice) -> Any:
    """P_i + Q_j + R_k + A a of a piece; any part may be missing."""
    total: Any = None
    for table, index in zip(tables, (m.i, m.j, m.k), strict=True):
        if table is not None:
            rows = table.index_select(0, index[at])
            total = rows if total is None else total.add_(rows)
    if row_part is not None:
        part = row_part[at]
        total = part @ angle.t() if total is None else total.addmm_(part, angle.t())
    return total


def _blocks(x_N2D: Any) -> Tensor:
    """Put core and gate behind each other, [2, N, D]."""
    return x_N2D.view(len(x_N2D), 2, x_N2D.shape[1] // 2).transpose(0, 1)


def _linear(x_2ND: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply W x + b to core and gate."""
    out = torch.empty(x_2ND.shape, dtype=x_2ND.dtype, device=x_2ND.device)
    for b in range(2):
        if bias is None:
            torch.mm(x_2ND[b], weight[b].t(), out=out[b])
        else:
            torch.addmm(bias[b], x_2ND[b], weight[b].t(), out=out[b])
    return out


def _linear_backward(x_2ND: Tensor, weight: Tensor) -> Tensor:
    """Apply W^T to core and gate; [N, 2D]."""
    out = torch.empty(x_2ND.shape[1], 2 * x_2ND.shape[2], dtype=x_2ND.dtype, device=x_2ND.device)
    for b, part in enumerate(out.chunk(2, dim=1)):
        torch.mm(x_2ND[b], weight[b], out=part)
    return out


def _whole(r: Any, r_tail: Any) -> Any:
    """Put the halves of R, or of a direction of it, behind each other."""
    return r if r_tail is None else torch.cat([r, r_tail])


class _Gate:
    """The gated MLP of a piece as far as the messages, and derivatives of what lies in between."""

    def __init__(self, h: Tensor, mlp: MLP) -> None:
        self.mlp, self.h = mlp, h
        self.s: Any = None if mlp.weight is None else F.silu(h)
        self.z = (
            _blocks(h).contiguous() if mlp.weight is None else _linear(_blocks(self.s), mlp.weight, mlp.bias)
        )
        if mlp.scale is None:
            self.n = self.z
        else:
            self.g, c = mlp.scale.expand(2, -1)[:, None], mlp.shift.expand(2, -1)[:, None]
            self.x, self.mean, self.rstd = torch.native_layer_norm(self.z, self.z.shape[2:], None, None, EPS)
            self.n = torch.addcmul(c, self.x, self.g)
        self.s_core, self.s_gate = torch.sigmoid(self.n).unbind()
        self.core = self.n[0] * self.s_core

    def message(self) -> Tensor:
        """Return m, [N, D]."""
        return self.core * self.s_gate

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Derivatives of m by n_core and n_gate."""
        by_core = torch.addcmul(self.s_core, self.core, 1 - self.s_core).mul_(self.s_gate)
        return by_core, self.message().mul_(1 - self.s_gate)

    def curved(self, n_dot: Tensor, slopes: Tensor) -> Tensor:
        """Change of the slopes of m along n_dot, [2, N, D]: the second derivatives of m."""
        rest_core, rest_gate = 1 - self.s_core, 1 - self.s_gate
        by_core_core = torch.addcmul(2 * self.s_core, self.core, rest_core - self.s_core)
        by_core_core = by_core_core.mul_(rest_core).mul_(self.s_gate)
        by_core_gate = slopes[0] * rest_gate
        by_gate_gate = slopes[1] * (rest_gate - self.s_gate)
        by_core = torch.addcmul(by_core_core * n_dot[0], by_core_gate, n_dot[1])
        by_gate = torch.addcmul(by_core_gate * n_dot[0], by_gate_gate, n_dot[1])
        return torch.stack([by_core, by_gate])

    def norm_second(
        self, n_bar: Tensor, n_dot_bar: Tensor, z_dot: Tensor, lz_dot: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of <n_dot_bar, g L(z_dot)> + <n_bar, n> by z and by z_dot."""
        q = n_dot_bar * self.g
        z_dot_bar = self.normed(q)
        change = self.x * (q * lz_dot).mean(2, keepdim=True)
        change.addcmul_(z_dot_bar, (z_dot * self.x).mean(2, keepdim=True))
        change.addcmul_(lz_dot, (q * self.x).mean(2, keepdim=True))
        return torch.addcmul(self.normed(n_bar * self.g), change, self.rstd, value=-1), z_dot_bar

    def normed(self, q: Tensor) -> Tensor:
        """Apply L to q, [2, N, D]."""
        if self.mlp.scale is None:
            return q
        found, *_ = torch.ops.aten.native_layer_norm_backward(
            q, self.z, self.z.shape[2:], self.mean, self.rstd, None, None, (True, False, False)
        )
        return found


class _Sums:
    """Gradients of the parameters, added up over pieces."""

    def __init__(self, m: Inputs) -> None:
        self.packed = None if m.parameters is None else torch.zeros_like(m.parameters)
        self.angle, self.weight, self.bias, self.scale, self.shift = m.unpacked(self.packed)

    def add_linear(self, dz: Tensor, s: Tensor, with_bias: bool = True) -> None:
        """Add dz s^T, and dz to the bias."""
        for b in range(2):
            self.weight[b].addmm_(dz[b].t(), s[b])
        if with_bias:
            self.bias += dz.sum(1)

    def add_norm(self, by_scale: Tensor, by_shift: Tensor) -> None:
        """Add rows of gradients, [2, N, D]; a shared norm takes those of core and gate."""
        for total, rows in ((self.scale, by_scale), (self.shift, by_shift)):
            total += rows.sum(1).sum_to_size(total.shape)


def forward(*inputs: Any) -> Tensor:
    m = Inputs(*inputs)
    mlp = m.unpacked(m.parameters)
    tables = (m.p, m.q, _whole(m.r, m.r_tail))
    out = m.p.new_empty(len(m.i) if m.w is None else len(m.p), m.width)
    for rows, segments in _pieces(m):
        message = _Gate(_gathered(tables, m.a, m, mlp.angle, rows), mlp).message()
        if m.w is None:
            out[rows] = message if m.a is None else message.add_(m.a[rows])
        else:
            message *= m.w.index_select(0, m.k[rows])
            out[segments] = _summed(message, m, segments)
    return out


def _summed(rows_ND: Tensor, m: Inputs, segments: slice) -> Tensor:
    """Sum the rows of a piece over i."""
    start = m.i_start[segments.start : segments.stop + 1]
    return sum_rows(rows_ND, start - start[:1], None)


def _weighted(grad: Tensor, m: Inputs, at: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient G of each row, its weight, and w G."""
    if m.w is None:
        return grad[at], grad[at], grad[at]
    g = grad.index_select(0, m.i[at])
    w = m.w.index_select(0, m.k[at])
    return g, w, g * w


class _Gradients:
    """Gradients by rows, gathered piece by piece and then summed for the tables."""

    def __init__(self, m: Inputs, mlp: MLP) -> None:
        self.m, self.angle = m, mlp.angle
        self.p = torch.empty_like(m.p)
        self.h = m.p.new_empty(len(m.i), 2 * m.width)
        self.w: Any = None if m.w is None else m.p.new_empty(len(m.i), m.width)
        self.a: Any = None if m.a is None else torch.empty_like(m.a)

    def put(self, piece: _Piece, dh: Tensor, dw: Any, da: Any = None) -> None:
        """Take the gradients of a piece by h and by w, and what a gets beside that by h."""
        self.h[piece.rows] = dh
        self.p[piece.segments] = _summed(dh, self.m, piece.segments)
        if self.w is not None:
            self.w[piece.rows] = dw
        if self.a is not None:
            out = self.a[piece.rows]
            if da is None:
                torch.mm(dh, self.angle, out=out)
            else:
                torch.addmm(da, dh, self.angle, out=out)

    def tensors(self) -> list[Tensor | None]:
        """In the order of `Inputs`."""
        m = self.m
        q = sum_rows(self.h, m.j_start, m.j_order)
        r = sum_rows(self.h, m.k_start, m.k_order)
        halves: Any = (r, None)
        if m.r_tail is not None:
            halves = [half.clone() for half in r.split([len(m.r), len(m.r_tail)])]
        w = None if self.w is None else sum_rows(self.w, m.k_start, m.k_order)
        return [self.p, q, *halves, w, self.a]


def backward(with_parameters: bool, grad: Tensor, *inputs: Any) -> list[Tensor | None]:
    m = Inputs(*inputs)
    mlp = m.unpacked(m.parameters)
    tables = (m.p, m.q, _whole(m.r, m.r_tail))
    found, sums = _Gradients(m, mlp), _Sums(m)
    for piece in _pieces(m):
        gate = _Gate(_gathered(tables, m.a, m, mlp.angle, piece.rows), mlp)
        g, _, dm = _weighted(grad, m, piece.rows)
        dw = None if m.w is None else g * gate.message()
        dn = torch.stack(gate.slopes()).mul_(dm)
        dz = gate.normed(dn if mlp.scale is None else dn * gate.g)
        dh = _hidden_backward(gate, dz)
        found.put(piece, dh, dw, g if m.w is None else None)
        if with_parameters:
            if mlp.scale is not None:
                sums.add_norm(dn * gate.x, dn)
            if mlp.weight is not None:
                sums.add_linear(dz, _blocks(gate.s))
            if m.a is not None:
                sums.angle.addmm_(dh.t(), m.a[piece.rows])
    return [*found.tensors(), *([sums.packed] if with_parameters else [])]


def _hidden_backward(gate: _Gate, dz: Tensor) -> Tensor:
    """Gradient by h from that by z."""
    if gate.mlp.weight is None:
        return dz.transpose(0, 1).reshape(gate.h.shape)
    ds = _linear_backward(dz, gate.mlp.weight)
    return torch.ops.aten.silu_backward(ds, gate.h)


class _Second(NamedTuple):
    """What the second derivative of a piece comes to."""

    tangent: Tensor  # [N, D] gradient of G
    h: Tensor  # [N, 2D]
    w: Tensor  # [N, D]
    first: Tensor  # [N, 2D] S'(h) W^T z'~, which is also dh


def backward_backward(
    cotangents: tuple[Tensor | None, ...], grad: Tensor, *inputs: Any
) -> list[Tensor | None]:
    m = Inputs(*inputs)
    u_p, u_q, u_r, u_tail, u_w, u_a = cotangents
    mlp = m.unpacked(m.parameters)
    tables, directions = (m.p, m.q, _whole(m.r, m.r_tail)), (u_p, u_q, _whole(*m.halves(u_r, u_tail)))
    found, sums = _Gradients(m, mlp), _Sums(m)
    by_grad = torch.empty_like(grad)
    for piece in _pieces(m):
        rows = piece.rows
        gate = _Gate(_gathered(tables, m.a, m, mlp.angle, rows), mlp)
        u_h = _gathered(directions, u_a, m, mlp.angle, rows)
        u_h = torch.zeros_like(gate.h) if u_h is None else u_h
        second = _second(m, gate, (u_h, u_w), grad, rows, sums)
        if m.w is None:
            by_grad[rows] = second.tangent if u_a is None else second.tangent + u_a[rows]
        else:
            by_grad[piece.segments] = _summed(second.tangent, m, piece.segments)
        found.put(piece, second.h, second.w)
        if m.a is not None:
            sums.angle.addmm_(second.h.t(), m.a[rows])
            if u_a is not None:
                sums.angle.addmm_(second.first.t(), u_a[rows])
    return [by_grad, *found.tensors(), sums.packed]


def _second(
    m: Inputs, gate: _Gate, directions: tuple[Tensor, Any], grad: Tensor, rows: slice, sums: _Sums
) -> _Second:
    mlp, (u_h, u_w) = gate.mlp, directions
    s_dot: Any = None if mlp.weight is None else torch.ops.aten.silu_backward(u_h, gate.h)
    z_dot = _blocks(u_h).contiguous() if s_dot is None else _linear(_blocks(s_dot), mlp.weight, None)
    lz_dot = gate.normed(z_dot)
    n_dot = lz_dot if mlp.scale is None else lz_dot * gate.g
    slopes = torch.stack(gate.slopes())
    m_dot = (slopes * n_dot).sum(0)

    g, w, wg = _weighted(grad, m, rows)
    n_dot_bar = slopes * wg
    n_bar = gate.curved(n_dot, slopes).mul_(wg)
    tangent = m_dot if m.w is None else m_dot * w
    if u_w is not None:
        u_w = u_w.index_select(0, m.k[rows])
        tangent = torch.addcmul(tangent, u_w, gate.message())
        n_bar = n_bar.addcmul_(slopes, g * u_w)

    if mlp.scale is None:
        z_bar, z_dot_bar = n_bar, n_dot_bar
    else:
        z_bar, z_dot_bar = gate.norm_second(n_bar, n_dot_bar, z_dot, lz_dot)
        sums.add_norm(torch.addcmul(n_bar * gate.x, lz_dot, n_dot_bar), n_bar)
    by_h, first = _hidden_backward(gate, z_bar), _hidden_backward(gate, z_dot_bar)
    if mlp.weight is not None:
        ds_dot = _linear_backward(z_dot_bar, mlp.weight)
        sigmoid = torch.sigmoid(gate.h)
        curvature = (1 - sigmoid) * torch.addcmul(2 * sigmoid, gate.s, 1 - 2 * sigmoid)
        by_h = by_h.addcmul_(curvature * u_h, ds_dot)
        sums.add_linear(z_bar, _blocks(gate.s))
        sums.add_linear(z_dot_bar, _blocks(s_dot), with_bias=False)
    return _Second(tangent, by_h, g * m_dot, first)
