"""Linear layers on the radial basis of bonds: values, first and second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import accept_all_three
from test_ops_radial_basis import arguments as radial_arguments
from torch import Tensor

from fastchgnet.ops import bond_tables as op
from fastchgnet.ops.bond_tables import MAX_LONG, Inputs, bond_tables, reference
from fastchgnet.ops.derivatives import feature_derivatives

D = 4
FIRST = 4  # inputs that have a gradient

sizes = pytest.mark.parametrize(("n_short", "n_long"), [(0, 0), (0, 4), (3, 0), (1, 1), (3, 4)])


def arguments(n_short: int, n_long: int, n_tables: int = 4, n_radial: int = 3, width: int = D) -> Inputs:
    """Return what the op takes; one layer on all bonds where there are no tables of long ones."""
    distance, frequency, cutoff, p = radial_arguments(n_short + n_long, n_radial=n_radial)
    torch.manual_seed(0)
    weight = torch.randn((2 if n_tables else 1) * width, n_radial, dtype=torch.float64)
    long_weight = torch.randn(n_tables, 2 * width, n_radial, dtype=torch.float64) if n_tables else None
    weights = (None if t is None else t.requires_grad_() for t in (weight, long_weight))
    return Inputs(distance, frequency, *weights, cutoff, p, n_short)


def derivatives(tables: tuple[Tensor, ...], given: Inputs, used: Sequence[int]) -> list[Tensor]:
    """Return the tables and both derivatives of a function of some of them, none of these linear."""
    torch.manual_seed(1)
    grads = [torch.randn_like(tables[k]).requires_grad_() for k in used]
    with feature_derivatives():
        (first,) = torch.autograd.grad(
            [tables[k] for k in used], given.distance, grads, create_graph=True, materialize_grads=True
        )
    loss = first.square().sum() + sum((k + 2) * tables[k].square().sum() for k in used)
    leaves = [t for t in given[:FIRST] if t is not None]
    found = torch.autograd.grad(loss, [*grads, *leaves], materialize_grads=True)
    return [*tables, first, *found]


@sizes
@pytest.mark.parametrize("used", [range(6), range(2, 4), [0], [1], [0, 5]], ids=str)
def test_all_derivatives_are_those_of_the_reference(n_short: int, n_long: int, used: Sequence[int]) -> None:
    given = arguments(n_short, n_long)
    found, expected = (derivatives(call(*given), given, used) for call in (bond_tables, reference))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n_tables", [0, 1, MAX_LONG])
def test_as_many_tables_as_are_wanted(n_tables: int) -> None:
    given = arguments(3, 4, n_tables)
    used = range(2 + n_tables if n_tables else 1)
    found, expected = (derivatives(call(*given), given, used) for call in (bond_tables, reference))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="at most 5"):
        bond_tables(*arguments(3, 4, MAX_LONG + 1))


def test_tables_stand_alone() -> None:
    tables = bond_tables(*arguments(3, 4))
    assert all(table.is_contiguous() for table in tables)
    assert len({table.untyped_storage().data_ptr() for table in tables}) == len(tables)


def test_gradcheck() -> None:
    given = arguments(2, 1, n_tables=2)
    tables = bond_tables(*given)

    def values(*leaves: Tensor) -> tuple[Tensor, ...]:
        return bond_tables(*leaves, *given[FIRST:])

    def first(*given_here: Tensor) -> Tensor:
        leaves, grads = given_here[:FIRST], given_here[FIRST:]
        with feature_derivatives():
            return torch.autograd.grad(values(*leaves), leaves[0], grads, create_graph=True)[0]

    assert torch.autograd.gradcheck(values, given[:FIRST])
    grads = [torch.randn_like(table).requires_grad_() for table in tables]
    assert torch.autograd.gradcheck(first, (*given[:FIRST], *grads))


@sizes
@pytest.mark.parametrize("n_tables", [0, 4])
def test_the_library_accepts_all_three_ops(n_short: int, n_long: int, n_tables: int) -> None:
    given = arguments(n_short, n_long, n_tables)
    grads: list[Any] = [torch.randn_like(table) for table in reference(*given)]
    grads += [None] * (2 + MAX_LONG - len(grads))
    for some in (grads, [None, *grads[1:3], None, *grads[4:]]) if n_tables else (grads,):
        accept_all_three(op._family, given, some)
