"""Training and inference on another device, without one: PyTorch's meta device has shapes but no values.

An operation that mixes devices fails there, and so does one that makes the host wait for a value.
"""

from __future__ import annotations

import copy

import pytest
import torch
from crystals import CONSERVATIVE, OLD, PAIR, PAPER, SMOOTH, crystals, potential

from fastchgnet.config import ModelConfig
from fastchgnet.graph import Labels
from fastchgnet.loss import empty_tally, tally, total_loss
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.train.optim import clip_gradients, update_average


@pytest.mark.parametrize("config", [CONSERVATIVE, PAIR, PAPER, SMOOTH, OLD])
def test_a_step_stays_on_its_device(config: ModelConfig) -> None:
    model = potential(config, torch.float32).to("meta").train()
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters())
    batch = model.build_graph(systems_from_atoms(crystals()))
    n_systems, n_atoms = batch.n_systems, len(batch.atomic_number)
    labels = Labels(
        torch.zeros(n_systems, dtype=torch.float64),
        torch.zeros(n_atoms, 3),
        torch.zeros(n_systems, 3, 3),
        torch.zeros(n_atoms),
    ).to("meta")
    sums = tally(model(batch), labels, batch)
    loss = total_loss(sums.huber, sums.count, (2.0, 1.5, 0.1, 0.1))
    loss.backward()
    norm = clip_gradients(model.parameters(), 1.0)
    optimizer.step()
    update_average(average, model, 0.99, step=3)
    total = empty_tally("meta") + sums.detach()
    assert {t.device.type for t in (loss + norm, total.huber, *average(batch))} == {"meta"}
