"""Batches of static shape: fillers are appended that contribute exactly nothing to the crystals before them.

A CUDA graph replays fixed addresses and lengths. So a batch is padded to a `Capacity` with filler systems of
ghost atoms. Every ghost bond joins a ghost atom to its own image `GHOST_LENGTH` away: beyond every cutoff, so
that all its weights are exactly zero. Every ghost angle lies between a ghost edge and itself. Labels of
fillers are missing. Ghosts are ordinary rows otherwise, and every index and its transpose stays what its
contract says; short bonds come first, so that ghost short bonds lie between the short and the long ones.

    rows of     real, then ghost
    systems     fillers hold one ghost atom each, the last of them the rest
    bonds       short, ghost short, long, ghost long
    edges       two for each ghost bond in turn, spread evenly over the ghost atoms: no segment gets long
    angles      spread evenly over the ghost short edges

Counts are tensors, so that a graph built on a device is padded there and the host knows nothing of it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from fastchgnet.graph import Batch, Labels

GHOST_LENGTH = 100.0
"""Length of ghost bonds, A; `ModelConfig` bounds the cutoff to 20 A."""

GHOST_ATOM = 1
"""Their atomic number."""


class Capacity(NamedTuple):
    """Rows that a padded batch has, ghosts included."""

    systems: int
    atoms: int
    short_bonds: int
    long_bonds: int
    angles: int

    @property
    def bonds(self) -> int:
        """Bonds, short and long."""
        return self.short_bonds + self.long_bonds

    def holds(self, rows: Capacity) -> bool:
        """Tell whether so many real rows fit beside a filler system of at least one atom and short bond."""
        spare = [mine - theirs for mine, theirs in zip(self, rows, strict=True)]
        return min(spare) >= 0 and spare[0] >= 1 and spare[1] >= spare[0] and spare[2] >= 1


class Counts(NamedTuple):
    """Real rows of a batch, int64 scalars on its device."""

    systems: Tensor
    atoms: Tensor
    short_bonds: Tensor
    long_bonds: Tensor
    angles: Tensor


def rows_of(batch: Batch) -> Capacity:
    """Count the rows of a batch."""
    return Capacity(
        systems=batch.n_systems,
        atoms=len(batch.atomic_number),
        short_bonds=batch.n_short_bonds,
        long_bonds=len(batch.bond_center) - batch.n_short_bonds,
        angles=len(batch.angle_center),
    )


def pad(batch: Batch, capacity: Capacity) -> Batch:
    """Append fillers up to `capacity`; raise ValueError where the batch does not fit."""
    rows = rows_of(batch)
    if not capacity.holds(rows):
        raise ValueError(f"a batch of {rows} does not fit {capacity}")
    n_spare = capacity.short_bonds - rows.short_bonds
    wide = {}
    for name, length in field_lengths(capacity).items():
        real = getattr(batch, name)
        if name.startswith("bond_") and name != "bond_short":
            short, long = real[: rows.short_bonds], real[rows.short_bonds :]
            real = torch.cat([short, _rows(real, n_spare), long])
        wide[name] = _extend(real, length)
    wide["edge_bond"] = wide["edge_bond"] + n_spare * (wide["edge_bond"] >= rows.short_bonds)
    counts = Counts(*(torch.full((), n, device=batch.cell.device) for n in rows))
    return fill(Batch(**wide), counts, capacity)


def field_lengths(capacity: Capacity) -> dict[str, int]:
    """Rows of every field of a batch."""
    systems, atoms, short, _, angles = capacity
    special = {"system_start": systems + 1, "atom_edge": atoms + 1, "atom_angle": atoms + 1}
    special |= {"cell": systems, "volume": systems, "n_atoms": systems}
    special |= {"short_angle": 2 * short + 1, "bond_short": short, "none_start": atoms + 1}
    special |= dict.fromkeys(("pair_start", "own_start"), capacity.bonds + 1)
    kinds = {"bond": capacity.bonds, "edge": 2 * capacity.bonds, "short": 2 * short}
    kinds |= {"atomic": atoms, "atom": atoms, "angle": angles}
    names = [field.name for field in dataclasses.fields(Batch)]
    return {name: special.get(name, kinds.get(name.split("_")[0], 0)) for name in names}


def pad_labels(labels: Labels, capacity: Capacity) -> Labels:
    """Append missing labels for the fillers."""
    return Labels(
        energy=_extend(labels.energy, capacity.systems, torch.nan),
        forces=_extend(labels.forces, capacity.atoms, torch.nan),
        stress=_extend(labels.stress, capacity.systems, torch.nan),
        magmoms=_extend(labels.magmoms, capacity.atoms, torch.nan),
    )


def _rows(like: Tensor, n_rows: int, value: float = 0) -> Tensor:
    return like.new_full((n_rows, *like.shape[1:]), value)


def _extend(real: Tensor, length: int, value: float = 0) -> Tensor:
    return torch.cat([real, _rows(real, length - len(real), value)])


def fill(batch: Batch, real: Counts, capacity: Capacity) -> Batch:
    """Write the fillers into a batch that has the shapes of `capacity` and anything in the spare rows.

    Args:
        batch: real rows, in the places the module's docstring gives them.
        real: how many there are; they leave room as `Capacity.holds` asks.
        capacity: the rows of the batch.
    """
    ghosts = _Ghosts(real, capacity)
    return Batch(
        **ghosts.systems_and_atoms(batch),
        **ghosts.bonds(batch),
        **ghosts.edges(batch),
        **ghosts.short_edges(batch),
        **ghosts.angles(batch),
        **ghosts.pointers(batch),
    )


class _Ghosts:
    """The rows of the fillers: which are they, and what is in them."""

    def __init__(self, real: Counts, capacity: Capacity) -> None:
        self.real, self.capacity = real, capacity
        self.n_atoms, self.n_short, self.n_long, self.n_angles = (
            most - some for most, some in zip(capacity[1:], real[1:], strict=True)
        )
        self.n_bonds = self.n_short + self.n_long
        self.first_edge = 2 * (real.short_bonds + real.long_bonds)
        self.first_short_edge = 2 * real.short_bonds

    def _rows(self, length: int, first: Tensor) -> Tensor:
        """Number all rows so that the first ghost is 0; real rows are negative."""
        return torch.arange(length, device=first.device) - first

    def atom_of(self, bond: Tensor) -> Tensor:
        """The ghost atom of a ghost bond: they are spread evenly."""
        return bond * self.n_atoms // self.n_bonds

    def bonds_before(self, atom: Tensor) -> Tensor:
        """How many ghost bonds belong to ghost atoms before this one."""
        return _ceil(atom * self.n_bonds, self.n_atoms)

    def systems_and_atoms(self, batch: Batch) -> dict[str, Tensor]:
        """Fillers without periodicity, and hydrogen atoms that belong to them."""
        last = self.capacity.systems - 1
        system = self._rows(self.capacity.systems, self.real.systems)
        atom = self._rows(self.capacity.atoms, self.real.atoms)
        fence = self._rows(self.capacity.systems + 1, self.real.systems)
        first = (self.real.atoms + fence).where(fence + self.real.systems <= last, self.capacity.atoms)
        cube = GHOST_LENGTH * torch.eye(3, dtype=batch.cell.dtype, device=batch.cell.device)
        start = torch.where(fence < 0, batch.system_start, first)
        return {
            "atomic_number": batch.atomic_number.where(atom < 0, GHOST_ATOM),
            "atom_system": batch.atom_system.where(atom < 0, (self.real.systems + atom).clamp(max=last)),
            "system_start": start,
            "n_atoms": start.diff(),
            "cell": batch.cell.where((system < 0)[:, None, None], cube),
            "volume": batch.volume.where(system < 0, torch.nan),
        }

    def bonds(self, batch: Batch) -> dict[str, Tensor]:
        """Bonds of ghost atoms with their own images."""
        row = self._rows(self.capacity.bonds, self.real.short_bonds)
        is_short = row + self.real.short_bonds < self.capacity.short_bonds
        number = row.where(is_short, row - self.real.long_bonds)
        is_ghost = torch.where(is_short, row >= 0, number >= self.n_short)
        atom = self.real.atoms + self.atom_of(number)
        edge = self.first_edge + 2 * number
        along = torch.zeros_like(batch.bond_image[:1])
        along[:, 0] = 1
        return {
            "bond_vector": torch.where(is_ghost[:, None], GHOST_LENGTH * along, batch.bond_vector),
            "bond_image": torch.where(is_ghost[:, None], along, batch.bond_image),
            "bond_center": torch.where(is_ghost, atom, batch.bond_center),
            "bond_neighbor": torch.where(is_ghost, atom, batch.bond_neighbor),
            "bond_edge": torch.where(
                is_ghost[:, None], torch.stack([edge, edge + 1], dim=1), batch.bond_edge
            ),
        }

    def edges(self, batch: Batch) -> dict[str, Tensor]:
        """Two edges of every ghost bond, one behind the other."""
        row = self._rows(2 * self.capacity.bonds, self.first_edge)
        is_ghost, number = row >= 0, row // 2
        atom = self.real.atoms + self.atom_of(number)
        # behind the real short bonds, or behind the real long ones
        bond = number + self.real.short_bonds + self.real.long_bonds * (number >= self.n_short)
        return {
            "edge_center": torch.where(is_ghost, atom, batch.edge_center),
            "edge_neighbor": torch.where(is_ghost, atom, batch.edge_neighbor),
            "edge_bond": torch.where(is_ghost, bond, batch.edge_bond),
            "edge_sign": torch.where(is_ghost, _sign(row), batch.edge_sign),
            "edge_reverse": torch.where(is_ghost, self.first_edge + (row ^ 1), batch.edge_reverse),
        }

    def short_edges(self, batch: Batch) -> dict[str, Tensor]:
        """The edges among them whose bond counts as short."""
        row = self._rows(2 * self.capacity.short_bonds, self.first_short_edge)
        is_ghost = row >= 0
        bond = self._rows(self.capacity.short_bonds, self.real.short_bonds)
        edge = self.first_short_edge + 2 * bond
        return {
            "short_bond": torch.where(is_ghost, self.real.short_bonds + row // 2, batch.short_bond),
            "short_sign": torch.where(is_ghost, _sign(row), batch.short_sign),
            "bond_short": torch.where(
                (bond >= 0)[:, None], torch.stack([edge, edge + 1], dim=1), batch.bond_short
            ),
        }

    def angles(self, batch: Batch) -> dict[str, Tensor]:
        """Angles of ghost short edges with themselves, each its own reverse."""
        row = self._rows(self.capacity.angles, self.real.angles)
        is_ghost = row >= 0
        edge = row * (2 * self.n_short) // self.n_angles.clamp(min=1)
        center = self.real.atoms + self.atom_of(edge // 2)
        edge = self.first_short_edge + edge
        return {
            "angle_center": torch.where(is_ghost, center, batch.angle_center),
            "angle_i": torch.where(is_ghost, edge, batch.angle_i),
            "angle_j": torch.where(is_ghost, edge, batch.angle_j),
            "angle_reverse": torch.where(is_ghost, self.real.angles + row, batch.angle_reverse),
        }

    def pointers(self, batch: Batch) -> dict[str, Tensor]:
        """First edges and angles of ghost atoms, first angles of ghost short edges, and constants."""
        atom = self._rows(self.capacity.atoms + 1, self.real.atoms)
        edge = self._rows(2 * self.capacity.short_bonds + 1, self.first_short_edge)
        edges = 2 * self.bonds_before(atom)
        return {
            "pair_start": torch.arange(0, 2 * self.capacity.bonds + 1, 2, device=atom.device),
            "own_start": torch.arange(self.capacity.bonds + 1, device=atom.device),
            "none_start": torch.zeros_like(atom),
            "atom_edge": torch.where(atom < 0, batch.atom_edge, self.first_edge + edges),
            "atom_angle": torch.where(
                atom < 0, batch.atom_angle, self._first_angle(edges.minimum(2 * self.n_short))
            ),
            "short_angle": torch.where(edge < 0, batch.short_angle, self._first_angle(edge)),
        }

    def _first_angle(self, short_edge: Tensor) -> Tensor:
        return self.real.angles + _ceil(short_edge * self.n_angles, 2 * self.n_short)


def _ceil(numerator: Tensor, denominator: Tensor) -> Tensor:
    return (numerator + denominator - 1) // denominator


def _sign(row: Tensor) -> Tensor:
    """Plus for even rows, minus for odd ones."""
    return (1 - 2 * (row % 2)).to(torch.int8)
