"""Heads of a direct readout: forces and stress without any derivative.

`PairHeads` is ours, `PaperHeads` the FastCHGNet paper's, kept for the comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastchgnet.config import ModelConfig
from fastchgnet.graph import Batch
from fastchgnet.model import D, Features, GatedMLP, projection
from fastchgnet.ops.central_pulls import central_pulls
from fastchgnet.ops.message import Rows, Tables
from fastchgnet.ops.pair_forces import forces_and_stress
from fastchgnet.ops.segments import gather, segment_sum
from fastchgnet.units import GPA


def pair_forces(pair_force_U3: Tensor, batch: Batch) -> Tensor:
    """Sum what each bond does to its two ends, [A, 3]; +f on the centre and -f on the neighbour."""
    by_bond, _ = batch.by_bond
    along_edge = gather(pair_force_U3, by_bond) * batch.edge_sign[:, None]
    return segment_sum(along_edge, batch.by_center)


def _all_bonds(features: Features, head: nn.Module) -> Tensor:
    """Return what a head reads of bonds, short and long, [U, 2D]."""
    return torch.cat([features.projected[head.bond], features.projected[head]])


class PairHeads(nn.Module):
    """F_i = sum_j n_ij r^_ij and stress = 1/V sum_ij m_ij r^_ij (x) r^_ij with scalars symmetric in i and j.

    Newton's third law holds, the stress is symmetric, both rotate with the crystal, do not depend on the
    choice of cell and vanish smoothly at the cutoff. The scalars read both atoms and the bond; angles
    enter through the features of short bonds and atoms. Within the bond cutoff an angle is a function of
    three distances, all below twice that cutoff, so central pair forces lose no generality.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.atom = projection(3, bias=True)
        self.bond = projection(3)
        self.message = GatedMLP(config)
        self.scalars = nn.Linear(D, 2, bias=False)
        # an untrained head predicts no force and no stress
        nn.init.zeros_(self.scalars.weight)

    def forward(self, batch: Batch, bond_vector: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """Return forces [A, 3], eV/A, and stress [S, 3, 3], eV/A^3."""
        atom_A2D = features.projected[self.atom]
        # the sums over one end's transpose find each bond at both of its ends
        tables = Tables(_all_bonds(features, self), atom_A2D, atom_A2D.detach())
        message_UD = self.message(tables, None, Rows(*batch.bonds_by_ends))
        cutoff, p = self.config.atom_cutoff, self.config.envelope_p
        pulls_U23, unit_U3 = central_pulls(message_UD, self.scalars.weight, bond_vector, cutoff, p)
        return forces_and_stress(pulls_U23, unit_U3, batch)


class PaperHeads(nn.Module):
    """The paper's Force head (Eq. 7) on bond features and Stress head (Eq. 9) on atom features.

    Has no envelope, so bonds at or beyond the cutoff are masked and forces jump there; the stress is
    neither equivariant nor independent of the choice of cell. `x_ij` is read as the unit vector and
    `scale` as 1 GPa over the number of atoms (docs/decisions.md).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        own_norms = config.model_copy(update={"shared_layer_norm": False})
        self.force_first = nn.Linear(D, 2 * D)
        self.force_message = GatedMLP(own_norms, hidden=False)
        self.force_out = nn.Linear(D, 1, bias=False)
        self.stress_first = nn.Linear(D, 2 * D)
        self.stress_message = GatedMLP(own_norms, hidden=False)
        self.stress_out = nn.Linear(D, 9)

    @property
    def atom(self) -> nn.Linear:
        """Projects atoms."""
        return self.stress_first

    @property
    def bond(self) -> nn.Linear:
        """Projects bonds."""
        return self.force_first

    def forward(self, batch: Batch, bond_vector: Tensor, features: Features) -> tuple[Tensor, Tensor]:
        """Return forces [A, 3], eV/A, and stress [S, 3, 3], eV/A^3."""
        distance = bond_vector.norm(dim=1, keepdim=True)
        hidden = _all_bonds(features, self) + self.bond.bias
        n_U1 = self.force_out(self.force_message.gate(hidden))
        n_U1 = n_U1.where(distance < self.config.atom_cutoff, 0.0)
        forces = pair_forces(n_U1 * bond_vector / distance, batch)

        site = self.stress_out(self.stress_message.gate(features.projected[self.atom]))
        mean = segment_sum(site, batch.by_system).view(-1, 3, 3) * GPA
        mean = mean / batch.n_atoms[:, None, None]
        axis_sum = torch.nn.functional.normalize(batch.cell, dim=2).sum(1).to(site.dtype)
        stress = mean * axis_sum[:, :, None] * axis_sum[:, None, :]
        return forces, stress.where(batch.volume.isfinite()[:, None, None], torch.nan)
