"""A training step on two small crystals, for comparing its bodies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from crystals import crystals, potential
from torch import Tensor

from fastchgnet.config import ModelConfig
from fastchgnet.graph import Batch, Labels
from fastchgnet.loss import tally, total_loss
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.potential import Potential


class StepCase(NamedTuple):
    """A potential in training and the crystals of its step."""

    potential: Potential
    batch: Batch
    labels: Labels

    def gradients(self) -> list[Tensor]:
        """Gradients of the loss by all parameters."""
        found = tally(self.potential(self.batch), self.labels, self.batch)
        loss = total_loss(found.huber, found.count, (2.0, 1.5, 0.1, 0.1))
        return list(torch.autograd.grad(loss, list(self.potential.parameters()), materialize_grads=True))


def step_case(readout: str, dtype: torch.dtype = torch.float32) -> StepCase:
    """Make the step, the same in every process."""
    # few neighbours: an interpreter takes its time
    config = ModelConfig(readout=readout, atom_cutoff=4.0, bond_cutoff=2.9)
    trained = potential(config, dtype).train()
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
