"""Tables of bonds from their radial basis: linear layers on all rows or on those of short or long bonds.

With the basis Z[U, R], of which the first B rows belong to short bonds and the other L to long ones,

    Y_m = Z_m W_m^T         Z_0 = Z,  Z_1 its first B rows,  Z_2 to Z_5 the others

VJP, with gradients G_m of Y_m:

    dZ_m += G_m W_m, each in its rows of dZ         dW_m = G_m^T Z_m

VJP of the VJP, with a cotangent u of dZ, u_m the rows of it that m reads: that of G_m is u_m W_m^T, that of
W_m is G_m^T u_m; that of Z is zero. Saved: the inputs.

Every table is a tensor of its own: who reads it reads whole rows, and columns of one output would be copied
first. The gradient of the basis, as large as any table of a graph, is one buffer to which all add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops._register import Family, adding

N_LONG = 4
"""Tables of long bonds: one for each block of the network."""


def bond_tables(basis: Tensor, weight: Tensor, long_weight: Tensor, n_short: int) -> tuple[Tensor, ...]:
    """Apply linear layers to the basis of bonds.

    Args:
        basis: [U, R], short bonds first.
        weight: [2 * D, R], that of short bonds and, behind it, that of all bonds.
        long_weight: [N_LONG * K, R], those of long bonds one behind the other.
        n_short: B.

    Returns:
        tables of all bonds [U, D], of the short ones [B, D], and N_LONG of the long ones [L, K].
    """
    return _family(basis, weight, long_weight, n_short)


def reference(basis: Tensor, weight: Tensor, long_weight: Tensor, n_short: int) -> tuple[Tensor, ...]:
    """Compute the op in plain PyTorch, differentiable to any order."""
    of_short, of_all = weight.chunk(2)
    short, long = basis[:n_short], basis[n_short:]
    return basis @ of_all.t(), short @ of_short.t(), *(long @ long_weight.t()).chunk(N_LONG, dim=1)


def _layers(weight: Tensor, long_weight: Tensor, n_short: int) -> list[tuple[slice, Tensor]]:
    """Return the rows that every layer reads, and its part of the weights or of their gradients."""
    of_short, of_all = weight.chunk(2)
    long = slice(n_short, None)
    return [
        (slice(None), of_all),
        (slice(n_short), of_short),
        *((long, part) for part in long_weight.chunk(N_LONG)),
    ]


def _forward(basis: Tensor, weight: Tensor, long_weight: Tensor, n_short: int) -> list[Tensor]:
    return [basis[rows] @ part.t() for rows, part in _layers(weight, long_weight, n_short)]


def _backward(
    with_parameters: bool,
    grads: Sequence[Any],
    basis: Tensor,
    weight: Tensor,
    long_weight: Tensor,
    n_short: int,
) -> list[Tensor]:
    (_, of_all), *layers = _layers(weight, long_weight, n_short)
    by_all, *others = grads
    by_basis = torch.zeros_like(basis) if by_all is None else by_all @ of_all
    for grad, (rows, part) in zip(others, layers, strict=True):
        if grad is not None:
            by_basis[rows].addmm_(grad, part)
    if not with_parameters:
        return [by_basis]
    return [by_basis, *_by_weights(grads, basis, weight, long_weight, n_short)]


def _backward_backward(
    cotangents: Sequence[Any],
    grads: Sequence[Any],
    basis: Tensor,
    weight: Tensor,
    long_weight: Tensor,
    n_short: int,
) -> list[Any]:
    (u,) = cotangents
    by_grads = [
        None if grad is None else u[rows] @ part.t()
        for grad, (rows, part) in zip(grads, _layers(weight, long_weight, n_short), strict=True)
    ]
    return [*by_grads, None, *_by_weights(grads, u, weight, long_weight, n_short)]


def _by_weights(
    grads: Sequence[Any], rows_UR: Tensor, weight: Tensor, long_weight: Tensor, n_short: int
) -> tuple[Tensor, Tensor]:
    """Return G_m^T Z_m of every layer, where its weight stands."""
    found = torch.empty_like(weight), torch.empty_like(long_weight)
    for grad, (rows, part) in zip(grads, _layers(*found, n_short), strict=True):
        if grad is None:
            part.zero_()
        else:
            torch.mm(grad.t(), rows_UR[rows], out=part)
    return found


def _shapes(basis: Tensor, weight: Tensor, long_weight: Tensor, n_short: int) -> list[Tensor]:
    layers = _layers(weight, long_weight, n_short)
    return [basis.new_empty(len(basis[rows]), len(part)) for rows, part in layers]


_family = Family(
    "bond_tables",
    features=["Tensor basis"],
    parameters=["Tensor weight", "Tensor long_weight"],
    constants=["int n_short"],
    forward=_forward,
    backward=adding(_backward),
    backward_backward=_backward_backward,
    shape=_shapes,
    n_outputs=2 + N_LONG,
    vanishes=lambda *inputs: (0,),
)
