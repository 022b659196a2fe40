"""Magnetic moments: values and their only derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastchgnet.ops import magmom as op
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.magmom import magmoms, reference


def arguments(n: int, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n)
    shapes = (n, width), (1, width), (1,)
    features, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    return features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("n", [0, 1, 9])
def test_values_and_gradients(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(n)
    layer = nn.Linear(5, 1).double()
    layer.weight.data, layer.bias.data = given[1].data, given[2].data

    def found(y: Tensor, leaves: Any) -> list[Tensor]:
        torch.manual_seed(1)
        return [y, *torch.autograd.grad(y, leaves, torch.randn_like(y))]

    leaves = given[0], layer.weight, layer.bias
    plain = found(magmoms(given[0], layer), leaves)
    monkeypatch.setattr(runtime, "serves", lambda _: True)
    torch.testing.assert_close(found(magmoms(given[0], layer), leaves), plain)
    assert (plain[0] >= 0).all()
    torch.testing.assert_close(found(reference(*given), given), plain)


def test_gradcheck_and_the_library() -> None:
    given = arguments(4)
    assert torch.autograd.gradcheck(op._magmoms, given)
    torch.library.opcheck(op._magmoms, given)
    plain = [t.detach() for t in given]
    torch.library.opcheck(op._magmoms_backward, (torch.randn(4).double(), *plain))


def test_no_second_derivative() -> None:
    features, weight, bias = arguments(4)
    (first,) = torch.autograd.grad(op._magmoms(features, weight, bias).sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError):
        first.sum().backward()
