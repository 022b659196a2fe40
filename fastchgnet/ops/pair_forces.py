"""Sums over the bonds of each atom: its force, and its half of their virial.

Bond b runs from its centre to its neighbour. With forces f[U, 3] on the centre, and the virial of forces
g[U, 3] at the ends of arms r[U, 3],

    F_i = sum over the edges of i of sign f          V_i = 1/2 sum over the edges of i of r (x) g

where sign is +1 at the centre of a bond and -1 at its neighbour; an arm and its force turn over together.
Added up in float64: an atom of a large crystal has a hundred bonds, and a virial sums over all atoms.

VJP, with gradients X of F and Y of V, for a bond from i to j:

    df = X_i - X_j          dr = Y g          dg = Y^T r          Y = (Y_i + Y_j) / 2

Forces stand at the end of a potential, so there is no second derivative: asking for one raises.
Saved: r, g and the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastchgnet.graph import Batch
from fastchgnet.ops._register import define, implement, no_derivative, shape_of
from fastchgnet.ops.gpu import runtime


class _Graph(NamedTuple):
    """Bonds of atoms, and edges by atoms; see `fastchgnet.graph.Batch`."""

    bond_center: Tensor
    bond_neighbor: Tensor
    edge_bond: Tensor
    edge_sign: Tensor
    atom_edge: Tensor


def forces_and_virials(
    force_U3: Tensor, arm_U3: Tensor, pull_U3: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Sum over the bonds of each atom.

    Args:
        force_U3: what each bond does to its centre.
        arm_U3: what the virial is a moment of.
        pull_U3: the forces of the virial; may be force_U3 itself.
        batch: the graph.

    Returns:
        forces [A, 3] and virials [A, 3, 3], in float64.
    """
    graph = _Graph(batch.bond_center, batch.bond_neighbor, batch.edge_bond, batch.edge_sign, batch.atom_edge)
    forces, virials = _pair_forces(force_U3, arm_U3, pull_U3, *graph).split([3, 9], dim=1)
    return forces, virials.unflatten(1, (3, 3))


def reference(force: Tensor, arm: Tensor, pull: Tensor, *graph: Tensor) -> Tensor:
    """Compute both in plain PyTorch, [A, 12], differentiable to any order."""
    g = _Graph(*graph)
    half = (arm[:, :, None] * pull[:, None, :]).flatten(1).double() / 2
    ends = [torch.cat([sign * force.double(), half], dim=1) for sign in (1, -1)]
    total = half.new_zeros(len(g.atom_edge) - 1, 12)
    return total.index_add(0, g.bond_center, ends[0]).index_add(0, g.bond_neighbor, ends[1])


def _forward(
    force: Tensor,
    arm: Tensor,
    pull: Tensor,
    bond_center: Tensor,
    bond_neighbor: Tensor,
    edge_bond: Tensor,
    edge_sign: Tensor,
    atom_edge: Tensor,
) -> Tensor:
    n_atoms = len(atom_edge) - 1
    if not len(force) or not n_atoms:
        return force.new_zeros(n_atoms, 12, dtype=torch.float64)
    bag = torch.ops.aten._embedding_bag
    half = (arm.double()[:, :, None] * (pull.double() / 2)[:, None, :]).flatten(1)
    forces, *_ = bag(force.double(), edge_bond, atom_edge, False, 0, False, edge_sign.double(), True)
    virials, *_ = bag(half, edge_bond, atom_edge, False, 0, False, None, True)
    return torch.cat([forces, virials], dim=1)


def _backward(
    arm: Tensor, pull: Tensor, grad: Tensor, bond_center: Tensor, bond_neighbor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    center, neighbor = grad.index_select(0, bond_center), grad.index_select(0, bond_neighbor)
    by_force = (center[:, :3] - neighbor[:, :3]).to(arm.dtype)
    y = ((center[:, 3:] + neighbor[:, 3:]) / 2).view(-1, 3, 3)
    by_arm = (y * pull[:, None, :]).sum(2).to(arm.dtype)
    by_pull = (y * arm[:, :, None]).sum(1).to(arm.dtype)
    return by_force, by_arm, by_pull


def _derivative(inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]) -> tuple[Any, ...]:
    (grad,) = grads
    if grad is None:
        return (None,) * 8
    _, arm, pull, *ends = inputs[:5]
    return *_pair_forces_backward(arm, pull, grad.contiguous(), *ends), None, None, None, None, None


_ENDS = "Tensor bond_center, Tensor bond_neighbor"
_INPUTS = (
    f"(Tensor force, Tensor arm, Tensor pull, {_ENDS}, Tensor edge_bond, Tensor edge_sign, Tensor atom_edge)"
)
_BACKWARD_INPUTS = f"(Tensor arm, Tensor pull, Tensor grad, {_ENDS})"
_pair_forces = define("pair_forces", f"{_INPUTS} -> Tensor", _derivative)
_pair_forces_backward = define(
    "pair_forces_backward", f"{_BACKWARD_INPUTS} -> (Tensor, Tensor, Tensor)", no_derivative
)
implement("pair_forces", _forward)
implement("pair_forces_backward", _backward)
implement("pair_forces", runtime.body("pair_forces", "forward", _forward), "CUDA")
implement("pair_forces_backward", runtime.body("pair_forces", "backward", _backward), "CUDA")
shape_of("pair_forces", lambda force, *rest: force.new_empty(len(rest[-1]) - 1, 12, dtype=torch.float64))
shape_of("pair_forces_backward", lambda arm, *_: tuple(torch.empty_like(arm) for _ in range(3)))
