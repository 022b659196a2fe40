"""Lengths of bonds, and vectors of short edges, from the vectors of bonds.

With the bond b(k) and the sign s_k of each short edge k, where the short edges of a bond are i along it
and j against it:

    d_b = |v_b|   [U, 1]          c_b = d_b where b is short   [B, 1]          e_k = s_k v_b(k)   [K, 3]

A basis of its own reads c. Were it a piece of d, its gradient would be spread over as many rows as d has, and
added to that of d.

VJP, with gradients G of d, C of c and H of e, and G' of d in all, G'_b = G_b + (C_b where b is short):

    dv_b = G'_b v_b / d_b + (H_i - H_j where b is short)

VJP of the VJP, with the cotangent u of dv:

    G~_b = C~_b = v_b . u_b / d_b       H~_k = s_k u_b(k)       v~_b = G'_b / d_b (u_b - v_b G~_b / d_b)

A bond of no length has no direction: all that is divided by its d is zero. So is PyTorch's first derivative
of a norm; its second one is not a number. Saved: the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastchgnet.graph import Batch
from fastchgnet.ops._register import Family, adding
from fastchgnet.ops.gpu import runtime

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def geometry(bond_vector: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Measure bonds and point short edges, which short bonds make.

    Args:
        bond_vector: [U, 3], short bonds first.
        batch: the graph.

    Returns:
        distances [U, 1], those of short bonds [B, 1], and vectors of short edges from their centres [K, 3].
    """
    return _family(bond_vector, batch.short_bond, batch.short_sign, batch.bond_short)


def reference(
    bond_vector: Tensor, short_bond: Tensor, short_sign: Tensor, bond_short: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op in plain PyTorch, differentiable to any order where no bond has length zero."""
    distance = bond_vector.norm(dim=1, keepdim=True)
    return distance, distance[: len(bond_short)].clone(), _turned(bond_vector, short_bond, short_sign)


def _turned(rows_U3: Tensor, short_bond: Tensor, short_sign: Tensor) -> Tensor:
    """Read the row of every short edge's bond, times its sign."""
    return rows_U3.index_select(0, short_bond) * short_sign[:, None]


def _divisor(bond_vector: Tensor) -> Tensor:
    """Lengths, [U, 1]; infinite where they are zero."""
    length = bond_vector.norm(dim=1, keepdim=True)
    return length.masked_fill_(length == 0, torch.inf)


def _by_distance(grads: _Gradients, bond_vector: Tensor) -> Tensor | None:
    """Add up the gradients of distances, [U, 1]."""
    by_all, by_short, _ = grads
    if by_short is None:
        return by_all
    total = bond_vector.new_zeros(len(bond_vector), 1) if by_all is None else by_all.clone()
    total[: len(by_short)] += by_short
    return total


def _backward(
    with_parameters: bool,
    grads: _Gradients,
    bond_vector: Tensor,
    short_bond: Tensor,
    short_sign: Tensor,
    bond_short: Tensor,
) -> list[Tensor]:
    *_, by_edge = grads
    by_distance = _by_distance(grads, bond_vector)
    if by_distance is None:
        by_vector = torch.zeros_like(bond_vector)
    else:
        by_vector = bond_vector * (by_distance / _divisor(bond_vector))
    if by_edge is not None:
        along, against = by_edge.index_select(0, bond_short.flatten()).view(-1, 2, 3).unbind(1)
        by_vector[: len(bond_short)] += along - against
    return [by_vector]


def _backward_backward(
    cotangents: tuple[Tensor],
    grads: _Gradients,
    bond_vector: Tensor,
    short_bond: Tensor,
    short_sign: Tensor,
    bond_short: Tensor,
) -> list[Tensor | None]:
    (u,), (by_all, by_short, by_edge) = cotangents, grads
    of_edge = None if by_edge is None else _turned(u, short_bond, short_sign)
    by_distance = _by_distance(grads, bond_vector)
    if by_distance is None:
        return [None, None, of_edge, torch.zeros_like(u)]
    length = _divisor(bond_vector)
    longer = (bond_vector * u).sum(1, keepdim=True) / length
    across = torch.addcmul(u, bond_vector, longer / length, value=-1).mul_(by_distance / length)
    of_short = None if by_short is None else longer[: len(by_short)].clone()
    return [None if by_all is None else longer, of_short, of_edge, across]


_family = Family(
    "geometry",
    features=["Tensor bond_vector"],
    parameters=[],
    constants=["Tensor short_bond", "Tensor short_sign", "Tensor bond_short"],
    forward=reference,
    backward=adding(_backward),
    backward_backward=_backward_backward,
    shape=lambda bond_vector, short_bond, short_sign, bond_short: (
        bond_vector.new_empty(len(bond_vector), 1),
        bond_vector.new_empty(len(bond_short), 1),
        bond_vector.new_empty(len(short_bond), 3),
    ),
    n_outputs=3,
)
_family.on_cuda(
    runtime.body("geometry", "forward", reference),
    adding(runtime.body("geometry", "backward", _backward)),
    runtime.body("geometry", "backward_backward", _backward_backward),
)
