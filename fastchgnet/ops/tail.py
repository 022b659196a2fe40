"""Append projected rows to a table, without ever holding them apart.

    y = [p; Z W^T]          p[B, K], Z[L, R], W[K, R]; y[B + L, K]

VJP, with a gradient G of y, its head G_p[B, K] and its tail G_z[L, K]:

    dp = G_p        dZ = G_z W        dW = G_z^T Z

VJP of the VJP, with the cotangents u_p and u_z of dp and dZ: that of G is [u_p; u_z W^T], that of W is
G_z^T u_z. Saved: the inputs.

The tables of bonds are the largest ones of a graph; a concatenation would write them twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops._register import Family


def with_tail(head: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Append rows [L, R] times a weight [K, R] to a table [B, K]; [B + L, K]."""
    return _family(head, rows, weight)


def reference(head: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Compute the op in plain PyTorch, differentiable to any order."""
    return torch.cat([head, rows @ weight.t()])


def _forward(head: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    y = head.new_empty(len(head) + len(rows), len(weight))
    y[: len(head)] = head
    torch.mm(rows, weight.t(), out=y[len(head) :])
    return y


def _backward(with_parameters: bool, grad: Tensor, head: Tensor, rows: Tensor, weight: Tensor) -> list[Any]:
    tail = grad[len(head) :]
    features = [grad[: len(head)].clone(), tail @ weight]
    return [*features, tail.t() @ rows] if with_parameters else features


def _backward_backward(
    cotangents: Sequence[Any], grad: Tensor, head: Tensor, rows: Tensor, weight: Tensor
) -> list[Any]:
    u_head, u_rows = cotangents
    u_head = torch.zeros_like(head) if u_head is None else u_head
    u_rows = torch.zeros_like(rows) if u_rows is None else u_rows
    return [_forward(u_head, u_rows, weight), None, None, grad[len(head) :].t() @ u_rows]


_family = Family(
    "with_tail",
    features=["Tensor head", "Tensor rows"],
    parameters=["Tensor weight"],
    constants=[],
    forward=_forward,
    backward=_backward,
    backward_backward=_backward_backward,
    shape=lambda head, rows, weight: head.new_empty(len(head) + len(rows), len(weight)),
    vanishes=lambda *inputs: (0, 1),
)
