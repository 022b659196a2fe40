"""Lengths of bonds and vectors of short edges: values, both derivatives, and bonds of no length."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from crystals import crystals
from families import accept_all_three
from torch import Tensor

from fastchgnet.neighbors import build_graph, systems_from_atoms
from fastchgnet.ops import geometry as op
from fastchgnet.ops.derivatives import feature_derivatives
from fastchgnet.ops.geometry import geometry, reference
from fastchgnet.padding import GHOST_LENGTH, Capacity, pad, rows_of

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # fp64 rounding

sizes = pytest.mark.parametrize(("n_bonds", "n_short"), [(0, 0), (1, 0), (1, 1), (7, 3), (5, 5)])
any_output = pytest.mark.parametrize("used", list(product([True, False], repeat=3))[:-1], ids=str)
"""Which of the three outputs matter."""


def arguments(n_bonds: int, n_short: int) -> list[Tensor]:
    """Bonds, and short edges in any order; each short bond has one edge along it and one against it."""
    generator = torch.Generator().manual_seed(n_bonds)
    vector = torch.randn(n_bonds, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(2 * n_short, generator=generator)
    bond_short = order.argsort().view(n_short, 2)
    return [vector.requires_grad_(), order // 2, (1 - 2 * (order % 2)).to(torch.int8), bond_short]


def orders(function, given: list[Tensor], used: tuple[bool, ...]) -> list[Tensor]:
    """Values, the first derivative and the second one where the outputs that are `used` matter."""
    torch.manual_seed(1)
    values = function(*given)
    grads = [torch.randn_like(value).requires_grad_() for value in values]
    values_used, grads_used = (
        [t for t, wanted in zip(ts, used, strict=True) if wanted] for ts in (values, grads)
    )
    with feature_derivatives():
        (first,) = torch.autograd.grad(values_used, given[0], grads_used, create_graph=True)
    loss = first.tanh().square().sum() + sum(value.square().sum() for value in values_used)
    return [*values, first, *torch.autograd.grad(loss, [*grads_used, given[0]])]


@sizes
@any_output
def test_all_orders_are_those_of_the_reference(n_bonds: int, n_short: int, used: tuple[bool, ...]) -> None:
    given = arguments(n_bonds, n_short)
    torch.testing.assert_close(orders(op._family, given, used), orders(reference, given, used), **EXACT)


def test_gradcheck() -> None:
    vector, *constants = arguments(4, 2)

    def first(vector: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        values = op._family(vector, *constants)
        return torch.autograd.grad(values, vector, grads, create_graph=True)

    assert torch.autograd.gradcheck(lambda v: op._family(v, *constants), vector)
    shapes = ((4, 1), (2, 1), (4, 3))
    grads = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(first, (vector, *grads))


def test_a_third_derivative_raises() -> None:
    vector, *constants = arguments(4, 2)
    distance, *_ = op._family(vector, *constants)
    (first,) = torch.autograd.grad(distance.square().sum(), vector, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), vector, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        second.square().sum().backward()


@sizes
@pytest.mark.parametrize("used", [(True, True, True), (True, False, True), (False, True, False)], ids=str)
def test_the_library_accepts_all_three_ops(n_bonds: int, n_short: int, used: tuple[bool, ...]) -> None:
    given = arguments(n_bonds, n_short)
    shapes = ((n_bonds, 1), (n_short, 1), (2 * n_short, 3))
    grads = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    some = [grad if wanted else None for grad, wanted in zip(grads, used, strict=True)]
    accept_all_three(op._family, given, some)


def test_single_precision_errs_by_a_few_last_digits() -> None:
    vector, *constants = arguments(200, 90)
    torch.manual_seed(1)
    drawn = [torch.randn(n, k) for n, k in ((200, 1), (90, 1), (180, 3), (200, 3))]

    def levels(dtype: torch.dtype) -> list[Tensor]:
        # what is drawn, vectors included, are numbers that both precisions have
        *grads, cotangent = (t.to(dtype) for t in drawn)
        given = [vector.detach().float().to(dtype), *constants]
        first = op._family.backward(False, *grads, *given, None, None)
        second = op._family.backward_backward(cotangent, *grads, *given)
        return [*op._family(*given), first, *second]

    for found, expected in zip(levels(torch.float32), levels(torch.float64), strict=True):
        assert found.dtype == torch.float32
        # three roundings or four of 6e-8 each
        assert (found - expected).norm() < 3e-7 * expected.norm()


def test_bonds_of_no_length_have_no_direction() -> None:
    """Gradients are zero there, of both orders; PyTorch's second derivative of a norm is not a number."""
    vector, *constants = arguments(7, 3)
    vector = vector.detach().index_fill_(0, torch.tensor([1, 5]), 0).requires_grad_()
    distance, *_ = op._family(vector, *constants)
    grad = torch.randn_like(distance).requires_grad_()
    (first,) = torch.autograd.grad(distance, vector, grad, create_graph=True)
    expected = torch.autograd.grad(vector.norm(dim=1, keepdim=True), vector, grad)[0]
    torch.testing.assert_close(first, expected, **EXACT)
    by_grad, by_vector = torch.autograd.grad(first.square().sum() + first.sum(), [grad, vector])
    for found in (distance, first, by_grad, by_vector):
        assert found.isfinite().all()
        assert (found.detach()[[1, 5]] == 0).all() and (found.detach()[[0, 2, 3, 4, 6]] != 0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padded_crystals(dtype: torch.dtype) -> None:
    """Values are bit for bit what the graph says, and ghosts are bonds as others are."""
    batch = build_graph(systems_from_atoms(crystals()), 4.0, 3.0)
    rows = rows_of(batch)
    batch = pad(batch, Capacity(*(n + more for n, more in zip(rows, (2, 5, 6, 7, 8), strict=True))))
    vector = batch.bond_vector.to(dtype).requires_grad_()
    distance, short_distance, short_edge = geometry(vector, batch)
    n_ghosts = 6 + 7
    assert (distance == GHOST_LENGTH).sum() == n_ghosts
    assert torch.equal(distance[:, 0], vector.norm(dim=1))
    assert torch.equal(short_distance, distance[: batch.n_short_bonds])
    assert torch.equal(short_edge, vector[batch.short_bond] * batch.short_sign[:, None])
    values = [distance.sum(), short_distance.sum(), short_edge.square().sum()]
    (first,) = torch.autograd.grad(values, vector, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), vector)
    assert first.isfinite().all() and second.isfinite().all()
