"""Radial basis: values, first and second derivatives, accuracy and the cutoff."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastchgnet.ops.bond_tables import bond_tables
from fastchgnet.ops.derivatives import feature_derivatives
from fastchgnet.ops.radial_basis import reference

CUTOFF = 3.0
# fp64 rounding, times powers of frequencies of up to ten
EXACT = {"rtol": 1e-10, "atol": 1e-10}

lengths = pytest.mark.parametrize("n", [0, 1, 7])
powers = pytest.mark.parametrize("p", [5, 8])


def arguments(n: int, p: int = 8, n_radial: int = 5) -> tuple[Tensor, Tensor, float, int]:
    generator = torch.Generator().manual_seed(n)
    distance = 0.5 + 2.7 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    frequency = math.pi * torch.arange(1, n_radial + 1) + 0.1 * torch.randn(
        n_radial, generator=generator, dtype=torch.float64
    )
    return distance.requires_grad_(), frequency.requires_grad_(), CUTOFF, p


def radial_basis(distance: Tensor, frequency: Tensor, cutoff: float, p: int) -> Tensor:
    """Read the functions through a layer that leaves them as they are."""
    nothing = torch.eye(len(frequency)).to(frequency)
    (table,) = bond_tables(distance, frequency, nothing, None, cutoff, p, 0)
    return table


@lengths
@powers
def test_all_orders_are_those_of_the_reference(n: int, p: int) -> None:
    given = arguments(n, p)

    def orders(function) -> list[Tensor]:
        torch.manual_seed(1)
        y = function(*given)
        grad = torch.randn_like(y).requires_grad_()
        first = torch.autograd.grad(y, given[:2], grad, retain_graph=True)
        with feature_derivatives():
            (by_distance,) = torch.autograd.grad(y, given[0], grad, create_graph=True)
        loss = by_distance.tanh().square().sum() + y.square().sum()
        return [y, *first, *torch.autograd.grad(loss, [grad, *given[:2]])]

    torch.testing.assert_close(orders(radial_basis), orders(reference), **EXACT)


@powers
def test_gradcheck(p: int) -> None:
    distance, frequency, *constants = arguments(4, p, n_radial=3)

    def first(grad: Tensor, distance: Tensor, frequency: Tensor) -> tuple[Tensor, ...]:
        with feature_derivatives():
            y = radial_basis(distance, frequency, *constants)
            return torch.autograd.grad(y, distance, grad, create_graph=True)

    assert torch.autograd.gradcheck(lambda r, f: radial_basis(r, f, *constants), (distance, frequency))
    grad = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(first, (grad, distance, frequency))


def derivatives(distance: Tensor, frequency: Tensor, p: int = 8) -> list[Tensor]:
    """Value, slope and curvature of the sum of the functions, for each distance."""
    distance = distance.clone().requires_grad_()
    y = radial_basis(distance, frequency, CUTOFF, p)
    with feature_derivatives():
        (slope,) = torch.autograd.grad(y.sum(), distance, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), distance)
    return [y.detach(), slope.detach(), curvature]


@powers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exactly_nothing_from_the_cutoff_on(p: int, dtype: torch.dtype) -> None:
    distance = torch.tensor([[CUTOFF], [CUTOFF + 1e-3], [40.0]], dtype=dtype)
    for found in derivatives(distance, arguments(1)[1].detach().to(dtype), p):
        assert (found == 0).all()


def test_single_precision_near_the_cutoff() -> None:
    """Each order keeps its digits where plain polynomials, or their derivatives, have lost all."""
    distance = CUTOFF * (1 - torch.logspace(-4, -1, 30, dtype=torch.float64)[:, None]).float()
    # one slow function, so that only the envelope and no sine falls to zero
    frequency = torch.tensor([0.9], dtype=torch.float64)
    exact = derivatives(distance.double(), frequency)
    for found, expected in zip(derivatives(distance, frequency.float()), exact, strict=True):
        # 1 - xi keeps 6e-8 / 1e-4 of itself, of which the envelope is the third power
        relative = ((found.double() - expected) / expected).abs() * (1 - distance.double() / CUTOFF)
        assert relative.max() < 1e-6
