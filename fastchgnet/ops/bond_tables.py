"""Tables of bonds from their lengths: linear layers on the radial basis of all, of short or of long bonds.

With lengths r[U] and their radial basis Z[U, R] (`fastchgnet.ops.radial_basis`), of which the first B rows
belong to short bonds and the other L to long ones,

    Y_m = Z_m W_m^T         Z_0 its first B rows,  Z_1 = Z,  Z_2 and so on the others

VJP, with gradients G_m of Y_m:

    dZ_m += G_m W_m, each in its rows of dZ         dW_m = G_m^T Z_m

and dr and df are the basis' VJP of dZ. VJP of the VJP, with a cotangent v of dr: the basis' own, of dZ, gives
r~, f~ and, for Z~, the tangents z' = v dZ/dr of the basis; those of G_m are z'_m W_m^T, those of W_m are
G_m^T z'_m. Saved: the inputs.

The basis has no other reader, so that it need not be kept: it is cheaper to compute again than to read. Every
table is a tensor of its own: who reads it reads whole rows, and columns of one output would be copied first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastchgnet.ops import radial_basis
from fastchgnet.ops._register import Family, adding
from fastchgnet.ops.gpu import runtime

MAX_LONG = 5
"""Tables of long bonds: one for each block of the network, and one for a head."""


class Inputs(NamedTuple):
    """What the op takes; Any is a Tensor or None."""

    distance: Tensor  # [U, 1], r
    frequency: Tensor  # [R], f
    weight: Tensor  # [2 * D, R], W_0 and W_1; W_1 alone [D, R] where no others are wanted
    long_weight: Any  # [n_long, K, R], W_2 and so on
    cutoff: float
    p: int
    n_short: int

    @property
    def basis(self) -> tuple[Tensor, Tensor, float, int]:
        """What the radial basis is a function of."""
        return self.distance, self.frequency, self.cutoff, self.p


def bond_tables(*inputs: Any) -> tuple[Tensor, ...]:
    """Apply linear layers to the radial basis of bonds.

    Args:
        inputs: see `Inputs`; distances in A, short bonds first, of which there are `n_short`. From the cutoff
            on everything is zero, as its derivatives are.

    Returns:
        tables of the short bonds [B, D], of all [U, D], and n_long of the long ones [L, K]; that of all
        alone without `long_weight`.
    """
    m = Inputs(*inputs)
    n_long = 0 if m.long_weight is None else len(m.long_weight)
    if n_long > MAX_LONG:
        raise ValueError(f"{n_long} tables of long bonds, but at most {MAX_LONG} are made at once")
    return tuple(_family(*m)[: 1 if m.long_weight is None else 2 + n_long])


def reference(*inputs: Any) -> tuple[Tensor, ...]:
    """Compute the op in plain PyTorch, differentiable to any order."""
    m = Inputs(*inputs)
    return tuple(_tables(radial_basis.reference(*m.basis), m))


def _layers(m: Inputs, weight: Tensor, long_weight: Any) -> list[tuple[slice, Tensor]]:
    """Return the rows that every layer reads, and its part of the weights or of their gradients."""
    if long_weight is None:
        return [(slice(None), weight)]
    of_short, of_all = weight.chunk(2)
    short, long = slice(m.n_short), slice(m.n_short, None)
    return [(short, of_short), (slice(None), of_all), *((long, part) for part in long_weight)]


def _tables(rows_UR: Tensor, m: Inputs) -> list[Tensor]:
    return [rows_UR[rows] @ part.t() for rows, part in _layers(m, m.weight, m.long_weight)]


def _by_basis(grads: Sequence[Any], m: Inputs) -> Tensor:
    """Return dZ."""
    found = m.distance.new_zeros(len(m.distance), len(m.frequency))
    for grad, (rows, part) in zip(grads, _layers(m, m.weight, m.long_weight), strict=False):
        if grad is not None:
            found[rows].addmm_(grad, part)
    return found


def _by_weights(grads: Sequence[Any], rows_UR: Tensor, m: Inputs) -> list[Any]:
    """Return G_m^T Z_m of every layer, where its weight stands."""
    weight, long_weight = (None if t is None else torch.zeros_like(t) for t in (m.weight, m.long_weight))
    assert weight is not None
    for grad, (rows, part) in zip(grads, _layers(m, weight, long_weight), strict=False):
        if grad is not None:
            torch.mm(grad.t(), rows_UR[rows], out=part)
    return [weight, long_weight]


def _forward(*inputs: Any) -> list[Tensor]:
    m = Inputs(*inputs)
    return _tables(radial_basis.forward(*m.basis), m)


def _backward(with_parameters: bool, grads: Sequence[Any], *inputs: Any) -> list[Any]:
    m = Inputs(*inputs)
    found = radial_basis.backward(with_parameters, _by_basis(grads, m), *m.basis)
    return [*found, *_by_weights(grads, radial_basis.forward(*m.basis), m)] if with_parameters else found


def _backward_backward(cotangents: Sequence[Any], grads: Sequence[Any], *inputs: Any) -> list[Any]:
    m = Inputs(*inputs)
    (v,) = cotangents
    tangent_UR, *found = radial_basis.backward_backward(v, _by_basis(grads, m), *m.basis)
    tables = zip_longest(grads, _tables(tangent_UR, m))
    by_grads = [None if grad is None else table for grad, table in tables]
    return [*by_grads, *found, *_by_weights(grads, tangent_UR, m)]


def _shapes(*inputs: Any) -> list[Tensor]:
    m = Inputs(*inputs)
    layers = _layers(m, m.weight, m.long_weight)
    return [m.distance.new_empty(len(m.distance[rows]), len(part)) for rows, part in layers]


_family = Family(
    "bond_tables",
    features=["Tensor distance"],
    parameters=["Tensor frequency", "Tensor weight", "Tensor? long_weight"],
    constants=["float cutoff", "int p", "int n_short"],
    forward=_forward,
    backward=adding(_backward),
    backward_backward=_backward_backward,
    shape=_shapes,
    n_outputs=2 + MAX_LONG,
)
_family.on_cuda(
    runtime.body("bond_tables", "forward", _forward),
    runtime.body("bond_tables", "backward", adding(_backward)),
    runtime.body("bond_tables", "backward_backward", _backward_backward),
)
