"""Training and inference on another device, without one: PyTorch's meta device has shapes but no values.

An operation that mixes devices fails there, and so does one that makes the host wait for a value.
"""

from __future__ import annotations

import copy

import pytest
import torch
from crystals import CONSERVATIVE, OLD, PAIR, PAPER, SMOOTH, crystals, potential

from fastchgnet.config import LossConfig, ModelConfig
from fastchgnet.graph import Labels
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.padding import Capacity, pad, pad_labels, rows_of
from fastchgnet.train.optim import Optimizer
from fastchgnet.train.source import Made
from fastchgnet.train.step import Inputs, Step


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [CONSERVATIVE, PAIR, PAPER, SMOOTH, OLD])
def test_a_step_stays_on_its_device(config: ModelConfig, padded: bool) -> None:
    model = potential(config, torch.float32).to("meta").train()
    average = copy.deepcopy(model).eval()
    step = Step(model, Optimizer(model.in_order(), average.in_order(), clip_norm=1.0), LossConfig())
    batch = model.build_graph(systems_from_atoms(crystals()))
    n_systems, n_atoms = batch.n_systems, len(batch.atomic_number)
    labels = Labels(
        torch.zeros(n_systems, dtype=torch.float64),
        torch.zeros(n_atoms, 3),
        torch.zeros(n_systems, 3, 3),
        torch.zeros(n_atoms),
    ).to("meta")
    if padded:
        capacity = Capacity(*(n + 3 for n in rows_of(batch)))
        batch, labels = pad(batch, capacity), pad_labels(labels, capacity)
    made = Made(batch, labels, torch.ones((), dtype=torch.bool, device="meta"))
    inputs = Inputs(*(torch.zeros(shape, dtype=torch.float64, device="meta") for shape in ((3, 4), 3, 8)))
    health = step([made, made], inputs)
    assert {t.device.type for t in (health, step.sums.huber, *average(batch))} == {"meta"}
