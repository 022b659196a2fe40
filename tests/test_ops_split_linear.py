"""Linear layers on the same rows: values, first and second derivatives."""

from __future__ import annotations

import pytest
import torch
from families import accept_all_three
from torch import Tensor

from fastchgnet.ops import split_linear as op
from fastchgnet.ops._register import feature_derivatives
from fastchgnet.ops.split_linear import N_TABLES, reference, split_linear


def arguments(n_rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((n_rows, 3), (N_TABLES * 2, 3))
    rows, weight = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    return rows, weight


def derivatives(tables: tuple[Tensor, ...], given: tuple[Tensor, Tensor], used: range) -> list[Tensor]:
    """Return the tables and both derivatives of a function of some of them, none of these linear."""
    torch.manual_seed(1)
    grads = [torch.randn_like(tables[k]).requires_grad_() for k in used]
    with feature_derivatives():
        (first,) = torch.autograd.grad([tables[k] for k in used], given[0], grads, create_graph=True)
    loss = first.square().sum() + sum((k + 2) * tables[k].square().sum() for k in used)
    return [*tables, first, *torch.autograd.grad(loss, [*grads, *given])]


@pytest.mark.parametrize("n_rows", [0, 1, 5])
@pytest.mark.parametrize("used", [range(N_TABLES), range(1, 3)], ids=str)
def test_all_derivatives_are_those_of_the_reference(used: range, n_rows: int) -> None:
    given = arguments(n_rows)
    found, expected = (derivatives(call(*given), given, used) for call in (split_linear, reference))
    torch.testing.assert_close(found, expected)


def test_tables_stand_alone() -> None:
    tables = split_linear(*arguments(5))
    assert all(table.is_contiguous() for table in tables)
    assert len({table.untyped_storage().data_ptr() for table in tables}) == N_TABLES


def test_gradcheck() -> None:
    rows, weight = arguments(3)
    assert torch.autograd.gradcheck(split_linear, (rows, weight))

    def first(rows: Tensor, weight: Tensor, *grads: Tensor) -> Tensor:
        with feature_derivatives():
            return torch.autograd.grad(split_linear(rows, weight), rows, grads, create_graph=True)[0]

    grads = [torch.randn(3, 2, dtype=torch.float64).requires_grad_() for _ in range(N_TABLES)]
    # it does not depend on the rows themselves
    assert torch.autograd.gradcheck(lambda *given: first(rows, *given), (weight, *grads))


def test_the_library_accepts_all_three_ops() -> None:
    given = arguments(5)
    grads = [torch.randn(5, 2, dtype=torch.float64) for _ in range(N_TABLES)]
    for some in (grads, [None, *grads[1:]]):
        accept_all_three(op._family, given, some)
