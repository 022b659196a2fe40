"""CHGNet, top to bottom: embeddings, four interaction blocks, readouts (Deng et al. 2023, Zhou et al. 2024).

Legend: A atoms, U bonds (short ones first), B short bonds, E directed edges, K short edges, T angles;
D = 64 features, R radial and F angular basis functions.

Three facts shape the code. A linear layer on a concatenation is a sum of linear layers, W[a;b;c] =
W_a a + W_b b + W_c c: project per atom and per bond, then gather the projections. Without an output bias
a bond over the bond cutoff (87% of them) never changes its features: its projection is a linear function
of its radial basis, so no state is carried for it. And every message carries an envelope and no bias, so
pairs beyond the cutoff contribute exactly zero.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastchgnet.basis import ChebyshevBasis, FourierBasis, RadialBasis
from fastchgnet.config import ModelConfig
from fastchgnet.graph import Batch
from fastchgnet.ops.message import MLP, Rows, Tables, messages
from fastchgnet.ops.segments import gather, segment_sum
from fastchgnet.units import MAX_ATOMIC_NUMBER

D = 64
N_BLOCKS = 4


def projection(n_parts: int, bias: bool = False) -> nn.Linear:
    """Make one D-column part of a linear layer on `n_parts` concatenated features; core and gate packed.

    Initialised as the whole layer would be, whose fan-in is n_parts * D.
    """
    linear = nn.Linear(D, 2 * D, bias=bias)
    for parameter in linear.parameters():
        nn.init.uniform_(parameter, -((n_parts * D) ** -0.5), (n_parts * D) ** -0.5)
    return linear


class GatedMLP(nn.Module):
    """What follows the first, factorised linear layer of a gated MLP; core and gate stacked.

    Args:
        config: the network.
        hidden: whether SiLU and a second linear layer come before SiLU(LN(core)) * sigmoid(LN(gate)).
    """

    def __init__(self, config: ModelConfig, hidden: bool = True) -> None:
        super().__init__()
        n_norms = 0 if not config.norm else 1 if config.shared_layer_norm else 2
        bound = D**-0.5
        self.weight = nn.Parameter(torch.empty(2, D, D).uniform_(-bound, bound)) if hidden else None
        self.bias = nn.Parameter(torch.empty(2, D).uniform_(-bound, bound)) if hidden else None
        self.scale = nn.Parameter(torch.ones(n_norms, D)) if n_norms else None
        self.shift = nn.Parameter(torch.zeros(n_norms, D)) if n_norms else None

    def forward(
        self, tables: Tables, weight: Tensor | None, rows: Rows, angle: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return messages of rows, summed where they have a weight; see `fastchgnet.ops.message`.

        Args:
            tables: projections of what the rows gather.
            weight: [n, D] of the messages, gathered as the last table.
            rows: what each row gathers and where it belongs.
            angle: features of the rows themselves, [N, D], and their projection.
        """
        angle_TD, projection = angle or (None, None)
        mlp = MLP(projection, self.weight, self.bias, self.scale, self.shift)
        return messages(tables, weight, angle_TD, mlp, rows)

    def gate(self, hidden_N2D: Tensor) -> Tensor:
        """Norm and gate N rows that gather nothing."""
        z = hidden_N2D.view(-1, 2, D)
        if self.scale is not None and self.shift is not None:
            z = F.layer_norm(z, (D,)) * self.scale + self.shift
        return F.silu(z[:, 0]) * torch.sigmoid(z[:, 1])


class BondFeatures(NamedTuple):
    """Features of all bonds: state of the short ones, radial basis of the long ones."""

    short_BD: Tensor
    long_basis: Tensor  # [U-B, R]
    embedding_DR: Tensor
    has_angle_U1: Tensor  # one where the bond's system has an angle; only an output bias asks for it
    long_shift_1D: Tensor | None = None  # what output biases have added to long bonds that have_angle

    def project(self, weight: Tensor) -> Tensor:
        """Apply a weight [K, D] to the features of every bond, [U, K]."""
        long = F.linear(self.long_basis, weight @ self.embedding_DR)
        if self.long_shift_1D is not None:
            long = long + self.has_angle_U1[len(self.short_BD) :] * F.linear(self.long_shift_1D, weight)
        return torch.cat([F.linear(self.short_BD, weight), long])


class AtomConv(nn.Module):
    """v_i += L[sum_j w_ij * phi(v_i, e_ij, v_j)] (Eq. 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.center = projection(3, bias=True)
        self.neighbor = projection(3)
        self.bond = projection(3)
        self.message = GatedMLP(config)
        self.out = nn.Linear(D, D, bias=config.output_bias)

    def forward(self, atom_AD: Tensor, bonds: BondFeatures, weight_UD: Tensor, edges: Rows) -> Tensor:
        """Return the new atom features."""
        tables = (self.center(atom_AD), self.neighbor(atom_AD), bonds.project(self.bond.weight))
        return atom_AD + self.out(self.message(tables, weight_UD, edges))


class AngleProjections(nn.Module):
    """The first layer shared in form by BondConv and AngleUpdate, on [bond_i, bond_j, angle, center]."""

    def __init__(self) -> None:
        super().__init__()
        self.bond_i = projection(4)
        self.bond_j = projection(4)
        self.angle = projection(4)
        self.center = projection(4, bias=True)

    def forward(self, atom_AD: Tensor, short_KD: Tensor) -> Tables:
        """Project what angles gather: their first short edge, their centre, their second short edge."""
        return self.bond_i(short_KD), self.center(atom_AD), self.bond_j(short_KD)


class BondConv(nn.Module):
    """e_ij += L[w_ij * sum_k w_ik * phi(e_ij, e_ik, a_ijk, v_i)], both ends of a bond summed (Eq. 5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.first = AngleProjections()
        self.message = GatedMLP(config)
        self.output_bias = config.output_bias
        self.out = nn.Linear(D, D, bias=config.output_bias)

    def forward(
        self, atom_AD: Tensor, bonds: BondFeatures, angle_TD: Tensor, weight_KD: Tensor, graph: Graph
    ) -> BondFeatures:
        """Return the new bond features."""
        tables = self.first(atom_AD, gather(bonds.short_BD, graph.short_by_bond))
        total_KD = self.message(tables, weight_KD, graph.angles, (angle_TD, self.first.angle.weight))
        total_BD = segment_sum(weight_KD * total_KD, graph.short_by_bond)
        short_BD = bonds.short_BD + F.linear(total_BD, self.out.weight)
        if not self.output_bias:
            return bonds._replace(short_BD=short_BD)
        bias = self.out.bias
        shift_1D = bias[None] if bonds.long_shift_1D is None else bonds.long_shift_1D + bias
        short_BD = short_BD + bonds.has_angle_U1[: len(short_BD)] * bias
        return bonds._replace(short_BD=short_BD, long_shift_1D=shift_1D)


class AngleUpdate(nn.Module):
    """a_ijk += phi(e_ij, e_ik, a_ijk, v_i), without a hidden layer (Eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.first = AngleProjections()
        self.message = GatedMLP(config, hidden=False)

    def forward(self, atom_AD: Tensor, short_BD: Tensor, angle_TD: Tensor, graph: Graph) -> Tensor:
        """Return the new angle features."""
        tables = self.first(atom_AD, gather(short_BD, graph.short_by_bond))
        return self.message(tables, None, graph.angles, (angle_TD, self.first.angle.weight))


class Graph:
    """What the layers gather from and sum into."""

    def __init__(self, batch: Batch) -> None:
        self.edges = Rows(batch.by_center, batch.by_neighbor, batch.by_bond)
        self.angles = Rows(batch.angle_by_i, batch.angle_by_center, batch.angle_by_j)
        self.short_by_bond = batch.short_by_bond


class Features(NamedTuple):
    """What the network has made of a batch; readouts and heads start from here."""

    site_energy: Tensor  # [A] eV, without reference energies
    magmoms: Tensor  # [A] mu_B
    atom_AD: Tensor
    bonds: BondFeatures


class CHGNet(nn.Module):
    """The network: a batch and its bond vectors in, features, site energies and magnetic moments out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.atom_embedding = nn.Embedding(MAX_ATOMIC_NUMBER, D)
        self.atom_basis = RadialBasis(config.n_radial, config.atom_cutoff, config.envelope_p)
        self.bond_basis = RadialBasis(config.n_radial, config.bond_cutoff, config.envelope_p)
        bases = {"fourier": FourierBasis, "chebyshev": ChebyshevBasis}
        self.angle_basis = bases[config.angular_basis](config.n_angular)
        self.bond_embedding = nn.Linear(config.n_radial, D, bias=False)
        self.atom_weight = nn.Linear(config.n_radial, D, bias=False)
        self.bond_weight = nn.Linear(config.n_radial, D, bias=False)
        self.angle_embedding = nn.Linear(config.n_angular, D, bias=False)
        self.atom_convs = nn.ModuleList(AtomConv(config) for _ in range(N_BLOCKS))
        self.bond_convs = nn.ModuleList(BondConv(config) for _ in range(N_BLOCKS - 1))
        # the published models' third angle update never reaches an output
        self.angle_updates = nn.ModuleList(AngleUpdate(config) for _ in range(N_BLOCKS - 2))
        self.magmom = nn.Linear(D, 1)
        self.readout_norm = nn.LayerNorm(D) if config.norm else nn.Identity()
        widths = (D, *config.readout_hidden)
        hidden = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
        self.readout = nn.Sequential(*hidden, nn.Linear(widths[-1], 1))

    def forward(self, batch: Batch, bond_vector: Tensor) -> Features:
        """Run the network.

        Args:
            batch: S systems as a graph.
            bond_vector: [U, 3], A, in the network's dtype; what forces are derivatives by.
        """
        graph = Graph(batch)
        distance = bond_vector.norm(dim=1, keepdim=True)
        n_short = batch.n_short_bonds
        basis_UR = self.atom_basis(distance)
        atom_weight_UD = self.atom_weight(basis_UR)
        bond_weight_BD = self.bond_weight(self.bond_basis(distance[:n_short]))
        bond_weight_KD = gather(bond_weight_BD, graph.short_by_bond)
        short_K3 = gather(bond_vector[:n_short], graph.short_by_bond) * batch.short_sign[:, None]
        angle_TD = self.angle_embedding(self.angle_basis(short_K3, graph.angles.i, graph.angles.k))
        atom_AD = self.atom_embedding(batch.atomic_number - 1)
        bonds = BondFeatures(
            short_BD=self.bond_embedding(basis_UR[:n_short]),
            long_basis=basis_UR[n_short:],
            embedding_DR=self.bond_embedding.weight,
            has_angle_U1=self._bond_has_angle(batch),
        )
        for t in range(N_BLOCKS - 1):
            old_atom_AD, old_bonds = atom_AD, bonds
            atom_AD = self.atom_convs[t](atom_AD, bonds, atom_weight_UD, graph.edges)
            # the paper's Eq. 11 feeds bonds and angles from the previous block, Eq. 10 from this one
            parallel = self.config.interaction == "parallel"
            source_AD = old_atom_AD if parallel else atom_AD
            bonds = self.bond_convs[t](source_AD, bonds, angle_TD, bond_weight_KD, graph)
            if t < len(self.angle_updates):
                source_BD = (old_bonds if parallel else bonds).short_BD
                angle_TD = self.angle_updates[t](source_AD, source_BD, angle_TD, graph)
        magmoms = self.magmom(atom_AD)[:, 0].abs()
        atom_AD = self.atom_convs[-1](atom_AD, bonds, atom_weight_UD, graph.edges)
        site_energy = self.readout(self.readout_norm(atom_AD))[:, 0]
        return Features(site_energy, magmoms, atom_AD, bonds)

    def _bond_has_angle(self, batch: Batch) -> Tensor:
        """One where the bond's system has an angle, [U, 1]; only an output bias asks for it."""
        has_angle = batch.volume.new_zeros(batch.n_systems, dtype=self.magmom.weight.dtype)
        has_angle[batch.atom_system[batch.angle_center]] = 1
        return has_angle[batch.bond_system][:, None]
