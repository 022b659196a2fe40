"""Triton bodies of the pulls of direct heads against the PyTorch ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, nan_filled  # noqa: F401, a fixture for every test here
from test_ops_central_pulls import arguments
from torch import Tensor

from fastchgnet.ops import central_pulls
from fastchgnet.ops.gpu import central_pulls as kernels


def results(bodies: tuple[Any, Any], n: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    forward, backward = bodies
    given = arguments(n, torch.float64, width)
    given = tuple(t.detach().to(device, dtype) if isinstance(t, Tensor) else t for t in given)
    torch.manual_seed(2)
    by_pulls = torch.randn(n, 2, 3).to(device, dtype)
    return [t.cpu() for t in (*forward(*given), *backward(by_pulls, *given))]


@pytest.mark.parametrize(("n", "width"), [(0, 16), (1, 16), (31, 64), (100, 16), (7, 24)])
def test_values_and_gradients(n: int, width: int) -> None:
    ours = results((kernels.forward, kernels.backward), n, width, torch.float32, DEVICE)
    bodies = central_pulls.reference, central_pulls._backward
    exact = results(bodies, n, width, torch.float64, "cpu")
    for one, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, expected.float(), rtol=1e-5, atol=1e-5)
