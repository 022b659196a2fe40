"""What a training step on two small crystals takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from crystals import crystals, potential

from fastchgnet.config import ModelConfig
from fastchgnet.graph import Batch, Labels
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.potential import Potential


class StepCase(NamedTuple):
    """A potential in training and the crystals of its step."""

    potential: Potential
    batch: Batch
    labels: Labels


def step_case(readout: str) -> StepCase:
    """Make the step."""
    config = ModelConfig(readout=readout, atom_cutoff=4.0, bond_cutoff=2.9)
    trained = potential(config, torch.float32).train()
    batch = trained.build_graph(systems_from_atoms(crystals()[:2]))
    generator = torch.Generator().manual_seed(1)
    n_systems, n_atoms = batch.n_systems, len(batch.atomic_number)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    labels = Labels(
        -5.0 * batch.n_atoms.double() + random(n_systems).double(),
        random(n_atoms, 3),
        0.01 * random(n_systems, 3, 3),
        random(n_atoms),
    )
    return StepCase(trained, batch, labels)
