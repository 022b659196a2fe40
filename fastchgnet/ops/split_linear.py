"""Linear layers on the same rows, whose outputs are tables of their own and not columns of one.

    Y_m = Z W_m^T           Z[L, R], W_m[K, R]; Y_m[L, K], m = 1..4

VJP, with gradients G_m of Y_m:

    dZ = sum of G_m W_m over m        dW_m = G_m^T Z

VJP of the VJP, with a cotangent u of dZ: that of G_m is u W_m^T, that of W_m is G_m^T u; that of Z is zero.
Saved: the inputs.

The weights come as one tensor, one behind the other, since they are made as one. Who reads a table reads
whole rows of it: columns of one output would be copied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops._register import Family, adding

N_TABLES = 4
"""One for each block of the network."""


def split_linear(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Multiply rows by several weights.

    Args:
        rows: [L, R].
        weight: [N_TABLES * K, R], the weights one behind the other.

    Returns:
        N_TABLES tables [L, K].
    """
    return _family(rows, weight)


def reference(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Compute the op in plain PyTorch, differentiable to any order."""
    return (rows @ weight.t()).chunk(N_TABLES, dim=1)


def _forward(rows: Tensor, weight: Tensor) -> list[Tensor]:
    return [rows @ part.t() for part in weight.chunk(N_TABLES)]


def _backward(with_parameters: bool, grads: Sequence[Any], rows: Tensor, weight: Tensor) -> list[Any]:
    by_rows: Any = None
    for grad, part in zip(grads, weight.chunk(N_TABLES), strict=True):
        if grad is not None:
            by_rows = grad @ part if by_rows is None else by_rows.addmm_(grad, part)
    return [by_rows, _by_weight(grads, rows, weight)] if with_parameters else [by_rows]


def _backward_backward(
    cotangents: Sequence[Any], grads: Sequence[Any], rows: Tensor, weight: Tensor
) -> list[Any]:
    (u,) = cotangents
    by_grads = [
        None if grad is None else u @ part.t()
        for grad, part in zip(grads, weight.chunk(N_TABLES), strict=True)
    ]
    return [*by_grads, None, _by_weight(grads, u, weight)]


def _by_weight(grads: Sequence[Any], rows: Tensor, weight: Tensor) -> Tensor:
    """Return G_m^T Z of every table, one behind the other."""
    found = torch.empty_like(weight)
    for grad, part in zip(grads, found.chunk(N_TABLES), strict=True):
        if grad is None:
            part.zero_()
        else:
            torch.mm(grad.t(), rows, out=part)
    return found


def _shapes(rows: Tensor, weight: Tensor) -> list[Tensor]:
    return [rows.new_empty(len(rows), len(weight) // N_TABLES) for _ in range(N_TABLES)]


_family = Family(
    "split_linear",
    features=["Tensor rows"],
    parameters=["Tensor weight"],
    constants=[],
    forward=_forward,
    backward=adding(_backward),
    backward_backward=_backward_backward,
    shape=_shapes,
    n_outputs=N_TABLES,
    vanishes=lambda *inputs: (0,),
)
