"""Tables with a tail: values, first and second derivatives."""

from __future__ import annotations

import pytest
import torch
from families import accept_all_three
from torch import Tensor

from fastchgnet.ops import tail
from fastchgnet.ops._register import feature_derivatives
from fastchgnet.ops.tail import reference, with_tail


def arguments(n_head: int, n_tail: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((n_head, 4), (n_tail, 3), (4, 3))
    head, rows, weight = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    return head, rows, weight


@pytest.mark.parametrize("sizes", [(0, 0), (0, 3), (2, 0), (2, 3)])
def test_all_derivatives_are_those_of_the_reference(sizes: tuple[int, int]) -> None:
    given = arguments(*sizes)

    def derivatives(y: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        grad = torch.randn_like(y).requires_grad_()
        with feature_derivatives():
            first = torch.autograd.grad(y, given[:2], grad, create_graph=True)
        loss = y.square().sum() + sum((k + 2) * f.square().sum() for k, f in enumerate(first))
        return (y, *first, *torch.autograd.grad(loss, [grad, *given]))

    torch.testing.assert_close(derivatives(with_tail(*given)), derivatives(reference(*given)))


@pytest.mark.parametrize("unused", [0, 1])
def test_cotangents_may_be_missing(unused: int) -> None:
    given = arguments(2, 3)

    def second(y: Tensor) -> tuple[Tensor, ...]:
        grad = torch.ones_like(y).requires_grad_()
        with feature_derivatives():
            first = torch.autograd.grad(y, given[:2], grad, create_graph=True)
        loss = first[1 - unused].square().sum()
        return torch.autograd.grad(loss, [grad, given[2]], allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(second(with_tail(*given)), second(reference(*given)))


def test_gradcheck() -> None:
    given = arguments(2, 3)
    assert torch.autograd.gradcheck(with_tail, given)


def test_the_library_accepts_all_three_ops() -> None:
    accept_all_three(tail._family, arguments(2, 3))
