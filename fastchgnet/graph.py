"""The tensors that flow through the house: raw systems, graph batches, labels and outputs.

Shapes: S systems, A atoms, U bonds (undirected), B short bonds, E = 2U edges (directed), K = 2B short edges,
T angles. The vector of a bond is r_ij = r_j + image @ cell - r_i, with i its `center` and j its `neighbor`;
its reverse edge has the opposite sign. Bonds are ordered so that the short ones come first: `bond[:B]`.
Edges and short edges are sorted by centre, angles by their first short edge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


class _Tensors:
    """Move a dataclass of tensors as one."""

    __slots__ = ()

    def to(self, device: torch.device | str) -> Self:
        """Return a copy with every tensor on `device`."""
        # Towards the host nobody would wait, and the values could be read before they arrive.
        later = torch.device(device).type != "cpu"
        moved = {
            field.name: value.to(device, non_blocking=later) if isinstance(value, Tensor) else value
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            for value in (getattr(self, field.name),)
        }
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True)
class Systems(_Tensors):
    """Raw geometry of S crystals, concatenated."""

    atomic_number: Tensor  # [A] int64, 1..94
    position: Tensor  # [A, 3] float64, A
    cell: Tensor  # [S, 3, 3] float64, rows are the lattice vectors, A
    pbc: Tensor  # [S, 3] bool
    n_atoms: tuple[int, ...]  # atoms of each system, on the host

    @property
    def n_systems(self) -> int:
        """Number of crystals."""
        return len(self.n_atoms)

    @property
    def atom_system(self) -> Tensor:
        """The system of each atom, [A], on the host."""
        return torch.arange(self.n_systems).repeat_interleave(torch.tensor(self.n_atoms, dtype=torch.int64))

    def subset(self, indices: Sequence[int]) -> Systems:
        """Take some systems, in this order."""
        n_atoms = torch.tensor(self.n_atoms, dtype=torch.int64)
        chosen = torch.tensor(indices, dtype=torch.int64)
        count = n_atoms[chosen]
        # from the number of a row among the chosen to that among all
        shift = (n_atoms.cumsum(0) - n_atoms)[chosen] - (count.cumsum(0) - count)
        rows = (torch.arange(int(count.sum())) + shift.repeat_interleave(count)).to(self.position.device)
        chosen = chosen.to(self.cell.device)
        return Systems(
            atomic_number=self.atomic_number[rows],
            position=self.position[rows],
            cell=self.cell[chosen],
            pbc=self.pbc[chosen],
            n_atoms=tuple(count.tolist()),
        )


class Index(NamedTuple):
    """Which of n segments each of N rows belongs to, and the transpose: which rows belong to a segment.

    With the transpose at hand sums over a segment run in a fixed order and need no atomic additions.
    """

    segment: Tensor  # [N]
    start: Tensor  # [n + 1]; rows start[s] to start[s + 1] of `order` belong to segment s
    order: Tensor | None  # [N] rows sorted by segment; None where they are as they stand

    @property
    def n_segments(self) -> int:
        """Number of segments."""
        return len(self.start) - 1


@dataclass(frozen=True, slots=True)
class Batch(_Tensors):
    """Graph of S crystals, concatenated: what the model reads. Index tensors are int64."""

    atomic_number: Tensor  # [A]
    atom_system: Tensor  # [A] the system of each atom, ascending
    n_atoms: Tensor  # [S] int64
    system_start: Tensor  # [S + 1] the first atom of each system, and A
    cell: Tensor  # [S, 3, 3] float64
    volume: Tensor  # [S] float64, |det cell|, A^3; NaN unless periodic in three directions
    bond_vector: Tensor  # [U, 3] float64, short bonds first
    bond_image: Tensor  # [U, 3] int64
    bond_center: Tensor  # [U]
    bond_neighbor: Tensor  # [U]
    bond_edge: Tensor  # [U, 2] the edge from the bond's centre and the one from its neighbour
    pair_start: Tensor  # [U + 1] 0, 2, ..., 2U: where the two edges of each bond begin in `bond_edge`, flat
    own_start: Tensor  # [U + 1] 0, 1, ..., U: bonds that are segments of their own
    none_start: Tensor  # [A + 1] zeros: atoms to which no rows belong
    edge_center: Tensor  # [E] ascending
    edge_neighbor: Tensor  # [E]
    edge_bond: Tensor  # [E]
    edge_sign: Tensor  # [E] int8, +1 where the edge points along its bond, else -1
    edge_reverse: Tensor  # [E] the other edge of the same bond
    atom_edge: Tensor  # [A + 1] the first edge of each atom, and E
    short_bond: Tensor  # [K] the bond of each short edge, < B
    short_sign: Tensor  # [K] int8, as edge_sign
    bond_short: Tensor  # [B, 2] the short edges of each bond, as in bond_edge
    angle_center: Tensor  # [T] ascending
    angle_i: Tensor  # [T] ascending, < K; the short edge that receives the message
    angle_j: Tensor  # [T] < K
    angle_reverse: Tensor  # [T] the angle with i and j exchanged
    short_angle: Tensor  # [K + 1] the first angle of each short edge, and T
    atom_angle: Tensor  # [A + 1] the first angle of each atom, and T

    @property
    def n_systems(self) -> int:
        """Number of crystals."""
        return self.cell.shape[0]

    @property
    def n_short_bonds(self) -> int:
        """Number of short bonds, B."""
        return len(self.bond_short)

    @property
    def bond_system(self) -> Tensor:
        """The system of each bond, [U]."""
        return self.atom_system[self.bond_center]

    @property
    def by_system(self) -> Index:
        """Atoms by system."""
        return Index(self.atom_system, self.system_start, None)

    @property
    def by_center(self) -> Index:
        """Edges by centre."""
        return Index(self.edge_center, self.atom_edge, None)

    @property
    def by_neighbor(self) -> Index:
        """Edges by neighbour: the reverses of those by centre."""
        return Index(self.edge_neighbor, self.atom_edge, self.edge_reverse)

    @property
    def by_bond(self) -> tuple[Index, Index]:
        """Edges by bond, and short edges by short bond: two each, so that both start at the same rows."""
        short_start = self.pair_start[: self.n_short_bonds + 1]
        return (
            Index(self.edge_bond, self.pair_start, self.bond_edge.flatten()),
            Index(self.short_bond, short_start, self.bond_short.flatten()),
        )

    @property
    def angle_by_center(self) -> Index:
        """Angles by centre."""
        return Index(self.angle_center, self.atom_angle, None)

    @property
    def angle_by_i(self) -> Index:
        """Angles by their first short edge."""
        return Index(self.angle_i, self.short_angle, None)

    @property
    def angle_by_j(self) -> Index:
        """Angles by their second short edge: the reverses of those by the first."""
        return Index(self.angle_j, self.short_angle, self.angle_reverse)

    @property
    def bonds_by_ends(self) -> tuple[Index, Index, Index]:
        """Bonds by themselves, by centre and by neighbour, for a table of atoms that is read at both ends.

        The transpose of the second lists the bonds at either end and that of the third none, so that sums
        over both find each bond of an atom once.
        """
        return (
            Index(self.own_start[:-1], self.own_start, None),
            Index(self.bond_center, self.atom_edge, self.edge_bond),
            Index(self.bond_neighbor, self.none_start, self.none_start[:0]),
        )


@dataclass(frozen=True, slots=True)
class Labels(_Tensors):
    """DFT labels of S crystals; NaN means missing."""

    energy: Tensor  # [S] float64, total, eV
    forces: Tensor  # [A, 3] eV/A
    stress: Tensor  # [S, 3, 3] eV/A^3, positive = tension
    magmoms: Tensor  # [A] mu_B, signed


class Output(NamedTuple):
    """What a potential computes; the same four quantities as `Labels`, and the site energies."""

    energy: Tensor  # [S] float64, total, eV
    forces: Tensor  # [A, 3] eV/A
    stress: Tensor  # [S, 3, 3] eV/A^3; NaN unless periodic in three directions
    magmoms: Tensor  # [A] mu_B, magnitudes
    site_energies: Tensor  # [A] float64, eV
