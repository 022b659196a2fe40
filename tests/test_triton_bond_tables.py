"""Triton bodies of the tables of bonds against the PyTorch ones, at every level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import DEVICE, nan_filled  # noqa: F401, a fixture for every test here
from torch import Tensor

from fastchgnet.ops import bond_tables
from fastchgnet.ops.bond_tables import Inputs
from fastchgnet.ops.gpu import bond_tables as kernels
from fastchgnet.ops.gpu import runtime

# float32 at phases of a hundred radians, whose sines err by 4e-6, and slopes of up to a hundred
FLOAT32 = 1e-5
BODIES = (
    (kernels.forward, kernels.backward, kernels.backward_backward),
    (bond_tables._forward, kernels.pytorch_backward, bond_tables._backward_backward),
)


def arguments(
    n_short: int,
    n_long: int,
    n_tables: int = 4,
    n_radial: int = 31,
    p: int = 8,
    width: int = 16,
    n_layers: int = 2,
) -> Inputs:
    """Draw what the op takes; one layer on all bonds where there are no tables of long ones."""
    torch.manual_seed(1 + n_short + n_long)  # with 1, the only curvature of a single bond cancels to 1e-4
    frequency = math.pi * torch.arange(1, n_radial + 1) * (1 + 0.01 * torch.randn(n_radial))
    weight = torch.randn((2 if n_tables else 1) * width, n_radial)
    long_weight = torch.randn(n_tables, n_layers * width, n_radial) if n_tables else None
    distance = 0.5 + 6 * torch.rand(n_short + n_long, 1)
    return Inputs(distance, frequency, weight, long_weight, 6.0, p, n_short)


def draw(given: Inputs, without: Sequence[int] = ()) -> tuple[Any, ...]:
    """Draw gradients of the tables, a cotangent, and what the gradients of inputs are added to."""
    grads = [torch.randn(t.shape) for t in bond_tables._shapes(*given)]
    onto = [() if t is None else (torch.randn(t.shape),) for t in given[:4]]
    onto[0] += (torch.randn(given.distance.shape),)
    return [None if k in without else g for k, g in enumerate(grads)], torch.randn(given.distance.shape), onto


def moved(given: Any, dtype: torch.dtype, device: str) -> Any:
    if isinstance(given, (tuple, list)):
        found = [moved(one, dtype, device) for one in given]
        return Inputs(*found) if isinstance(given, Inputs) else type(given)(found)
    return given.to(device, dtype) if isinstance(given, Tensor) else given


def levels(bodies: Sequence[Any], given: Inputs, drawn: tuple[Any, ...]) -> list[Tensor]:
    """Results of all three levels, of what there is."""
    forward, backward, second = bodies
    grads, cotangent, onto = drawn
    nothing: list[Any] = [()] * 4
    found = [
        *forward(*given),
        backward(nothing, False, grads, *given)[0],
        *backward(nothing, True, grads, *given),
        *backward(onto, True, grads, *given),
        *second((cotangent,), grads, *given),
    ]
    return [t for t in found if t is not None]


def check(given: Inputs, drawn: tuple[Any, ...]) -> None:
    """Compare kernels in float32 with the PyTorch bodies in float64."""
    ours, theirs = BODIES
    exact = levels(theirs, moved(given, torch.float64, "cpu"), moved(drawn, torch.float64, "cpu"))
    single = moved(given, torch.float32, DEVICE), moved(drawn, torch.float32, DEVICE)
    for one, expected in zip(levels(ours, *single), exact, strict=True):
        assert one.shape == expected.shape
        assert (one.cpu() - expected).norm() <= FLOAT32 * expected.norm()


@pytest.mark.parametrize(("n_short", "n_long"), [(0, 0), (1, 0), (0, 33), (20, 60)])
@pytest.mark.parametrize("n_tables", [0, 3])
def test_all_levels(n_short: int, n_long: int, n_tables: int) -> None:
    given = arguments(n_short, n_long, n_tables)
    check(given, draw(given))


@pytest.mark.parametrize(("n_radial", "p"), [(32, 8), (9, 5), (1, 8)])
def test_any_number_of_functions(n_radial: int, p: int) -> None:
    given = arguments(5, 30, 1, n_radial, p)
    check(given, draw(given))


@pytest.mark.parametrize("n_layers", [1, 3, kernels.LAYERS, kernels.LAYERS + 1])
def test_long_tables_of_any_number_of_layers(n_layers: int) -> None:
    given = arguments(20, 30, 2, n_layers=n_layers)
    check(given, draw(given))


def test_tf32_is_for_gradients_of_parameters() -> None:
    given = arguments(20, 60)
    grads, _, onto = moved(draw(given), torch.float32, DEVICE)
    single = moved(given, torch.float32, DEVICE)
    exact = kernels.backward(onto, True, grads, *single)
    with runtime.precision("tf32"):
        found = kernels.backward(onto, True, grads, *single)
    off = [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]
    assert off[:2] == [0, 0] and all(1e-5 < share < 1e-3 for share in off[2:])


def test_features_of_the_network() -> None:
    given = arguments(5, 40, 5, width=64)
    check(given, draw(given))


@pytest.mark.parametrize("without", [[0, 3], range(1, 4)], ids=str)
def test_tables_that_nothing_depends_on(without: Sequence[int]) -> None:
    given = arguments(20, 30, 2)
    check(given, draw(given, without))


def test_exactly_nothing_from_the_cutoff_on() -> None:
    given = arguments(1, 2)._replace(distance=torch.tensor([[6.0], [6.001], [40.0]]))
    grads, cotangent, _ = draw(given)
    single = moved((given, (grads, cotangent)), torch.float32, DEVICE)
    for found in levels(BODIES[0], single[0], (*single[1], [()] * 4)):
        assert (found == 0).all()


@pytest.mark.parametrize(("n_radial", "width"), [(33, 16), (9, 24)])
def test_what_does_not_fit_is_left_to_pytorch(n_radial: int, width: int) -> None:
    given = arguments(5, 7, 1, n_radial, width=width)
    assert not kernels.fits(given)
    check(given, draw(given))


def test_a_length_that_is_not_a_number_shows() -> None:
    given = arguments(1, 2)._replace(distance=torch.tensor([[1.0], [torch.nan], [7.0]]))
    with np.errstate(invalid="ignore"):  # the quarter that its phase is in has no number
        _, of_all, of_long, *_ = kernels.forward(*moved(given, torch.float32, DEVICE))
    assert of_all.isnan().all(1).tolist() == [False, True, False]
    assert of_long.isnan().all(1).tolist() == [True, False]
