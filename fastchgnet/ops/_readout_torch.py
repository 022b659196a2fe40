"""PyTorch bodies of `fastchgnet.ops.readout`, on any device and in any precision; symbols as there.

Going up, features and their tangents are rows of one matrix, [2A, width], and so are, going down, gradients
of the two: one matrix product serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-5


class Network(NamedTuple):
    """Views of a flat tensor of parameters, or of their gradients."""

    scale: Any  # [D], None where there is no norm
    shift: Any  # [D]
    hidden: list[tuple[Tensor, Tensor]]  # weight [out, in] and bias [out] of each layer
    weight: Tensor  # [width of the last]
    bias: Tensor  # [1]


def network(parameters: Tensor, n_features: int, widths: Sequence[int], has_norm: bool) -> Network:
    """Find the parameters of each layer."""
    n_in = [n_features, *widths]
    sizes = [n_features, n_features] if has_norm else []
    for a, b in zip(n_in, widths, strict=False):
        sizes += [a * b, b]
    parts = list(parameters.split([*sizes, n_in[-1], 1]))
    first = 2 if has_norm else 0
    scale, shift = parts[:2] if has_norm else (None, None)
    hidden = [(parts[first + 2 * n].view(b, n_in[n]), parts[first + 2 * n + 1]) for n, b in enumerate(widths)]
    return Network(scale, shift, hidden, parts[-2], parts[-1])


class _Norm:
    """x, the normalised features, and L, of all rows; both the features themselves where there is no norm."""

    def __init__(self, v: Tensor, net: Network) -> None:
        self.v, self.net = v, net
        self.n, self.mean, self.rstd = v, v, v
        if net.scale is not None:
            self.n, self.mean, self.rstd = torch.native_layer_norm(v, v.shape[1:], net.scale, net.shift, EPS)

    def backward(self, by_n: Tensor, with_parameters: bool = False) -> tuple[Any, Any, Any]:
        """Return L(g by_n) and the sums of x by_n and of by_n."""
        if self.net.scale is None:
            return by_n, None, None
        wanted = (True, with_parameters, with_parameters)
        found: tuple[Any, Any, Any] = torch.ops.aten.native_layer_norm_backward(
            by_n, self.v, self.v.shape[1:], self.mean, self.rstd, self.net.scale, self.net.shift, wanted
        )
        return found

    def tangent(self, u: Tensor) -> Tensor:
        """Return L(u)."""
        if self.net.scale is None:
            return u
        found, *_ = torch.ops.aten.native_layer_norm_backward(
            u, self.v, self.v.shape[1:], self.mean, self.rstd, None, None, (True, False, False)
        )
        return found

    def change(self, u: Tensor, v_dot: Tensor, r: Tensor) -> Tensor:
        """Return the gradient of <u, L(g r)> by v, given L(u)."""
        x = (self.v - self.mean) * self.rstd
        q = r * self.net.scale
        found = x * (q * v_dot).mean(1, keepdim=True)
        found.addcmul_(self.backward(r)[0], (u * x).mean(1, keepdim=True))
        found.addcmul_(v_dot, (q * x).mean(1, keepdim=True))
        return found.mul_(-self.rstd)


def forward(
    v: Tensor, parameters: Tensor, widths: Sequence[int], has_norm: bool, with_slope: bool
) -> tuple[Tensor, Tensor]:
    net = network(parameters, v.shape[1], widths, has_norm)
    norm = _Norm(v, net)
    s, hs = norm.n, []
    for weight, bias in net.hidden:
        hs.append(torch.addmm(bias, s, weight.t()))
        s = torch.nn.functional.silu(hs[-1])
    y = torch.addmv(net.bias.expand(len(v)), s, net.weight)
    if not with_slope:
        return y, v.new_empty(0)
    r = net.weight.repeat(len(v), 1)
    for h, (weight, _) in zip(reversed(hs), reversed(net.hidden), strict=True):
        r = torch.ops.aten.silu_backward(r, h) @ weight
    return y, norm.backward(r)[0]


class _Layer:
    """A hidden layer: what comes in, with its tangent, and what its derivatives take."""

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor, n_rows: int) -> None:
        self.rows, self.weight, self.n_rows = rows, weight, n_rows
        hidden = rows @ weight.t()
        h, self.h_dot = hidden[:n_rows].add_(bias), hidden[n_rows:]
        self.sigmoid = torch.sigmoid(h)
        self.rest = 1 - self.sigmoid
        self.s = h.mul_(self.sigmoid)
        self.slope = torch.addcmul(self.sigmoid, self.s, self.rest)

    def out(self) -> Tensor:
        """Return s and its tangent, one below the other."""
        if not len(self.h_dot):
            return self.s
        return torch.cat([self.s, self.slope * self.h_dot])

    def backward(self, by_out: Tensor) -> Tensor:
        """Return gradients by h and its tangent from those by s and its tangent."""
        if not len(self.h_dot):
            return by_out * self.slope
        curvature = torch.addcmul(2 * self.sigmoid, self.s, self.rest - self.sigmoid).mul_(self.rest)
        found = by_out.view(2, self.n_rows, -1) * self.slope
        found[0].addcmul_(curvature.mul_(self.h_dot), by_out[self.n_rows :])
        return found.view(by_out.shape)


def backward(
    with_parameters: bool,
    by_y: Tensor | None,
    by_slope: Tensor | None,
    v: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    has_norm: bool,
) -> tuple[Tensor, Tensor]:
    net = network(parameters, v.shape[1], widths, has_norm)
    n_rows, norm, layers = len(v), _Norm(v, net), []
    v_dot: Any = None if by_slope is None else norm.tangent(by_slope)
    rows = norm.n
    if by_slope is not None:
        rows = torch.cat([norm.n, v_dot if net.scale is None else v_dot * net.scale])
    for weight, bias in net.hidden:
        layers.append(_Layer(rows, weight, bias, n_rows))
        rows = layers[-1].out()
    by_y = v.new_zeros(n_rows) if by_y is None else by_y
    by_rows = by_y if by_slope is None else torch.cat([by_y, torch.ones_like(by_y)])
    sums = torch.empty_like(parameters) if with_parameters else parameters.new_empty(0)
    found: Any = network(sums, v.shape[1], widths, has_norm) if with_parameters else None
    if with_parameters:
        torch.mv(rows.t(), by_rows, out=found.weight)
        torch.sum(by_y, 0, keepdim=True, out=found.bias)
    by_rows = torch.outer(by_rows, net.weight)
    for n in reversed(range(len(layers))):
        by_hidden = layers[n].backward(by_rows)
        if with_parameters:
            torch.mm(by_hidden.t(), layers[n].rows, out=found.hidden[n][0])
            torch.sum(by_hidden[:n_rows], 0, out=found.hidden[n][1])
        by_rows = by_hidden @ layers[n].weight
    by_n, r = by_rows[:n_rows], by_rows[n_rows:]
    by_v, by_scale, by_shift = norm.backward(by_n, with_parameters)
    if net.scale is not None:
        if with_parameters:
            found.scale.copy_(by_scale if by_slope is None else by_scale + (v_dot * r).sum(0))
            found.shift.copy_(by_shift)
        if by_slope is not None:
            by_v = by_v + norm.change(by_slope, v_dot, r)
    return (v.new_empty(0) if by_slope is None else by_v), sums
