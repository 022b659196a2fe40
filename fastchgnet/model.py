"""CHGNet, top to bottom: embeddings, four interaction blocks, readouts (Deng et al. 2023, Zhou et al. 2024).

Legend: A atoms, U bonds (B short, then L long ones), E directed edges, K short edges, T angles;
D = 64 features, R radial and F angular basis functions.

Three facts shape the code. A linear layer on a concatenation is a sum of linear layers, W[a;b;c] =
W_a a + W_b b + W_c c: project per atom and per bond, then gather the projections. Without an output bias
a bond over the bond cutoff (87% of them) never changes its features: its projection is a linear function
of its radial basis, so no state is carried for it. And every message carries an envelope and no bias, so
pairs beyond the cutoff contribute exactly zero.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastchgnet.basis import ChebyshevBasis, FourierBasis, RadialBasis
from fastchgnet.config import ModelConfig
from fastchgnet.graph import Batch
from fastchgnet.ops.geometry import geometry
from fastchgnet.ops.magmom import magmoms
from fastchgnet.ops.message import MLP, Rows, Tables, messages
from fastchgnet.ops.packing import packed
from fastchgnet.ops.projection import Ends, Sent, project
from fastchgnet.ops.readout import readout
from fastchgnet.ops.segments import gather
from fastchgnet.ops.shared import Shared
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
        self, tables: Tables, weight: Shared | None, rows: Rows, angle: tuple[Shared, Tensor] | None = None
    ) -> Tensor:
        """Return messages of rows, summed where they have a weight, else added to the rows' own features.

        See `fastchgnet.ops.message`.

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


class Head(Protocol):
    """Reads what the network has made of atoms and bonds, through a projection of each, [2D, D]."""

    @property
    def atom(self) -> nn.Linear:
        """Projects atoms."""

    @property
    def bond(self) -> nn.Linear:
        """Projects bonds; its bias, if any, is the head's to add."""


class BondFeatures(NamedTuple):
    """Features of all bonds: state of the short ones, and how that of long ones differs from embeddings."""

    short_BD: Tensor
    has_angle_U1: Tensor | None  # one where the bond's system has an angle; only an output bias asks for it
    long_shift_1D: Tensor | None = None  # what output biases have added to long bonds that have_angle

    def shifted(self, long_LK: Tensor, weight: Tensor) -> Tensor:
        """Add to projections of the long bonds, by a weight [K, D], what output biases have added to them."""
        if self.has_angle_U1 is None or self.long_shift_1D is None:
            return long_LK
        return long_LK + self.has_angle_U1[len(self.short_BD) :] * F.linear(self.long_shift_1D, weight)

    def biased(self, bias: Tensor) -> BondFeatures:
        """Add the output bias of a bond convolution, [D], wherever there are angles."""
        assert self.has_angle_U1 is not None
        shift_1D = bias[None] if self.long_shift_1D is None else self.long_shift_1D + bias
        short_BD = self.short_BD + self.has_angle_U1[: len(self.short_BD)] * bias
        return self._replace(short_BD=short_BD, long_shift_1D=shift_1D)


Projected = dict[Any, Tensor]
"""What each projection has made of the features it reads, and for each atom convolution, and for the head,
what it reads of long bonds; every one is read once, and then forgotten."""


class AtomConv(nn.Module):
    """v_i += L[sum_j w_ij * phi(v_i, e_ij, v_j)] (Eq. 4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.center = projection(3, bias=True)
        self.neighbor = projection(3)
        self.bond = projection(3)
        self.message = GatedMLP(config)
        self.out = nn.Linear(D, D, bias=config.output_bias)

    def forward(self, projected: Projected, weight_UD: Shared, edges: Rows) -> Tensor:
        """Return the sum in brackets, [A, D]."""
        tables = Tables(*(projected.pop(by) for by in (self.center, self.neighbor, self.bond, self)))
        return self.message(tables, weight_UD, edges)


class AngleProjections(nn.Module):
    """The first layer shared in form by BondConv and AngleUpdate, on [bond_i, bond_j, angle, center]."""

    def __init__(self) -> None:
        super().__init__()
        self.bond_i = projection(4)
        self.bond_j = projection(4)
        self.angle = projection(4)
        self.center = projection(4, bias=True)

    def forward(self, projected: Projected) -> Tables:
        """Return what angles gather: their first short edge, their centre, their second short edge."""
        return Tables(projected.pop(self.bond_i), projected.pop(self.center), projected.pop(self.bond_j))


class BondConv(nn.Module):
    """e_ij += L[w_ij * sum_k w_ik * phi(e_ij, e_ik, a_ijk, v_i)], both ends of a bond summed (Eq. 5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.first = AngleProjections()
        self.message = GatedMLP(config)
        self.out = nn.Linear(D, D, bias=config.output_bias)

    def forward(self, projected: Projected, angle_TD: Shared, weight_KD: Shared, angles: Rows) -> Tensor:
        """Return the sum over k for each short edge, [K, D]."""
        return self.message(self.first(projected), weight_KD, angles, (angle_TD, self.first.angle.weight))


class AngleUpdate(nn.Module):
    """a_ijk += phi(e_ij, e_ik, a_ijk, v_i), without a hidden layer (Eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.first = AngleProjections()
        self.message = GatedMLP(config, hidden=False)

    def forward(self, projected: Projected, angle_TD: Shared, angles: Rows) -> Tensor:
        """Return the new angle features."""
        return self.message(self.first(projected), None, angles, (angle_TD, self.first.angle.weight))


class Graph:
    """What the layers gather from and sum into."""

    def __init__(self, batch: Batch) -> None:
        by_bond, self.short_by_bond = batch.by_bond
        self.edges = Rows(batch.by_center, batch.by_neighbor, by_bond)
        self.angles = Rows(batch.angle_by_i, batch.angle_by_center, batch.angle_by_j)
        self.bond_short = batch.bond_short


class Weights(NamedTuple):
    """Weights of messages: functions of a distance that vanish at the cutoff."""

    atom_UD: Shared
    bond_BD: Shared
    bond_KD: Shared  # the same at the short edges


class Features(NamedTuple):
    """What the network has made of a batch; readouts and heads start from here."""

    site_energy: Tensor  # [A] eV, without reference energies
    magmoms: Tensor  # [A] mu_B
    atom_before_AD: Tensor  # before the last convolution; what moments are read from
    atom_AD: Tensor
    projected: Projected  # for the head


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
        # an nn.ModuleList forgets what kind of layers it holds
        self.atom_convs: Any = nn.ModuleList(AtomConv(config) for _ in range(N_BLOCKS))
        self.bond_convs: Any = nn.ModuleList(BondConv(config) for _ in range(N_BLOCKS - 1))
        # the published models' third angle update never reaches an output
        self.angle_updates: Any = nn.ModuleList(AngleUpdate(config) for _ in range(N_BLOCKS - 2))
        self.magmom = nn.Linear(D, 1)
        self.readout_norm = nn.LayerNorm(D) if config.norm else nn.Identity()
        widths = (D, *config.readout_hidden)
        hidden = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]
        self.readout = nn.Sequential(*hidden, nn.Linear(widths[-1], 1))

    def forward(self, batch: Batch, bond_vector: Tensor, head: Head | None = None) -> Features:
        """Run the network.

        Args:
            batch: S systems as a graph.
            bond_vector: [U, 3], A, in the network's dtype; what forces are derivatives by.
            head: for whom the last features of atoms and bonds are projected.
        """
        graph = Graph(batch)
        weights, bonds, angle_TD, projected = self._embed(batch, bond_vector, graph, head)
        bonds = self._update_bonds(0, bonds, None, graph, projected, head)
        atom_AD = self._update_atoms(0, self.atom_embedding(batch.atomic_number - 1), None, projected, head)
        for t, conv in enumerate(self.atom_convs[:-1]):
            sum_AD = conv(projected, weights.atom_UD, graph.edges)
            atom_AD = self._update_atoms(t + 1, atom_AD, sum_AD, projected, head)
            sum_KD = self.bond_convs[t](projected, angle_TD, weights.bond_KD, graph.angles)
            sent = Sent(sum_KD, weights.bond_BD, self.bond_convs[t].out.weight)
            bonds = self._update_bonds(t + 1, bonds, sent, graph, projected, head)
            if t < len(self.angle_updates):
                angle_TD = Shared(self.angle_updates[t](projected, angle_TD, graph.angles))
        before_AD, moments = atom_AD, magmoms(atom_AD, self.magmom)
        sum_AD = self.atom_convs[-1](projected, weights.atom_UD, graph.edges)
        atom_AD = self._update_atoms(N_BLOCKS, atom_AD, sum_AD, projected, head)
        site_energy = readout(atom_AD, self.readout_norm, self.readout)
        return Features(site_energy, moments, before_AD, atom_AD, projected)

    def _embed(
        self, batch: Batch, bond_vector: Tensor, graph: Graph, head: Head | None
    ) -> tuple[Weights, BondFeatures, Shared, Projected]:
        """Return what comes before the first block.

        That is the weights of messages, the features of bonds and angles, and the long bonds, embedded and
        projected for all who read them.
        """
        distance, short_distance, short_K3 = geometry(bond_vector, batch)
        (bond_weight_BD,) = self.bond_basis(short_distance, self.bond_weight.weight)
        angle_TD = self.angle_embedding(self.angle_basis(short_K3, graph.angles.i, graph.angles.k))
        embedding_DR = self.bond_embedding.weight
        weight = packed([embedding_DR, self.atom_weight.weight]).view(2 * D, -1)
        readers = [reader for t in range(N_BLOCKS) for reader in self._readers_of_all_bonds(t, head)]
        long_weight = packed([reader.bond.weight for reader in readers]).view(-1, D) @ embedding_DR
        long_weight = long_weight.view(len(readers), 2 * D, -1)
        short_BD, atom_weight_UD, *long_tables = self.atom_basis(
            distance, weight, long_weight, batch.n_short_bonds
        )
        bond_weight_KD = gather(bond_weight_BD, graph.short_by_bond)
        bonds = BondFeatures(
            short_BD=short_BD,
            has_angle_U1=self._bond_has_angle(batch) if self.config.output_bias else None,
        )
        return (
            Weights(*map(Shared, (atom_weight_UD, bond_weight_BD, bond_weight_KD))),
            bonds,
            Shared(angle_TD),
            dict(zip(readers, long_tables, strict=True)),
        )

    def _block(self, t: int) -> int:
        """Return the block whose angles read atoms, and whose angle update reads bonds, after t convolutions.

        In the paper's Eq. 10 they read what their own block has made of these, in Eq. 11 what the block
        before it has.
        """
        return t if self.config.interaction == "parallel" else t - 1

    def in_order(self, head: Head | None = None) -> list[nn.Parameter]:
        """Return the parameters in the order of their use, what one op takes side by side.

        Weights of those who read all bonds are used before all layers, in one product.

        Args:
            head: whose projections are among them.
        """
        layers: list[Any] = []
        for t in range(N_BLOCKS + 1):
            if t < N_BLOCKS:
                layers += [conv.out.weight for conv in _at(self.bond_convs, t - 1)]
                layers += [reader.weight for reader in self._readers_of_short_bonds(t)]
            layers += [conv.out.weight for conv in _at(self.atom_convs, t - 1)]
            readers = self._readers_of_atoms(t, head)
            layers += [reader.weight for reader in readers]
            layers += [reader.bias for reader in readers if reader.bias is not None]
            for conv in _at(self.atom_convs, t):
                layers += conv.message.parameters()
            for layer in (*_at(self.bond_convs, t), *_at(self.angle_updates, t)):
                layers += [layer.first.angle.weight, *layer.message.parameters()]
        last = [p for part in (self.magmom, self.readout_norm, self.readout) for p in part.parameters()]
        placed = {id(p) for p in (*layers, *last)}
        first = [p for p in self.parameters() if id(p) not in placed]
        return [*first, *([] if head is None else [head.bond.weight]), *layers, *last]

    def _readers_of_atoms(self, t: int, head: Head | None) -> list[nn.Linear]:
        """Return what projects the atom features after t convolutions."""
        if t == N_BLOCKS:
            return [] if head is None else [head.atom]
        layers = (*_at(self.bond_convs, self._block(t)), *_at(self.angle_updates, self._block(t)))
        readers = [layer.first.center for layer in layers]
        return readers + [part for conv in _at(self.atom_convs, t) for part in (conv.center, conv.neighbor)]

    def _readers_of_all_bonds(self, t: int, head: Head | None) -> list[Any]:
        """Return who reads the features of all bonds after t convolutions."""
        return [self.atom_convs[t], *([] if head is None or t < N_BLOCKS - 1 else [head])]

    def _readers_of_short_bonds(self, t: int) -> list[nn.Linear]:
        """Return what projects those of the short bonds alone, at their ends."""
        layers = (*_at(self.bond_convs, t), *_at(self.angle_updates, self._block(t)))
        return [part for layer in layers for part in (layer.first.bond_i, layer.first.bond_j)]

    def _update_atoms(
        self, t: int, atom_AD: Tensor, sum_AD: Tensor | None, projected: Projected, head: Head | None
    ) -> Tensor:
        """Return the atom features after t convolutions, projected for all who read those."""
        sent = None
        if sum_AD is not None:
            out = self.atom_convs[t - 1].out
            atom_AD = atom_AD if out.bias is None else atom_AD + out.bias
            sent = Sent(sum_AD, None, out.weight)
        readers = self._readers_of_atoms(t, head)
        atom_AD, tables = project(atom_AD, sent, [(reader.weight, reader.bias) for reader in readers])
        projected.update(zip(readers, tables, strict=True))
        return atom_AD

    def _update_bonds(
        self,
        t: int,
        bonds: BondFeatures,
        sent: Sent | None,
        graph: Graph,
        projected: Projected,
        head: Head | None,
    ) -> BondFeatures:
        """Return the bond features after t convolutions, projected for all who read those."""
        if sent is not None and self.config.output_bias:
            bonds = bonds.biased(self.bond_convs[t - 1].out.bias)
        readers = self._readers_of_short_bonds(t)
        ends = Ends(graph.bond_short, graph.short_by_bond.segment, len(readers))
        of_all = self._readers_of_all_bonds(t, head)
        readers += [reader.bond for reader in of_all]
        short_BD, tables = project(bonds.short_BD, sent, [(reader.weight, None) for reader in readers], ends)
        projected.update(zip(readers, tables, strict=True))
        for reader in of_all:
            projected[reader] = bonds.shifted(projected[reader], reader.bond.weight)
        return bonds._replace(short_BD=short_BD)

    def _bond_has_angle(self, batch: Batch) -> Tensor:
        """One where the bond's system has an angle, [U, 1]; only an output bias asks for it."""
        has_angle = batch.volume.new_zeros(batch.n_systems, dtype=self.magmom.weight.dtype)
        has_angle[batch.atom_system[batch.angle_center]] = 1
        return has_angle[batch.bond_system][:, None]


def _at(layers: Any, block: int) -> list[Any]:
    """The layer of a block, if it has one."""
    return [layers[block]] if 0 <= block < len(layers) else []
