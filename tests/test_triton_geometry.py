"""Triton bodies of the geometry against the PyTorch ones, at every level."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from interpreted import DEVICE, nan_filled, without_syncs  # noqa: F401, a fixture for every test here
from test_ops_geometry import arguments
from torch import Tensor

from fastchgnet.ops import geometry as op
from fastchgnet.ops.gpu import geometry as kernels
from fastchgnet.ops.gpu import runtime

# a few roundings of float32, in inner products of which a single one may cancel
FLOAT32 = 1e-6

# one tile of 128 bonds and several, and tiles that hold short edges but no bond
sizes = pytest.mark.parametrize(
    ("n_bonds", "n_short"), [(0, 0), (1, 0), (1, 1), (128, 64), (129, 129), (300, 40)]
)


def levels(
    bodies: tuple[Callable, Callable, Callable], given: list[Tensor], drawn: list[Tensor]
) -> list[Tensor | None]:
    """Results of all three levels, with gradients of some outputs and of all."""
    forward, backward, second = bodies
    *by_outputs, cotangent = drawn
    found = [*forward(*given)]
    for used in list(product([True, False], repeat=3))[:-1]:
        grads = tuple(grad if wanted else None for grad, wanted in zip(by_outputs, used, strict=True))
        found += [*backward(False, grads, *given), *second((cotangent,), grads, *given)]
    return found


def moved(tensors: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [t.detach().to(device, dtype if t.is_floating_point() else None) for t in tensors]


def case(n_bonds: int, n_short: int) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(n_bonds)
    drawn = [torch.randn(n, k) for n, k in ((n_bonds, 1), (n_short, 1), (2 * n_short, 3), (n_bonds, 3))]
    return moved(arguments(n_bonds, n_short), torch.float32, "cpu"), drawn


KERNELS = (kernels.forward, kernels.backward, kernels.backward_backward)
PYTORCH = (op.reference, op._backward, op._backward_backward)


@sizes
def test_all_levels_are_those_of_pytorch(n_bonds: int, n_short: int) -> None:
    given, drawn = case(n_bonds, n_short)
    exact = levels(PYTORCH, moved(given, torch.float64, "cpu"), moved(drawn, torch.float64, "cpu"))
    single = [moved(tensors, torch.float32, DEVICE) for tensors in (given, drawn)]
    found, again = (levels(KERNELS, *single) for _ in range(2))
    for one, other, expected in zip(found, again, exact, strict=True):
        if expected is None:
            assert one is None
            continue
        assert one.shape == expected.shape and one.dtype == torch.float32
        assert torch.equal(one, other)
        assert (one.cpu() - expected).norm() <= FLOAT32 * expected.norm()


def test_bonds_of_no_length_have_no_direction() -> None:
    given, drawn = (moved(tensors, torch.float32, DEVICE) for tensors in case(7, 3))
    given[0][[1, 5]] = 0
    # their short edges are left out, so that every gradient is zero
    drawn[2].fill_(0)
    distance, *_ = kernels.forward(*given)
    (first,) = kernels.backward(False, drawn[:3], *given)
    by_distance, _, _, by_vector = kernels.backward_backward(drawn[3:], drawn[:3], *given)
    for found in (distance, first, by_distance, by_vector):
        assert found.isfinite().all() and (found[[1, 5]] == 0).all() and (found[0] != 0).any()


def test_inputs_may_lie_anywhere() -> None:
    given, drawn = (moved(tensors, torch.float32, DEVICE) for tensors in case(20, 6))
    apart = [
        torch.stack([t, t], dim=-1).select(-1, 0) if t.is_floating_point() else t for t in (*given, *drawn)
    ]
    assert not apart[0].is_contiguous()
    for one, other in zip(levels(KERNELS, given, drawn), levels(KERNELS, apart[:4], apart[4:]), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_every_level_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    started, launch = [], runtime.launch

    def counted(*args: Any, **options: Any) -> None:
        started.append(args[0].__name__)
        launch(*args, **options)

    monkeypatch.setattr(runtime, "launch", counted)
    given, drawn = (moved(tensors, torch.float32, DEVICE) for tensors in case(7, 3))
    kernels.forward(*given)
    kernels.backward(False, drawn[:3], *given)
    kernels.backward_backward(drawn[3:], drawn[:3], *given)
    assert started == ["_forward_kernel", "_backward_kernel", "_second_kernel"]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_op_takes_the_kernels_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    started, launch = [], runtime.launch
    monkeypatch.setattr(
        runtime, "launch", lambda *args, **options: (started.append(args[0]), launch(*args, **options))
    )
    vector, *constants = moved(case(300, 40)[0], torch.float32, DEVICE)
    vector.requires_grad_()
    with without_syncs():
        loss = sum(value.square().sum() for value in op._family(vector, *constants))
        (first,) = torch.autograd.grad(loss, vector, create_graph=True)
        first.square().sum().backward()
    assert len(started) >= 3 and vector.grad.isfinite().all()
