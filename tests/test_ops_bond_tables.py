"""Linear layers on the basis of bonds: values, first and second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import accept_all_three
from torch import Tensor

from fastchgnet.ops import bond_tables as op
from fastchgnet.ops.bond_tables import N_LONG, bond_tables, reference
from fastchgnet.ops.derivatives import feature_derivatives

N_TABLES = 2 + N_LONG

sizes = pytest.mark.parametrize(("n_short", "n_long"), [(0, 0), (0, 4), (3, 0), (1, 1), (3, 4)])


def arguments(n_short: int, n_long: int) -> tuple[Tensor, Tensor, Tensor, int]:
    torch.manual_seed(0)
    shapes = ((n_short + n_long, 3), (2 * 4, 3), (N_LONG * 2, 3))
    tensors = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    return *tensors, n_short


def derivatives(tables: tuple[Tensor, ...], given: Sequence[Any], used: Sequence[int]) -> list[Tensor]:
    """Return the tables and both derivatives of a function of some of them, none of these linear."""
    torch.manual_seed(1)
    grads = [torch.randn_like(tables[k]).requires_grad_() for k in used]
    with feature_derivatives():
        (first,) = torch.autograd.grad([tables[k] for k in used], given[0], grads, create_graph=True)
    loss = first.square().sum() + sum((k + 2) * tables[k].square().sum() for k in used)
    found = torch.autograd.grad(loss, [*grads, *given[:3]], materialize_grads=True)
    return [*tables, first, *found]


@sizes
@pytest.mark.parametrize("used", [range(N_TABLES), range(2, 4), [0], [1], [0, 5]], ids=str)
def test_all_derivatives_are_those_of_the_reference(n_short: int, n_long: int, used: Sequence[int]) -> None:
    given = arguments(n_short, n_long)
    found, expected = (derivatives(call(*given), given, used) for call in (bond_tables, reference))
    torch.testing.assert_close(found, expected)


def test_tables_stand_alone() -> None:
    tables = bond_tables(*arguments(3, 4))
    assert all(table.is_contiguous() for table in tables)
    assert len({table.untyped_storage().data_ptr() for table in tables}) == N_TABLES


def test_gradcheck() -> None:
    basis, weight, long_weight, n_short = arguments(2, 1)
    tables = bond_tables(basis, weight, long_weight, n_short)

    def values(*given: Tensor) -> tuple[Tensor, ...]:
        return bond_tables(*given, n_short)

    def first(weight: Tensor, long_weight: Tensor, *grads: Tensor) -> Tensor:
        found = bond_tables(basis, weight, long_weight, n_short)
        with feature_derivatives():
            return torch.autograd.grad(found, basis, grads, create_graph=True)[0]

    assert torch.autograd.gradcheck(values, (basis, weight, long_weight))
    grads = [torch.randn_like(table).requires_grad_() for table in tables]
    # it does not depend on the basis itself
    assert torch.autograd.gradcheck(first, (weight, long_weight, *grads))


@sizes
def test_the_library_accepts_all_three_ops(n_short: int, n_long: int) -> None:
    given = arguments(n_short, n_long)
    grads = [torch.randn_like(table) for table in reference(*given)]
    for some in (grads, [None, grads[1], None, *grads[3:]]):
        accept_all_three(op._family, given, some)
