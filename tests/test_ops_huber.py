"""The op of the loss: its derivative, its registration, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from test_loss import batch, labels, output  # noqa: F401, fixtures
from torch import Tensor

from fastchgnet.graph import Batch, Labels, Output
from fastchgnet.ops import huber

Case = tuple[list[Tensor], list[Tensor]]


@pytest.fixture
def case(batch: Batch, output: Output, labels: Labels) -> Case:  # noqa: F811
    """Predictions and the rest, with some labels missing, in float64."""
    labels.energy[0], labels.forces[2], labels.magmoms[1] = torch.nan, torch.nan, torch.nan
    predicted = (output.energy, output.forces, output.stress.nan_to_num(0.3), output.magmoms - 0.5)
    known = (labels.energy, labels.forces, labels.stress, labels.magmoms)
    leaves = [p.detach().double().requires_grad_() for p in predicted]
    return leaves, [*(t.double() for t in known), batch.n_atoms, batch.volume]


@pytest.mark.parametrize("delta", [0.05, 2.0])
def test_gradient(case: Case, delta: float) -> None:
    predicted, rest = case
    assert torch.autograd.gradcheck(lambda *p: huber._huber(*p, *rest, delta)[0], predicted)


def test_registration(case: Case) -> None:
    predicted, rest = case
    torch.library.opcheck(huber._huber, (*predicted, *rest, 0.1))


def test_there_is_no_second_derivative(case: Case) -> None:
    predicted, rest = case
    sums = huber._huber(*predicted, *rest, 0.1)
    (first,) = torch.autograd.grad(sums[0].sum(), predicted[0], create_graph=True)
    with pytest.raises(NotImplementedError):
        first.sum().backward()
