"""Forces on atoms and stress of crystals, from what every bond does to its two ends.

Bond b runs along the arm r_b[3] from its centre to its neighbour, and pulls them with forces f_b[3] and -f_b.
With g_b[3] that makes the virial, often f_b itself, and the volume V of each crystal,

    F_i = sum over the edges of i of sign f          stress = 1/V sum over the bonds of r (x) g

where sign is +1 at the centre of a bond and -1 at its neighbour. The virial is summed over the edges of each
atom first, half of each bond at either end: bonds are not sorted by crystal, atoms are. All is added up in
float64: an atom of a large crystal has a hundred bonds, and a virial sums over all atoms.

VJP, with gradients X of F and Y of the stress, for a bond from i to j:

    df = X_i - X_j          dr = Y g / V          dg = Y^T r / V

A crystal without a volume has no stress, and sends no gradient. Forces stand at the end of a potential, so
there is no second derivative: asking for one raises. Saved: the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastchgnet.graph import Batch
from fastchgnet.ops._register import define, implement, no_derivative, shape_of
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.segments import sum_rows


class _Graph(NamedTuple):
    """Bonds of atoms, edges by atoms, and atoms by crystals; see `fastchgnet.graph.Batch`."""

    bond_center: Tensor
    bond_neighbor: Tensor
    edge_bond: Tensor
    edge_sign: Tensor
    atom_edge: Tensor
    atom_system: Tensor
    system_start: Tensor
    volume: Tensor


def forces_and_stress(pulls_UN3: Tensor, arm_U3: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum what each bond does to its two ends and to the crystal.

    Args:
        pulls_UN3: the force of each bond on its centre; with N = 2, that in the virial behind it.
        arm_U3: what the virial is a moment of.
        batch: the graph.

    Returns:
        forces [A, 3] and stress [S, 3, 3], per volume, NaN unless periodic in three directions.
    """
    return _pair_forces(pulls_UN3, arm_U3, *(getattr(batch, name) for name in _Graph._fields))


def reference(pulls: Tensor, arm: Tensor, *graph: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both in plain PyTorch and in float64, differentiable to any order where all have a volume."""
    g = _Graph(*graph)
    force, pull = pulls[:, 0].double(), pulls[:, -1].double()
    forces, virials = force.new_zeros(len(g.atom_system), 3), force.new_zeros(len(g.volume), 3, 3)
    forces = forces.index_add(0, g.bond_center, force).index_add(0, g.bond_neighbor, -force)
    system = g.atom_system[g.bond_center]
    virials = virials.index_add(0, system, arm.double()[:, :, None] * pull[:, None, :])
    return forces, virials / g.volume[:, None, None]


def _forward(pulls: Tensor, arm: Tensor, *graph: Tensor) -> tuple[Tensor, Tensor]:
    g = _Graph(*graph)
    forces = pulls.new_zeros(len(g.atom_system), 3, dtype=torch.float64)
    virials = forces.new_zeros(len(forces), 9)
    if len(arm) and len(forces):
        bag = torch.ops.aten._embedding_bag
        half = (arm.double()[:, :, None] * (pulls[:, -1].double() / 2)[:, None, :]).flatten(1)
        force, sign = pulls[:, 0].double(), g.edge_sign.double()
        forces, *_ = bag(force, g.edge_bond, g.atom_edge, False, 0, False, sign, True)
        virials, *_ = bag(half, g.edge_bond, g.atom_edge, False, 0, False, None, True)
    virial = sum_rows(virials, g.system_start, None).view(-1, 3, 3)
    # a volume that is missing is not a number
    return forces.to(arm.dtype), (virial / g.volume[:, None, None]).to(arm.dtype)


def _backward(
    pulls: Tensor,
    arm: Tensor,
    by_forces: Tensor,
    by_stress: Tensor,
    bond_center: Tensor,
    bond_neighbor: Tensor,
    atom_system: Tensor,
    volume: Tensor,
) -> tuple[Tensor, Tensor]:
    by_virial = (by_stress / volume[:, None, None]).where(volume.isfinite()[:, None, None], 0.0)
    y = by_virial.index_select(0, atom_system.index_select(0, bond_center))
    x = by_forces.double()
    by_force = x.index_select(0, bond_center) - x.index_select(0, bond_neighbor)
    by_arm = (y * pulls[:, -1, None, :]).sum(2)
    by_pull = (y * arm[:, :, None]).sum(1)
    both = [by_force + by_pull] if pulls.shape[1] == 1 else [by_force, by_pull]
    return torch.stack(both, dim=1).to(arm.dtype), by_arm.to(arm.dtype)


def _derivative(inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]) -> tuple[Any, ...]:
    pulls, arm, *graph = inputs
    g = _Graph(*graph)
    shapes = (len(g.atom_system), 3), (len(g.volume), 3, 3)
    given = (
        arm.new_zeros(shape) if grad is None else grad.contiguous()
        for shape, grad in zip(shapes, grads, strict=True)
    )
    ends = g.bond_center, g.bond_neighbor, g.atom_system, g.volume
    return *_pair_forces_backward(pulls, arm, *given, *ends), *(None for _ in graph)


def _shapes(pulls: Tensor, arm: Tensor, *graph: Tensor) -> tuple[Tensor, Tensor]:
    g = _Graph(*graph)
    return arm.new_empty(len(g.atom_system), 3), arm.new_empty(len(g.volume), 3, 3)


_ENDS = "Tensor bond_center, Tensor bond_neighbor"
_EDGES = "Tensor edge_bond, Tensor edge_sign, Tensor atom_edge"
_pair_forces = define(
    "pair_forces",
    f"(Tensor pulls, Tensor arm, {_ENDS}, {_EDGES}, Tensor atom_system, Tensor system_start, Tensor volume)"
    " -> (Tensor, Tensor)",
    _derivative,
)
_pair_forces_backward = define(
    "pair_forces_backward",
    f"(Tensor pulls, Tensor arm, Tensor by_forces, Tensor by_stress, {_ENDS}, Tensor atom_system, "
    "Tensor volume) -> (Tensor, Tensor)",
    no_derivative,
)
implement("pair_forces", _forward, runtime.body("pair_forces", "forward", _forward))
implement("pair_forces_backward", _backward, runtime.body("pair_forces", "backward", _backward))
shape_of("pair_forces", _shapes)
shape_of("pair_forces_backward", lambda pulls, arm, *_: (torch.empty_like(pulls), torch.empty_like(arm)))
