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

from fastchgnet.device import own_settings
from fastchgnet.errors import InputError
from fastchgnet.graph import Batch, Systems
from fastchgnet.units import MAX_ATOMIC_NUMBER

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure


@own_settings
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


class Pairs(NamedTuple):
    """Undirected pairs of atoms that may be neighbours; r_ij = r_j + image @ cell - r_i."""

    center: Tensor  # [P]
    neighbor: Tensor  # [P]
    image: Tensor  # [P, 3]


class _Bonds(NamedTuple):
    """Undirected neighbour pairs of all systems, short ones first."""

    center: Tensor  # [U]
    neighbor: Tensor  # [U]
    image: Tensor  # [U, 3]
    vector: Tensor  # [U, 3]
    n_short: int


def find_pairs(systems: Systems, cutoff: float) -> list[Pairs]:
    """Find every undirected pair within the cutoff, for each system; atoms are numbered within it."""
    search = NeighborList(cutoff=cutoff, full_list=False)
    position, cells, pbc = systems.position.numpy(), systems.cell.numpy(), systems.pbc.numpy()
    ends = np.cumsum(systems.n_atoms, dtype=np.int64)
    pairs = []
    for start, end, box, periodic in zip(np.concatenate([[0], ends]), ends, cells, pbc, strict=False):
        atoms, image = search.compute(position[start:end], box, periodic, quantities="PS")
        center, neighbor = torch.from_numpy(atoms.astype(np.int64)).unbind(1)
        pairs.append(Pairs(center, neighbor, torch.from_numpy(image.astype(np.int64))))
    return pairs


def concatenated(pairs: Sequence[Pairs], n_atoms: Sequence[int]) -> Pairs:
    """Join the pairs of systems of so many atoms; atoms are numbered throughout."""
    if len(pairs) == 1:
        return pairs[0]
    none = torch.zeros(0, dtype=torch.int64)
    first = torch.tensor([0, *n_atoms[:-1]]).cumsum(0)[: len(pairs)]
    shift = first.repeat_interleave(torch.tensor([len(one.center) for one in pairs], dtype=torch.int64))
    return Pairs(
        torch.cat([none, *(one.center for one in pairs)]) + shift,
        torch.cat([none, *(one.neighbor for one in pairs)]) + shift,
        torch.cat([none.view(0, 3), *(one.image for one in pairs)]),
    )


def _find_bonds(systems: Systems, atom_cutoff: float, bond_cutoff: float) -> _Bonds:
    """Find every undirected pair within the cutoff."""
    # a little farther: which of the pairs at the very cutoff count is decided below, for every device alike
    pairs = concatenated(find_pairs(systems, atom_cutoff * (1 + 1e-9)), systems.n_atoms)
    cell = systems.cell[systems.atom_system[pairs.center]]
    position = systems.position
    vector = pair_vector(position[pairs.center], position[pairs.neighbor], pairs.image, cell)
    distance2 = squared_length(vector)
    return _select(pairs, vector, distance2 < atom_cutoff**2, distance2 < bond_cutoff**2)


def near_first(is_near: Tensor, is_short: Tensor) -> tuple[Tensor, int]:
    """Number the near ones of P pairs, the short ones first; and count those."""
    short = is_short.nonzero()[:, 0]
    return torch.cat([short, (is_near & ~is_short).nonzero()[:, 0]]), len(short)


def _select(pairs: Pairs, vector: Tensor, is_near: Tensor, is_short: Tensor) -> _Bonds:
    """Keep the pairs that are near, the short ones first."""
    order, n_short = near_first(is_near, is_short)
    center, neighbor, image = (values.index_select(0, order) for values in pairs)
    return _Bonds(center, neighbor, image, vector.index_select(0, order), n_short)


def pair_vector(center: Tensor, neighbor: Tensor, image: Tensor, cell: Tensor) -> Tensor:
    """r_j + image @ cell - r_i of pairs, [P, 3], from r_i, r_j, images [P, 3] and cells [P, 3, 3].

    One rounded operation after the other, so that every device finds the same bits, and the same with the
    opposite sign for the reversed pair.
    """
    a, b, c = (image[:, k, None] * cell[:, k] for k in range(3))
    return (neighbor - center) + ((a + b) + c)


def squared_length(vector: Tensor) -> Tensor:
    """Squared lengths of vectors [P, 3], as reproducible as `pair_vector`."""
    x, y, z = (vector * vector).unbind(1)
    return (x + y) + z


def cell_volume(cell: Tensor, pbc: Tensor) -> Tensor:
    """|det cell|, [S], as reproducible as `pair_vector`; NaN unless periodic in three directions."""
    a, b, c = cell.unbind(1)
    x, y, z = (a * cross(b, c)).unbind(1)
    return ((x + y) + z).abs().where(pbc.all(1), torch.nan)


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Cross products of vectors [P, 3], as reproducible as `pair_vector`."""
    return a.roll(-1, 1) * b.roll(-2, 1) - a.roll(-2, 1) * b.roll(-1, 1)


def build_graph(systems: Systems, atom_cutoff: float, bond_cutoff: float) -> Batch:
    """Build the graph of a batch of crystals on the CPU.

    Works for any cell and periodicity; atoms without neighbours keep the model's value for a free atom
    and cause a warning.

    Args:
        systems: S crystals, on the CPU.
        atom_cutoff: radius of edges, A.
        bond_cutoff: radius of the short bonds that form angles, A.
    """
    batch = _assemble(systems, _find_bonds(systems, atom_cutoff, bond_cutoff))
    warn_of_lone_atoms(batch, atom_cutoff)
    return batch


def warn_of_lone_atoms(batch: Batch, atom_cutoff: float) -> None:
    """Warn where an atom has no neighbours."""
    if len(batch.atomic_number) and not batch.atom_edge.diff().all():
        warnings.warn(
            f"some atoms have no neighbour within {atom_cutoff:g} A: they keep the model's free-atom energy",
            stacklevel=3,
        )


def graph_of_pairs(systems: Systems, pairs: Pairs, vector: Tensor, near: Tensor, short: Tensor) -> Batch:
    """Build the graph of crystals, on their device, from pairs that have been found before.

    Args:
        systems: S crystals.
        pairs: P pairs.
        vector: r_ij of each, [P, 3] float64.
        near: whether it is a bond, [P].
        short: whether it is a short one, [P].
    """
    return _assemble(systems, _select(pairs, vector, near, short))


def _assemble(systems: Systems, bonds: _Bonds) -> Batch:
    n_atoms = torch.tensor(systems.n_atoms, dtype=torch.int64, device=systems.cell.device)
    total_atoms = len(systems.atomic_number)
    edges = _edges(bonds, total_atoms)
    return Batch(
        atomic_number=systems.atomic_number,
        atom_system=systems.atom_system.to(systems.cell.device),
        n_atoms=n_atoms,
        system_start=_starts(n_atoms),
        cell=systems.cell,
        volume=cell_volume(systems.cell, systems.pbc),
        bond_vector=bonds.vector,
        bond_image=bonds.image,
        bond_center=bonds.center,
        bond_neighbor=bonds.neighbor,
        **edges,
        **_angles(edges, bonds.n_short, total_atoms),
    )


def _starts(counts: Tensor) -> Tensor:
    """Row pointers of segments with so many rows each, [n + 1]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _edges(bonds: _Bonds, n_atoms: int) -> dict[str, Tensor]:
    """Both directions of every bond, sorted by centre."""
    n_bonds = len(bonds.center)
    both_ends = torch.cat([bonds.center, bonds.neighbor])
    edge_center, end = both_ends.sort(stable=True)
    edge_of_end = torch.empty_like(end)
    edge_of_end[end] = torch.arange(2 * n_bonds, device=end.device)
    other_end = (end + n_bonds) % max(2 * n_bonds, 1)
    return {
        "bond_edge": edge_of_end.view(2, n_bonds).t().contiguous(),
        "pair_start": torch.arange(0, 2 * n_bonds + 1, 2, device=end.device),
        "own_start": torch.arange(n_bonds + 1, device=end.device),
        "none_start": end.new_zeros(n_atoms + 1),
        "edge_center": edge_center,
        "edge_neighbor": both_ends[other_end],
        "edge_bond": end % max(n_bonds, 1),
        "edge_sign": torch.where(end < n_bonds, 1, -1).to(torch.int8),
        "edge_reverse": edge_of_end[other_end],
        "atom_edge": _starts(torch.bincount(edge_center, minlength=n_atoms)),
    }


def _angles(edges: dict[str, Tensor], n_short_bonds: int, n_atoms: int) -> dict[str, Tensor]:
    """All ordered pairs of different short edges at one centre: a dense block per atom, less its diagonal."""
    is_short = edges["edge_bond"] < n_short_bonds
    edge = is_short.nonzero()[:, 0]
    center, short_bond = edges["edge_center"][edge], edges["edge_bond"][edge]
    bond_short = (is_short.cumsum(0) - 1)[edges["bond_edge"][:n_short_bonds]]
    per_atom = torch.bincount(center, minlength=n_atoms)
    # of each short edge: the first one at its centre, its own place there, and how many others there are
    first = _starts(per_atom)[center]
    row = torch.arange(len(edge), device=edge.device)
    place = row - first
    others = per_atom[center] - 1
    start = _starts(others)

    angle_i = row.repeat_interleave(others)
    place_i = place[angle_i]
    place_j = torch.arange(len(angle_i), device=edge.device) - start[angle_i]
    place_j += place_j >= place_i  # leave out the diagonal
    angle_j = first[angle_i] + place_j
    return {
        "short_bond": short_bond,
        "short_sign": edges["edge_sign"][edge],
        "bond_short": bond_short,
        "angle_center": center[angle_i],
        "angle_i": angle_i,
        "angle_j": angle_j,
        "angle_reverse": start[angle_j] + place_i - (place_i > place_j).long(),
        "short_angle": start,
        "atom_angle": _starts(per_atom * (per_atom - 1)),
    }


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
