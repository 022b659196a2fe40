"""Compiled bodies of projections and bases against float64; those of messages are tested with their op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_ops_angular_basis import arguments as angular_arguments
from test_ops_projection import KINDS, outputs
from test_ops_projection import arguments as projection_arguments
from test_ops_radial_basis import arguments as radial_arguments
from test_ops_radial_basis import radial_basis
from torch import Tensor

from fastchgnet.ops import angular_basis, bond_tables, projection
from fastchgnet.ops._register import Family
from fastchgnet.ops.cpu import native
from fastchgnet.ops.derivatives import feature_derivatives

threads = pytest.mark.parametrize("n_threads", [1, 3])


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch, n_threads: int) -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(native, "n_threads", lambda _: n_threads)


def values_and_gradients(family: Family, given: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    """Outputs and the gradients of features, given the same numbers in a precision."""
    torch.manual_seed(1)
    inputs = [t.detach().to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
    features = [t.requires_grad_() for t in inputs[: family.n_features] if t is not None]
    found = family(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    made = [t for t in found if t.requires_grad and t.shape != (0,)]
    grads = [torch.randn(t.shape, dtype=torch.float64).to(dtype) for t in made]
    with feature_derivatives():
        return [*made, *torch.autograd.grad(made, features, grads)]


def assert_near(family: Family, given: Sequence[Any]) -> None:
    ours = values_and_gradients(family, given, torch.float32)
    exact = values_and_gradients(family, given, torch.float64)
    assert len(ours) == len(exact)
    for one, other in zip(ours, exact, strict=True):
        # single precision, each right to 1e-7 or so times what it is made of, relative to the largest
        bound = 3e-6 * max(1.0, other.abs().max().item() if other.numel() else 0.0)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


@threads
@pytest.mark.parametrize("n", [0, 1, 37, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_projections(kind: str, n: int, n_threads: int) -> None:
    given = projection_arguments(kind, n, width=16)
    assert_near(projection._family, given)


@threads
@pytest.mark.parametrize("kind", ["atoms", "bonds"])
def test_projections_that_nothing_depends_on(kind: str, n_threads: int) -> None:
    m = projection_arguments(kind, 40, torch.float32, width=16)
    leaves = [t for t in m[:3] if t is not None]

    def by_one(k: int) -> list[Tensor]:
        made = outputs(projection._family(*m), m)[k]
        with feature_derivatives():
            return list(torch.autograd.grad(made.square().sum(), leaves))

    for k in (0, 1):
        found = by_one(k)
        with native.disabled():
            expected = by_one(k)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected[0].abs().max()))


@threads
@pytest.mark.parametrize("n", [0, 1, 50])
@pytest.mark.parametrize(("p", "n_radial"), [(8, 31), (5, 9), (8, 64)])
def test_radial_bases(n: int, p: int, n_radial: int, n_threads: int) -> None:
    given = radial_arguments(n, p, n_radial)
    # in single precision a phase of 200 is right to 1e-5, and its frequencies multiply the error
    if n_radial == 64:
        given = (given[0], given[1] / 4, *given[2:])
    distance, frequency, *constants = given
    weight = torch.eye(n_radial, dtype=torch.float64)
    assert_near(bond_tables._family, (distance, frequency, weight, None, *constants, 0))


@threads
def test_radial_bases_at_and_beyond_the_cutoff(n_threads: int) -> None:
    _, frequency, cutoff, p = radial_arguments(0, n_radial=31)
    distance = torch.tensor([[cutoff], [cutoff + 1e-3], [2 * cutoff], [torch.nan]]).requires_grad_()
    value = radial_basis(distance, frequency.detach().float(), cutoff, p)
    with feature_derivatives():
        (slope,) = torch.autograd.grad(value.sum(), distance)
    assert not value[:3].any() and not slope[:3].any()
    assert value[3].isnan().all() and slope[3].isnan().all()


@threads
@pytest.mark.parametrize("n_functions", [7, 31])
@pytest.mark.parametrize("n_edges", [(), (1,), (2,), (3, 0, 1, 12)], ids=str)
def test_angular_bases(n_edges: tuple[int, ...], n_functions: int, n_threads: int) -> None:
    edge, frequency, n, by_i, by_j = angular_arguments("fourier", n_edges, n_functions)
    index = (by_i.segment, by_i.start, by_j.segment, by_j.order)
    assert_near(angular_basis._family, (2 + edge, frequency, *index, n))


@threads
def test_straight_angles(n_threads: int) -> None:
    """There neither the cosine nor its slope has digits left, unless both come from the difference."""
    _, frequency, n, by_i, by_j = angular_arguments("fourier", (2, 2), 31)
    edge = torch.tensor([[2.0, 0, 0], [-1.7, 0, 0], [1.9, 0, 0], [-1.8, 1e-4, 2e-4]], dtype=torch.float64)
    index = (by_i.segment, by_i.start, by_j.segment, by_j.order)
    inputs = (edge, frequency, *index, n)
    value, slope = values_and_gradients(angular_basis._family, inputs, torch.float32)
    exact_value, exact_slope = values_and_gradients(angular_basis._family, inputs, torch.float64)
    torch.testing.assert_close(value.double(), exact_value, rtol=0, atol=1e-5)
    # the slope of the angle by the cosine reaches a thousand, and orders reach 15
    torch.testing.assert_close(
        slope.double(), exact_slope, rtol=0, atol=1e-3 * float(exact_slope.abs().max())
    )
