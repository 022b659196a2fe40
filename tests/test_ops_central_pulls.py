"""Pulls of direct heads along bonds: values, the derivative that there is and those that there are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastchgnet.ops import central_pulls as op
from fastchgnet.ops.central_pulls import central_pulls, reference


def arguments(n: int, dtype: torch.dtype = torch.float64, width: int = 5) -> tuple[Any, ...]:
    """Draw some bonds, the first one of which is as long as the cutoff, and the second one longer."""
    torch.manual_seed(n)
    message, weight = torch.randn(n, width, dtype=dtype), torch.randn(2, width, dtype=dtype)
    vector = 2 * torch.randn(n, 3, dtype=dtype)
    vector[:2] = torch.tensor([[0, 3.0, 4.0], [0, 0, -7.0]], dtype=dtype)[:n]
    return message.requires_grad_(), weight.requires_grad_(), vector, 5.0, 8


@pytest.mark.parametrize("n", [0, 1, 9])
def test_gradients_are_those_of_the_reference(n: int) -> None:
    given = arguments(n)

    def values(function: Any) -> list[Tensor]:
        pulls, unit = function(*given)
        torch.manual_seed(1)
        return [pulls, unit, *torch.autograd.grad(pulls, given[:2], torch.randn_like(pulls))]

    found = values(central_pulls)
    torch.testing.assert_close(found, values(reference))
    assert not found[0][:2].any()


def test_gradcheck_and_the_library() -> None:
    message, weight, *others = given = arguments(6)
    assert torch.autograd.gradcheck(lambda m, w: central_pulls(m, w, *others)[0], (message, weight))
    torch.library.opcheck(op._central_pulls, given)
    plain = [t.detach() if isinstance(t, Tensor) else t for t in given]
    torch.library.opcheck(op._central_pulls_backward, (torch.randn(6, 2, 3).double(), *plain))


def test_derivatives_that_there_are_not() -> None:
    message, weight, vector, *others = arguments(6)
    pulls, _ = central_pulls(message, weight, vector, *others)
    (first,) = torch.autograd.grad(pulls.square().sum(), message, create_graph=True)
    with pytest.raises(NotImplementedError):
        first.sum().backward()
    pulls, _ = central_pulls(message, weight, vector.requires_grad_(), *others)
    with pytest.raises(NotImplementedError, match="bond vectors"):
        pulls.sum().backward()
