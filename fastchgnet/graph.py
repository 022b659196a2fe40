"""The tensors that flow through the house: raw systems, graph batches, labels and outputs.

Shapes: S systems, A atoms, U bonds (undirected), B short bonds, E = 2U edges (directed), T angles.
The vector of a bond is r_ij = r_j + image @ cell - r_i, with i its `center` and j its `neighbor`; its
reverse edge has the opposite sign. Bonds are ordered so that the short ones come first: `bond[:B]`.
"""

from __future__ import annotations

import dataclasses
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


@dataclass(frozen=True, slots=True)
class Batch(_Tensors):
    """Graph of S crystals, concatenated: what the model reads."""

    atomic_number: Tensor  # [A]
    atom_system: Tensor  # [A] the system of each atom, ascending
    n_atoms: Tensor  # [S] int64
    cell: Tensor  # [S, 3, 3] float64
    volume: Tensor  # [S] float64, |det cell|, A^3; NaN unless periodic in three directions
    bond_vector: Tensor  # [U, 3] float64, short bonds first
    bond_image: Tensor  # [U, 3] int64
    bond_center: Tensor  # [U]
    bond_neighbor: Tensor  # [U]
    edge_center: Tensor  # [E] ascending
    edge_neighbor: Tensor  # [E]
    edge_bond: Tensor  # [E]
    angle_center: Tensor  # [T] ascending
    angle_bond_i: Tensor  # [T] < B; the bond that receives the message
    angle_bond_j: Tensor  # [T] < B
    angle_sign: Tensor  # [T] +-1: cos(angle) = sign * <r_i, r_j> / |r_i||r_j|
    n_short_bonds: int

    @property
    def n_systems(self) -> int:
        """Number of crystals."""
        return self.cell.shape[0]

    @property
    def bond_system(self) -> Tensor:
        """The system of each bond, [U]."""
        return self.atom_system[self.bond_center]


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
