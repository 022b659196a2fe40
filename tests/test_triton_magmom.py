"""Triton bodies of magnetic moments against the PyTorch ones."""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, nan_filled  # noqa: F401, a fixture for every test here
from test_ops_magmom import arguments
from torch import Tensor

from fastchgnet.ops import magmom
from fastchgnet.ops.gpu import magmom as kernels


@pytest.mark.parametrize(("n", "width"), [(0, 16), (1, 16), (33, 64), (7, 24)])
def test_values_and_gradients(n: int, width: int) -> None:
    given = [t.detach() for t in arguments(n, width)]
    grad = torch.randn(n, dtype=torch.float64)
    exact: list[Tensor] = [magmom.reference(*given), *magmom._backward(grad, *given)]
    single = [t.to(DEVICE, torch.float32) for t in (grad, *given)]
    ours = [kernels.forward(*single[1:]), *kernels.backward(*single)]
    for one, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.cpu(), expected.float(), rtol=1e-5, atol=1e-5)


def test_no_gradient_where_there_is_no_moment() -> None:
    features, weight, bias = (torch.zeros(n, device=DEVICE) for n in ((3, 16), (1, 16), (1,)))
    weight += 1
    found = kernels.backward(torch.ones(3, device=DEVICE), features, weight, bias)
    assert not any(t.any() for t in found)
