"""Edges, bonds and angles against brute force and against the published converter."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111
from ase.io import iread, read
from conftest import shared_data
from crystals import benzene, check_indices, crystals

from fastchgnet.errors import InputError
from fastchgnet.graph import Batch
from fastchgnet.neighbors import build_graph, graph_sizes, systems_from_atoms

NEAR_CUTOFF = 1e-6  # A; such pairs contribute zero and may be counted either way


def graph_of(atoms: Atoms, atom_cutoff: float = 6.0, bond_cutoff: float = 3.0) -> Batch:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="some atoms have no neighbour")
        return build_graph(systems_from_atoms([atoms]), atom_cutoff, bond_cutoff)


def canonical(i: int, j: int, image: tuple[int, ...]) -> tuple[tuple, int]:
    """Name an undirected bond, and the direction of this edge along it."""
    forward, backward = (i, j, *image), (j, i, *(-x for x in image))
    return (forward, 1) if forward <= backward else (backward, -1)


def our_sets(atoms: Atoms) -> tuple[Counter, Counter]:
    """Undirected bonds and oriented angles of our graph, as multisets of names."""
    graph = graph_of(atoms)
    names = [
        canonical(int(i), int(j), tuple(map(int, image)))
        for i, j, image in zip(graph.bond_center, graph.bond_neighbor, graph.bond_image.numpy(), strict=True)
    ]
    angles = Counter(
        (center, names[i][0], names[j][0], sign * names[i][1] * names[j][1])
        for center, i, j, sign in zip(
            graph.angle_center.tolist(),
            graph.short_bond[graph.angle_i].tolist(),
            graph.short_bond[graph.angle_j].tolist(),
            (graph.short_sign[graph.angle_i] * graph.short_sign[graph.angle_j]).tolist(),
            strict=True,
        )
    )
    return Counter(name for name, _ in names), angles


def brute_force(atoms: Atoms) -> tuple[Counter, Counter]:
    """The same two sets by trying all images up to a safe distance."""
    cell, pbc = atoms.cell.array, atoms.pbc
    heights = [0.0] * 3
    if pbc.any():
        full = atoms.cell.complete().array
        heights = [
            abs(np.linalg.det(full)) / np.linalg.norm(np.cross(full[k - 2], full[k - 1])) for k in range(3)
        ]
    frac_span = np.zeros(3)
    if pbc.any():
        frac = np.linalg.solve(atoms.cell.complete().array.T, atoms.positions.T).T
        frac_span = np.ceil(np.ptp(frac, axis=0))
    reach = [int(np.ceil(6.0 / heights[k]) + frac_span[k]) if pbc[k] else 0 for k in range(3)]
    edges, short = Counter(), {}
    for i, j in itertools.product(range(len(atoms)), repeat=2):
        for image in itertools.product(*(range(-r, r + 1) for r in reach)):
            vector = atoms.positions[j] + np.array(image) @ cell - atoms.positions[i]
            distance = np.linalg.norm(vector)
            if 1e-9 < distance < 6.0:
                name, sign = canonical(i, j, image)
                edges[name] += 1
                if distance < 3.0:
                    short.setdefault(i, []).append((name, sign))
    angles = Counter(
        (center, a[0], b[0], a[1] * b[1])
        for center, found in short.items()
        for a, b in itertools.permutations(found, 2)
    )
    assert set(edges.values()) <= {2}
    return Counter(edges.keys()), angles


SKEWED = Atoms(
    "LiF", positions=[[0, 0, 0], [1.9, 0.3, 0.2]], cell=[[3, 0, 0], [7.5, 3, 0], [-8, 9, 3.2]], pbc=True
)
OUTSIDE = Atoms("NaCl", positions=[[14.1, -9.3, 3.0], [-20.0, 2.5, 31.0]], cell=[4, 4.2, 3.9], pbc=True)
ODD = {
    "one atom": bulk("Po", "sc", a=3.1),
    "tiny cell": bulk("Cu", "fcc", a=2.6),
    "skewed": SKEWED,
    "outside the cell": OUTSIDE,
    "slab, periodic in two": fcc111("Al", (1, 1, 3), vacuum=8.0),
    "chain, periodic in one": Atoms(
        "C2", positions=[[0, 0, 0], [1.3, 0, 0]], cell=[2.6, 0, 0], pbc=[1, 0, 0]
    ),
    "molecule": benzene(),
    "no angles": Atoms("H2", positions=[[0, 0, 0], [0.8, 0, 0]], cell=[20, 20, 20], pbc=True),
    "no bonds": Atoms("Cs", cell=[20, 20, 20], pbc=True),
    "two lone atoms": Atoms("CsXe", positions=[[0, 0, 0], [0, 0, 9]]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_cells_match_brute_force(name: str) -> None:
    assert our_sets(ODD[name]) == brute_force(ODD[name])


def test_rattled_crystals_match_brute_force() -> None:
    for atoms in crystals():
        assert our_sets(atoms) == brute_force(atoms)


def reference_sets(atoms: Atoms) -> tuple[Counter, Counter]:
    """The two sets of the published converter."""
    from chgnet.graph import CrystalGraphConverter
    from pymatgen.io.ase import AseAtomsAdaptor

    converter = CrystalGraphConverter(atom_graph_cutoff=6, bond_graph_cutoff=3, on_isolated_atoms="ignore")
    graph = converter(AseAtomsAdaptor.get_structure(atoms))
    images = graph.neighbor_image.numpy().astype(int)
    names = [
        canonical(i, j, tuple(map(int, image)))
        for (i, j), image in zip(graph.atom_graph.reshape(-1, 2).tolist(), images, strict=True)
    ]
    undirected = Counter(names[first][0] for first in graph.undirected2directed.tolist())
    angles = Counter(
        (center, names[i][0], names[j][0], names[i][1] * names[j][1])
        for center, _, i, _, j in graph.bond_graph.reshape(-1, 5).tolist()
    )
    return undirected, angles


def near_cutoff(atoms: Atoms) -> set[tuple]:
    """Bonds so close to a cutoff that either count is right."""
    graph = graph_of(atoms, 6.0 + 2 * NEAR_CUTOFF)
    distance = graph.bond_vector.norm(dim=1)
    near = ((distance - 6).abs() < NEAR_CUTOFF) | ((distance - 3).abs() < NEAR_CUTOFF)
    return {
        canonical(
            int(graph.bond_center[u]), int(graph.bond_neighbor[u]), tuple(graph.bond_image[u].tolist())
        )[0]
        for u in near.nonzero()[:, 0].tolist()
    }


def assert_equal_to_reference(atoms: Atoms) -> None:
    """Compare with the published converter, but for bonds at a cutoff."""
    either = near_cutoff(atoms)
    for ours, theirs in zip(our_sets(atoms), reference_sets(atoms), strict=True):
        difference = (ours - theirs) + (theirs - ours)
        assert all(
            either & {part for part in (name, *name) if isinstance(part, tuple)} for name in difference
        )


def mptrj_like() -> Path:
    return shared_data() / "structures" / "mptrj_like_2487.xyz"


def test_sets_equal_the_published_converter_on_a_sample() -> None:
    pytest.importorskip("chgnet")
    for atoms in itertools.islice(iread(mptrj_like()), 0, 2487, 100):
        if len(atoms) < 50:
            assert_equal_to_reference(atoms)


@pytest.mark.slow
def test_sets_equal_the_published_converter_on_all_crystals() -> None:
    pytest.importorskip("chgnet")
    n_crystals = 0
    for atoms in iread(mptrj_like()):
        assert_equal_to_reference(atoms)
        n_crystals += 1
    assert n_crystals == 2487


@pytest.mark.parametrize(
    ("name", "n_bonds", "n_angles"), [("mp-18767-LiMnO2", 336, 744), ("mp-1175469-Li9Co7O16", 1780, 8376)]
)
def test_counts_of_the_papers_crystals(name: str, n_bonds: int, n_angles: int) -> None:
    """Table II of the FastCHGNet paper."""
    graph = graph_of(read(shared_data() / "structures" / f"{name}.cif"))
    assert (len(graph.bond_center), len(graph.angle_center)) == (n_bonds, n_angles)


def test_batch_contract() -> None:
    """What the model relies on: order, short bonds first, vectors, sizes."""
    atoms = crystals()
    systems = systems_from_atoms(atoms)
    batch = build_graph(systems, 6.0, 3.0)
    assert (batch.edge_center.diff() >= 0).all()
    assert (batch.angle_center.diff() >= 0).all()
    distance = batch.bond_vector.norm(dim=1)
    assert (distance[: batch.n_short_bonds] < 3).all()
    assert (distance[batch.n_short_bonds :] >= 3).all()
    assert len(batch.edge_bond) == 2 * len(batch.bond_center)
    assert (batch.edge_neighbor == batch.edge_center[batch.edge_reverse]).all()
    assert (batch.edge_bond == batch.edge_bond[batch.edge_reverse]).all()
    assert (
        batch.edge_center[batch.bond_edge] == torch.stack([batch.bond_center, batch.bond_neighbor], 1)
    ).all()
    short_vector = batch.short_sign[:, None] * batch.bond_vector[batch.short_bond]
    assert (short_vector[batch.bond_short[:, 0]] == batch.bond_vector[: batch.n_short_bonds]).all()
    assert (short_vector[batch.bond_short[:, 1]] == -batch.bond_vector[: batch.n_short_bonds]).all()
    assert (batch.angle_i != batch.angle_j).all()
    assert (batch.angle_j == batch.angle_i[batch.angle_reverse]).all()
    assert (batch.angle_i == batch.angle_j[batch.angle_reverse]).all()
    shift = torch.einsum("us,usx->ux", batch.bond_image.double(), batch.cell[batch.bond_system])
    vector = systems.position[batch.bond_neighbor] + shift - systems.position[batch.bond_center]
    torch.testing.assert_close(batch.bond_vector, vector, rtol=0, atol=1e-12)
    sizes = graph_sizes(systems, 6.0, 3.0)
    single = [graph_of(a) for a in atoms]
    expected = [
        [len(a), len(g.edge_center), g.n_short_bonds, len(g.angle_center)]
        for a, g in zip(atoms, single, strict=True)
    ]
    assert sizes.tolist() == expected
    assert sizes.sum(0).tolist() == [
        len(batch.atomic_number),
        len(batch.edge_center),
        batch.n_short_bonds,
        len(batch.angle_center),
    ]


@pytest.mark.parametrize(
    "atoms", [[], [ODD["no bonds"]], crystals()], ids=["nothing", "no bonds", "crystals"]
)
@pytest.mark.filterwarnings("ignore:some atoms have no neighbour")
def test_every_index_agrees_with_its_transpose(atoms: list[Atoms]) -> None:
    check_indices(build_graph(systems_from_atoms(atoms), 6.0, 3.0))


def test_isolated_atoms_warn_once() -> None:
    with pytest.warns(UserWarning, match="no neighbour within 6 A") as caught:
        build_graph(systems_from_atoms([ODD["two lone atoms"], ODD["no bonds"]]), 6.0, 3.0)
    assert len(caught) == 1


def test_five_thousand_atoms() -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat((9, 9, 8))
    assert len(atoms) > 5000
    per_atom = np.array(graph_sizes(systems_from_atoms([bulk("NaCl", "rocksalt", a=5.64)]), 6, 3)[0, 1:]) / 2
    graph = graph_of(atoms)
    found = [len(graph.edge_center), graph.n_short_bonds, len(graph.angle_center)]
    assert found == (per_atom * len(atoms)).tolist()


def test_pymatgen_structures_are_read() -> None:
    core = pytest.importorskip("pymatgen.core")
    structure = core.Structure(core.Lattice.cubic(4.2), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    systems = systems_from_atoms([structure])
    assert systems.atomic_number.tolist() == [12, 8]
    assert systems.pbc.all()
    structure.replace_species({"Mg": {"Mg": 0.5, "Ca": 0.5}})
    with pytest.raises(InputError, match="structure 0: partially occupied"):
        systems_from_atoms([structure])
    with pytest.raises(InputError, match="structure 1: neither"):
        systems_from_atoms([bulk("Cu"), "Cu"])
    with pytest.raises(InputError, match="structure 1: unknown element Z = 95"):
        systems_from_atoms([bulk("Cu"), bulk("Am", "fcc", a=4.9)])
