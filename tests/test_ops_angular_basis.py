"""Angular basis: values, first and second derivatives, and straight angles."""

from __future__ import annotations

import pytest
import torch
from families import accept_all_three
from torch import Tensor

from fastchgnet.graph import Index
from fastchgnet.ops import angular_basis as op
from fastchgnet.ops.angular_basis import angular_basis, reference
from fastchgnet.ops.derivatives import feature_derivatives

kinds = pytest.mark.parametrize("kind", ["fourier", "chebyshev"])
centers = pytest.mark.parametrize("n_edges", [(), (1,), (2,), (3, 0, 1, 4)], ids=str)
# fp64 rounding, times squares of orders of up to seven and the steep slope of nearly collinear angles
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def blocks(n_edges: tuple[int, ...]) -> tuple[Index, Index]:
    """All ordered pairs of the short edges of each centre."""
    pairs, first = [], 0
    for n in n_edges:
        pairs += [(i, j) for i in range(first, first + n) for j in range(first, first + n) if i != j]
        first += n
    i, j = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(i, minlength=first).cumsum(0)])
    reverse = torch.tensor([pairs.index((b, a)) for a, b in pairs], dtype=torch.long)
    return Index(i.contiguous(), start, None), Index(j.contiguous(), start, reverse)


def arguments(kind: str, n_edges: tuple[int, ...], n_functions: int = 7) -> tuple:
    generator = torch.Generator().manual_seed(sum(n_edges))
    edge = torch.randn(sum(n_edges), 3, generator=generator, dtype=torch.float64).requires_grad_()
    frequency = None
    if kind == "fourier":
        order = (n_functions - 1) // 2
        frequency = torch.arange(1, order + 1) + 0.1 * torch.randn(
            order, generator=generator, dtype=torch.float64
        )
        frequency.requires_grad_()
    return edge, frequency, n_functions, *blocks(n_edges)


def leaves(given: tuple) -> list[Tensor]:
    return [t for t in given[:2] if t is not None]


@centers
@kinds
def test_all_orders_are_those_of_the_reference(kind: str, n_edges: tuple[int, ...]) -> None:
    given = arguments(kind, n_edges)

    def orders(function) -> list[Tensor]:
        torch.manual_seed(1)
        y = function(*given)
        grad = torch.randn_like(y).requires_grad_()
        first = torch.autograd.grad(y, leaves(given), grad, retain_graph=True)
        with feature_derivatives():
            (by_edge,) = torch.autograd.grad(y, given[0], grad, create_graph=True)
        loss = by_edge.tanh().square().sum() + y.square().sum()
        return [y, *first, *torch.autograd.grad(loss, [grad, *leaves(given)])]

    torch.testing.assert_close(orders(angular_basis), orders(reference), **EXACT)


@kinds
def test_gradcheck(kind: str) -> None:
    given = arguments(kind, (3, 2))

    def call(*values: Tensor) -> Tensor:
        edge, frequency = values if kind == "fourier" else (*values, None)
        return angular_basis(edge, frequency, *given[2:])

    def first(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        with feature_derivatives():
            return torch.autograd.grad(call(*values), values[:1], grad, create_graph=True)

    assert torch.autograd.gradcheck(call, leaves(given))
    grad = torch.randn_like(call(*leaves(given))).requires_grad_()
    assert torch.autograd.gradcheck(first, (grad, *leaves(given)))


@kinds
def test_the_library_accepts_all_three_ops(kind: str) -> None:
    edge, frequency, n, by_i, by_j = arguments(kind, (3, 2))
    given = [edge, frequency, by_i.segment, by_i.start, by_j.segment, by_j.order, n]
    accept_all_three(op._family, given)


def straight(bend: float) -> Tensor:
    """Three edges of a centre, two of them opposite but for a bend, exact in float32."""
    edges = torch.tensor([[1.1, 1.3, -0.9], [-2.2, -2.6, 1.8], [0.3, -1.7, 1.2]], dtype=torch.float64)
    edges[1] += bend * torch.tensor([1.0, -2.0, 0.4], dtype=torch.float64)
    return edges.float().double()


@kinds
@pytest.mark.parametrize("bend", [0.0, 1e-4, 1e-2])
def test_single_precision_at_straight_angles(kind: str, bend: float) -> None:
    """The slope of the angle is 700 there, and only what rounding did to unit vectors may be multiplied."""
    _, frequency, n, *index = arguments(kind, (3,))

    def gradient(dtype: torch.dtype) -> Tensor:
        edge = straight(bend).to(dtype).requires_grad_()
        y = angular_basis(edge, None if frequency is None else frequency.detach().to(dtype), n, *index)
        return torch.autograd.grad(y, edge, torch.linspace(1, 2, n, dtype=dtype).expand_as(y))[0].double()

    error = (gradient(torch.float32) - gradient(torch.float64)).norm() / gradient(torch.float64).norm()
    # 700 times 6e-8, against slopes of up to 700
    assert error < 5e-5


@kinds
def test_exactly_straight_angles_pull_exactly_along_nothing(kind: str) -> None:
    """By symmetry the angle between opposite edges has no slope, however steep the series is there."""
    _, frequency, n, *_ = arguments(kind, (2,))
    half = torch.tensor([[1.1, 1.3, -0.9]])
    edge = torch.cat([half, -half]).requires_grad_()
    y = angular_basis(edge, None if frequency is None else frequency.detach().float(), n, *blocks((2,)))
    (gradient,) = torch.autograd.grad(y.sum(), edge)
    assert (gradient == 0).all()
