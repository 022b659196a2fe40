"""Crystals and potentials that several tests use."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule

from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.graph import Batch, Output
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.potential import Potential

CONSERVATIVE = ModelConfig()
PAIR = ModelConfig(readout="direct")
PAPER = ModelConfig(readout="direct", heads="paper", shared_layer_norm=True)
SMOOTH = ModelConfig(angular_basis="chebyshev", interaction="parallel")
OLD = ModelConfig(
    atom_cutoff=5.0,
    n_radial=9,
    n_angular=9,
    envelope_p=5,
    norm=False,
    readout_hidden=(64, 64),
    output_bias=True,
)


def rattled(atoms: Atoms, amplitude: float = 0.1, seed: int = 0) -> Atoms:
    """Shift every atom and shear the cell a little."""
    rng = np.random.default_rng(seed)
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), scale_atoms=True)
    atoms.positions += amplitude * rng.normal(size=atoms.positions.shape)
    return atoms


def crystals() -> list[Atoms]:
    """Return some small periodic crystals of different kinds, all rattled."""
    perovskite = Atoms(
        "SrTiO3",
        scaled_positions=[(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)],
        cell=[3.9] * 3,
        pbc=True,
    )
    return [
        rattled(atoms, seed=seed)
        for seed, atoms in enumerate(
            [bulk("NaCl", "rocksalt", a=5.64), perovskite, bulk("ZnO", "wurtzite", a=3.25, c=5.2), bulk("Fe")]
        )
    ]


def potential(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Potential:
    """Return an untrained potential in evaluation mode whose heads are not silent."""
    torch.manual_seed(seed)
    references = torch.linspace(-8, -1, 94, dtype=torch.float64)
    made = Potential(config, references, Provenance(name="untrained"))
    for name, parameter in made.named_parameters():
        if name == "heads.scalars.weight":
            torch.nn.init.normal_(parameter, std=0.5)
        if name.endswith("out.bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return made.to(dtype).eval()


def run(model: Potential, *atoms: Atoms) -> Output:
    """Evaluate crystals as one batch."""
    return model(model.build_graph(systems_from_atoms(atoms)))


def check_indices(batch: Batch) -> None:
    """Check that every index of a batch agrees with its transpose."""
    names = ("by_system", "by_center", "by_neighbor", "angle_by_center", "angle_by_i", "angle_by_j")
    assert batch.own_start.tolist() == list(range(len(batch.bond_center) + 1))
    assert batch.none_start.tolist() == [0] * (len(batch.atomic_number) + 1)
    by_bond, short_by_bond = batch.by_bond
    indices = {name: getattr(batch, name) for name in names}
    for name, index in {**indices, "by_bond": by_bond, "short_by_bond": short_by_bond}.items():
        rows = torch.arange(len(index.segment)) if index.order is None else index.order
        assert rows.sort().values.tolist() == list(range(len(index.segment))), name
        expected = torch.arange(index.n_segments).repeat_interleave(index.start.diff())
        assert index.segment[rows].tolist() == expected.tolist(), name


def benzene() -> Atoms:
    """Return a molecule without any periodicity."""
    return molecule("C6H6")
