"""Crystals to graphs: neighbours by vesin, everything after them vectorised over the whole batch.

The only room that knows ase and pymatgen objects. Bonds, short bonds and angles are those of chgnet's
converter; pairs at exactly a cutoff may differ and contribute zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vesin import NeighborList

from fastchgnet.errors import InputError
from fastchgnet.graph import Batch, Systems
from fastchgnet.units import MAX_ATOMIC_NUMBER

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure


def systems_from_atoms(structures: Sequence[Atoms | Structure]) -> Systems:
    """Concatenate ase Atoms or pymatgen Structures.

    Raises:
        InputError: for an object that is neither, has partially occupied sites or an unknown element.
    """
    parts = [_arrays(structure, index) for index, structure in enumerate(structures)]
    numbers, positions, cells, pbcs = zip(*parts, strict=True) if parts else ((), (), (), ())
    for index, present in enumerate(numbers):
        # in the embedding, such a number would end the whole process on a GPU
        unknown = present[(present < 1) | (present > MAX_ATOMIC_NUMBER)]
        if len(unknown):
            raise InputError(f"structure {index}: unknown element Z = {unknown[0]}")
    return Systems(
        atomic_number=torch.from_numpy(np.concatenate([*numbers, np.zeros(0, np.int64)]).astype(np.int64)),
        position=torch.from_numpy(np.concatenate([*positions, np.zeros((0, 3))])),
        cell=torch.from_numpy(np.array(cells, dtype=np.float64).reshape(-1, 3, 3)),
        pbc=torch.from_numpy(np.array(pbcs, dtype=bool).reshape(-1, 3)),
        n_atoms=tuple(len(n) for n in numbers),
    )


def _arrays(structure: Any, index: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Atomic numbers, positions, cell and periodicity of one structure."""
    if hasattr(structure, "get_atomic_numbers"):
        if not is_ordered(structure):
            raise InputError(f"structure {index}: partially occupied sites; order the structure first")
        return structure.numbers, structure.positions, structure.cell.array, structure.pbc
    if hasattr(structure, "lattice"):
        if not structure.is_ordered:
            raise InputError(f"structure {index}: partially occupied sites; order the structure first")
        numbers = np.array(structure.atomic_numbers)
        return numbers, structure.cart_coords, structure.lattice.matrix, np.array(structure.lattice.pbc)
    raise InputError(f"structure {index}: neither ase Atoms nor a pymatgen Structure: {type(structure)}")


def is_ordered(atoms: Atoms) -> bool:
    """Tell whether every site holds one whole atom; ASE keeps only the main species of a disordered CIF."""
    occupancy = atoms.info.get("occupancy")
    # other files give this name to numbers of their own
    sites = occupancy.values() if isinstance(occupancy, dict) else ()
    return all(len(species) == 1 and min(species.values()) > 1 - 1e-6 for species in sites)


class _Bonds(NamedTuple):
    """Undirected neighbour pairs of all systems, short ones first."""

    center: Tensor  # [U]
    neighbor: Tensor  # [U]
    image: Tensor  # [U, 3]
    vector: Tensor  # [U, 3]
    n_short: int


def _find_bonds(systems: Systems, atom_cutoff: float, bond_cutoff: float) -> _Bonds:
    """Find every undirected pair within the cutoff; r_ij = r_j + image @ cell - r_i."""
    search = NeighborList(cutoff=atom_cutoff, full_list=False)
    position, cell, pbc = systems.position.numpy(), systems.cell.numpy(), systems.pbc.numpy()
    ends = np.cumsum(systems.n_atoms, dtype=np.int64)
    found = [
        (start, *search.compute(position[start:end], box, periodic, quantities="PS"))
        for start, end, box, periodic in zip(np.concatenate([[0], ends]), ends, cell, pbc, strict=False)
    ]
    pairs = [p.astype(np.int64) + start for start, p, _ in found]
    pair = torch.from_numpy(np.concatenate([*pairs, np.zeros((0, 2), np.int64)]))
    image = torch.from_numpy(
        np.concatenate([*(s for _, _, s in found), np.zeros((0, 3), np.int32)]).astype(np.int64)
    )
    pairs_per_system = torch.tensor([len(p) for p in pairs], dtype=torch.int64)
    bond_cell = systems.cell.repeat_interleave(pairs_per_system, 0)
    shift = torch.einsum("us,usx->ux", image.double(), bond_cell)
    vector = systems.position[pair[:, 1]] + shift - systems.position[pair[:, 0]]
    is_short = vector.norm(dim=1) < bond_cutoff
    order = torch.cat([is_short.nonzero()[:, 0], (~is_short).nonzero()[:, 0]])
    pair = pair[order]
    return _Bonds(pair[:, 0], pair[:, 1], image[order], vector[order], int(is_short.sum()))


def build_graph(systems: Systems, atom_cutoff: float, bond_cutoff: float) -> Batch:
    """Build the graph of a batch of crystals on the CPU.

    Works for any cell and periodicity; atoms without neighbours keep the model's value for a free atom
    and cause a warning.

    Args:
        systems: S crystals, on the CPU.
        atom_cutoff: radius of edges, A.
        bond_cutoff: radius of the short bonds that form angles, A.
    """
    n_atoms = torch.tensor(systems.n_atoms, dtype=torch.int64)
    total_atoms = len(systems.atomic_number)
    bonds = _find_bonds(systems, atom_cutoff, bond_cutoff)

    both_ends = torch.cat([bonds.center, bonds.neighbor])
    edge_center, order = both_ends.sort(stable=True)
    n_bonds = len(bonds.center)
    edge_neighbor = both_ends[(order + n_bonds) % max(2 * n_bonds, 1)]
    edge_bond = order % max(n_bonds, 1)
    edge_sign = torch.where(order < n_bonds, 1, -1)
    if total_atoms and len(edge_center.unique_consecutive()) < total_atoms:
        warnings.warn(
            f"some atoms have no neighbour within {atom_cutoff:g} A: they keep the model's free-atom energy",
            stacklevel=2,
        )

    # all ordered pairs of different short edges at one centre: a dense block per atom, less its diagonal
    short = (edge_bond < bonds.n_short).nonzero()[:, 0]
    per_atom = torch.bincount(edge_center[short], minlength=total_atoms)
    block_start = per_atom.cumsum(0) - per_atom
    per_edge = per_atom[edge_center[short]]
    row = torch.arange(len(short)).repeat_interleave(per_edge)
    column = (
        torch.arange(len(row)) - (per_edge.cumsum(0) - per_edge)[row] + block_start[edge_center[short]][row]
    )
    off_diagonal = row != column
    edge_i, edge_j = short[row[off_diagonal]], short[column[off_diagonal]]

    volume = torch.linalg.det(systems.cell).abs()
    return Batch(
        atomic_number=systems.atomic_number,
        atom_system=systems.atom_system,
        n_atoms=n_atoms,
        cell=systems.cell,
        volume=volume.where(systems.pbc.all(1), torch.nan),
        bond_vector=bonds.vector,
        bond_image=bonds.image,
        bond_center=bonds.center,
        bond_neighbor=bonds.neighbor,
        edge_center=edge_center,
        edge_neighbor=edge_neighbor,
        edge_bond=edge_bond,
        angle_center=edge_center[edge_i],
        angle_bond_i=edge_bond[edge_i],
        angle_bond_j=edge_bond[edge_j],
        angle_sign=edge_sign[edge_i] * edge_sign[edge_j],
        n_short_bonds=bonds.n_short,
    )


def graph_sizes(systems: Systems, atom_cutoff: float, bond_cutoff: float) -> NDArray[np.int64]:
    """Count atoms, directed edges, short bonds and angles of each system, [S, 4], without building angles."""
    bonds = _find_bonds(systems, atom_cutoff, bond_cutoff)
    n_systems = systems.n_systems
    n_atoms = torch.tensor(systems.n_atoms, dtype=torch.int64)
    atom_system = systems.atom_system
    short = slice(None, bonds.n_short)
    edges = 2 * torch.bincount(atom_system[bonds.center], minlength=n_systems)
    short_bonds = torch.bincount(atom_system[bonds.center[short]], minlength=n_systems)
    ends = torch.cat([bonds.center[short], bonds.neighbor[short]])
    degree = torch.bincount(ends, minlength=len(atom_system))
    angles = torch.zeros(n_systems, dtype=torch.int64).index_add_(0, atom_system, degree * (degree - 1))
    return torch.stack([n_atoms, edges, short_bonds, angles], dim=1).numpy()
