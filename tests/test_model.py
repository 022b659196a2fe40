"""Parameter counts and the formulas of the bases."""

from __future__ import annotations

import math

import pytest
import torch
from crystals import CONSERVATIVE, PAPER, potential
from torch.autograd import gradcheck

from fastchgnet.basis import ChebyshevBasis, FourierBasis, RadialBasis
from fastchgnet.config import ModelConfig
from fastchgnet.graph import Index
from fastchgnet.ops.derivatives import feature_derivatives
from fastchgnet.ops.envelope import envelope

D = 64


def dead_angle_update(shared_layer_norm: bool) -> int:
    """Parameters of the third angle update, which published models hold and never use."""
    return 2 * (4 * D * D + D) + (1 if shared_layer_norm else 2) * 2 * D


@pytest.mark.parametrize(
    ("config", "live", "published"),
    [
        (CONSERVATIVE, 379_373, 412_525),  # CHGNet 0.3.0
        (ModelConfig(shared_layer_norm=True), 378_221, 411_245),  # the paper's "w/o head"
        (PAPER, 396_022, 429_046),  # the paper's "F/S head"
    ],
)
def test_parameter_counts(config: ModelConfig, live: int, published: int) -> None:
    count = potential(config).n_parameters()
    assert count == live
    assert count + dead_angle_update(config.shared_layer_norm) == published


@pytest.mark.parametrize("p", [5, 8])
def test_envelope_is_the_polynomial(p: int) -> None:
    xi = torch.linspace(0, 1.2, 500, dtype=torch.float64)
    polynomial = (
        1 - (p + 1) * (p + 2) / 2 * xi**p + p * (p + 2) * xi ** (p + 1) - p * (p + 1) / 2 * xi ** (p + 2)
    )
    polynomial[xi > 1] = 0
    torch.testing.assert_close(envelope(xi, p), polynomial, rtol=0, atol=1e-12)


def test_envelope_is_accurate_in_single_precision() -> None:
    xi = torch.linspace(0, 1, 2000, dtype=torch.float64)
    error = (envelope(xi.float(), 8).double() - envelope(xi.float().double(), 8)).abs().max()
    assert error < 1e-6


def angles(theta: torch.Tensor) -> tuple[torch.Tensor, Index, Index]:
    """Pairs of short edges at the angles theta, in no special direction; each angle, then its reverse."""
    first, second, _ = torch.linalg.qr(
        torch.tensor([[1.0, 2, 3], [2, 1, 5], [3, 1, 1]], dtype=torch.float64)
    ).Q
    j = theta.cos()[:, None] * first + theta.sin()[:, None] * second
    short = torch.stack([first.expand_as(j), 1.3 * j], dim=1).flatten(0, 1)
    edge = torch.arange(len(short))
    start = torch.arange(len(short) + 1)
    return short, Index(edge, start, None), Index(edge ^ 1, start, edge ^ 1)


def test_fourier_and_chebyshev_bases_are_series_in_the_angle() -> None:
    theta = torch.linspace(0.01, 3.13, 50, dtype=torch.float64)
    orders = torch.arange(31, dtype=torch.float64)
    cosines = torch.cos(theta[:, None] * orders)
    chebyshev = ChebyshevBasis(31)(*angles(theta)) * math.sqrt(math.pi)
    torch.testing.assert_close(chebyshev[::2, 1:], cosines[:, 1:], rtol=0, atol=1e-12)
    fourier = FourierBasis(31).double()(*angles(theta)) * math.sqrt(math.pi)
    # the factor 1 - 1e-6 inside acos moves the angle by 1e-6 cot(theta), at most 1e-4 here
    torch.testing.assert_close(fourier[::2, 16:], cosines[:, 1:16], rtol=0, atol=16 * 1.1e-4)
    torch.testing.assert_close(fourier[1::2], fourier[::2], rtol=0, atol=1e-12)
    assert (fourier[:, 0] == 1 / math.sqrt(2)).all()
    assert ChebyshevBasis(31)(*angles(theta[:0])).shape == (0, 31)


@pytest.mark.parametrize("basis", [RadialBasis(5, 3.0, 8), FourierBasis(7), ChebyshevBasis(6)])
def test_bases_are_twice_differentiable(basis: torch.nn.Module) -> None:
    basis = basis.double()
    x = torch.tensor([0.6, 1.3, 1.8, 2.45], dtype=torch.float64, requires_grad=True)

    def expand(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(basis, RadialBasis):
            return basis(*angles(x))
        (table,) = basis(x[:, None], torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5))
        return table

    def slope(x: torch.Tensor) -> torch.Tensor:
        with feature_derivatives():
            return torch.autograd.grad(expand(x).sin().sum(), x, create_graph=True)[0]

    assert gradcheck(expand, (x,))
    assert gradcheck(slope, (x,))


def test_fourier_basis_is_accurate_at_straight_angles() -> None:
    """Where acos has lost its derivative in float32 by more than a tenth."""
    basis = FourierBasis(7)
    short, *index = angles(math.pi - torch.tensor([1e-4, 1e-3, 1e-2], dtype=torch.float64))

    def derivative(short: torch.Tensor) -> torch.Tensor:
        short = short.clone().requires_grad_()
        return torch.autograd.grad(basis.to(short.dtype)(short, *index).sum(), short)[0].double()

    single = short.float()
    exact = derivative(single.double())
    assert (derivative(single) - exact).norm() < 1e-3 * exact.norm()


def test_reference_energies_stay_double() -> None:
    model = potential(CONSERVATIVE)
    exact = model.references.clone()
    assert torch.equal(model.float().double().references, exact)
    assert model.float().dtype == torch.float32
