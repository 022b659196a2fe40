"""Triton bodies of the bases and of the pair forces against the PyTorch ones, at every level."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crystals import crystals
from interpreted import DEVICE, nan_filled  # noqa: F401, a fixture for every test here
from test_ops_angular_basis import blocks
from test_ops_pair_forces import arguments as pair_arguments
from torch import Tensor
from triton import jit
from triton import language as tl

from fastchgnet.neighbors import build_graph, systems_from_atoms
from fastchgnet.ops import angular_basis, envelope, pair_forces, radial_basis
from fastchgnet.ops.gpu import angular_basis as gpu_angular_basis
from fastchgnet.ops.gpu import pair_forces as gpu_pair_forces
from fastchgnet.ops.gpu import radial_basis as gpu_radial_basis
from fastchgnet.ops.gpu.trigonometry import angle, sine_and_cosine

# float32 at phases of a hundred radians, whose sines err by 4e-6, and slopes of up to a hundred
FLOAT32 = 1e-5


def moved(given: tuple, dtype: torch.dtype, device: str) -> tuple:
    return tuple(
        t.to(device, dtype if t.is_floating_point() else None) if isinstance(t, Tensor) else t for t in given
    )


def levels(bodies: tuple[Callable, Callable, Callable], given: tuple, drawn: tuple) -> list[Tensor | None]:
    """Results of all three levels, the gradients of parameters included."""
    forward, backward, second = bodies
    grad, cotangent = drawn
    return [
        forward(*given),
        backward(False, grad, *given)[0],
        *backward(True, grad, *given),
        *second((cotangent,), grad, *given),
    ]


def check(kernels: Any, op: Any, given: tuple, feature: Tensor, n_rows: int, n: int) -> None:
    """Compare kernels in float32 with the PyTorch bodies in float64, and with themselves."""
    drawn = (torch.randn(n_rows, n), torch.randn_like(feature))
    bodies = (op._forward, op._backward, op._backward_backward)
    exact = levels(bodies, moved(given, torch.float64, "cpu"), moved(drawn, torch.float64, "cpu"))
    bodies = (kernels.forward, kernels.backward, kernels.backward_backward)
    single = moved(given, torch.float32, DEVICE), moved(drawn, torch.float32, DEVICE)
    found, again = (levels(bodies, *single) for _ in range(2))
    for one, other, expected in zip(found, again, exact, strict=True):
        if expected is None:
            assert one is None
            continue
        assert one.shape == expected.shape
        assert torch.equal(one, other)
        assert (one.cpu() - expected).norm() <= FLOAT32 * expected.norm()


@pytest.mark.parametrize("n_rows", [0, 1, 31, 33, 100])
@pytest.mark.parametrize(("n_radial", "p"), [(31, 8), (9, 5)])
def test_radial_basis(n_rows: int, n_radial: int, p: int) -> None:
    torch.manual_seed(n_rows)
    distance = 0.5 + 6 * torch.rand(n_rows, 1)
    frequency = math.pi * torch.arange(1, n_radial + 1) * (1 + 0.01 * torch.randn(n_radial))
    check(gpu_radial_basis, radial_basis, (distance, frequency, 6.0, p), distance, n_rows, n_radial)


def test_radial_basis_is_exactly_nothing_from_the_cutoff_on() -> None:
    distance = torch.tensor([[3.0], [3.001], [40.0]])
    given = moved((distance, math.pi * torch.arange(1.0, 32), 3.0, 8), torch.float32, DEVICE)
    drawn = moved((torch.randn(3, 31), torch.randn(3, 1)), torch.float32, DEVICE)
    kernels = gpu_radial_basis
    for found in levels((kernels.forward, kernels.backward, kernels.backward_backward), given, drawn):
        assert (found == 0).all()


@pytest.mark.parametrize("n_rows", [0, 1, 300])
def test_envelope(n_rows: int) -> None:
    distance = 7 * torch.rand(n_rows, 1)
    found = gpu_radial_basis.envelope(distance.to(DEVICE), 6.0, 8).cpu()
    torch.testing.assert_close(found, envelope._forward(distance.double(), 6.0, 8).float(), rtol=0, atol=1e-6)


def test_the_envelope_of_no_number_is_none() -> None:
    distance = torch.tensor([1.0, torch.nan, 7.0], device=DEVICE)
    assert gpu_radial_basis.envelope(distance, 6.0, 8).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("n_edges", [(), (1,), (2,), (3, 0, 1, 4), (9, 5, 0, 6)], ids=str)
@pytest.mark.parametrize("n_functions", [31, 9])
@pytest.mark.parametrize("kind", ["fourier", "chebyshev"])
def test_angular_basis(kind: str, n_functions: int, n_edges: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    edge = 2 * torch.randn(sum(n_edges), 3)
    order = (n_functions - 1) // 2
    frequency = torch.arange(1, order + 1) * (1 + 0.02 * torch.randn(order)) if kind == "fourier" else None
    by_i, by_j = blocks(n_edges)
    given = (edge, frequency, by_i.segment, by_i.start, by_j.segment, by_j.order, n_functions)
    check(gpu_angular_basis, angular_basis, given, edge, len(by_i.segment), n_functions)


@pytest.mark.parametrize("kind", ["fourier", "chebyshev"])
def test_exactly_straight_angles_pull_exactly_along_nothing(kind: str) -> None:
    half = torch.tensor([[1.1, 1.3, -0.9]])
    by_i, by_j = blocks((2,))
    frequency = torch.arange(1.0, 16) if kind == "fourier" else None
    given = (torch.cat([half, -half]), frequency, by_i.segment, by_i.start, by_j.segment, by_j.order, 31)
    grad = torch.linspace(1, 2, 62).view(2, 31).to(DEVICE)
    (found, _) = gpu_angular_basis.backward(False, grad, *moved(given, torch.float32, DEVICE))
    assert (found == 0).all()


@pytest.mark.parametrize("volume", [3.0, math.nan])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("n_bonds", [0, 1, 7])
def test_pair_forces(n_bonds: int, n: int, volume: float) -> None:
    given = [t.detach() for t in pair_arguments(n_bonds, n, torch.float32)]
    given[-1][1] = volume
    here = [t.to(DEVICE) for t in given]
    found = tuple(t.cpu() for t in gpu_pair_forces.forward(*here))
    # one rounding to float32, at the end
    tolerance = {"rtol": 1.2e-7, "atol": 1e-7, "equal_nan": True}
    torch.testing.assert_close(found, pair_forces._forward(*given), **tolerance)
    grads = torch.randn(4, 3), torch.randn(3, 3, 3)
    pulls, arm, center, neighbor, *_, system, _, volumes = here
    ends = center, neighbor, system, volumes
    found = gpu_pair_forces.backward(pulls, arm, *(g.to(DEVICE) for g in grads), *ends)
    expected = pair_forces._backward(*given[:2], *grads, *(t.cpu() for t in ends))
    torch.testing.assert_close(tuple(t.cpu() for t in found), expected, **tolerance)


def test_forces_and_stress_of_a_large_crystal() -> None:
    """More atoms than are added up at once, beside a small crystal."""
    large, small = crystals()[1].repeat(3), crystals()[0]
    batch = build_graph(systems_from_atoms([large, small]), 3.0, 2.9)
    arm = batch.bond_vector.float()
    graph = [getattr(batch, name) for name in pair_forces._Graph._fields]
    given = arm[:, None] * torch.linspace(-1, 1, len(arm))[:, None, None], arm, *graph
    found = gpu_pair_forces.forward(*(t.to(DEVICE) for t in given))
    expected = pair_forces._forward(*given)
    # one rounding to float32, at the end
    torch.testing.assert_close(tuple(t.cpu() for t in found), expected, rtol=1.2e-7, atol=1e-7)


@jit
def _trigonometry_kernel(x, sine, cosine, turned, N: tl.constexpr):
    at = tl.arange(0, N)
    s, c = sine_and_cosine(tl.load(x + at))
    tl.store(sine + at, s)
    tl.store(cosine + at, c)
    tl.store(turned + at, angle(tl.abs(s), c))


def test_sine_cosine_and_angle() -> None:
    x = torch.cat([torch.linspace(-2000, 2000, 4000), torch.linspace(-0.01, 0.01, 96)]).to(DEVICE)
    sine, cosine, turned = (torch.empty_like(x) for _ in range(3))
    _trigonometry_kernel[(1,)](x, sine, cosine, turned, N=4096)
    # a unit in the last place of a number near one is 1.2e-7, of one near pi 2.4e-7
    assert (sine - x.double().sin()).abs().max() < 1.2e-7
    assert (cosine - x.double().cos()).abs().max() < 1.2e-7
    assert (turned - torch.atan2(sine.double().abs(), cosine.double())).abs().max() < 2.4e-7
