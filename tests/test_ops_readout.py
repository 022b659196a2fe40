"""The energy readout: values, gradients and second derivatives against plain PyTorch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from fastchgnet.ops import _readout_torch as bodies
from fastchgnet.ops import readout as op
from fastchgnet.ops.derivatives import feature_derivatives
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.readout import fused_readout, pack, readout, reference

D = 5
# fp64 rounding; norms of single rows divide by a spread that may be small
EXACT = {"rtol": 1e-10, "atol": 1e-10}

rows = pytest.mark.parametrize("n_rows", [0, 1, 7])
networks = pytest.mark.parametrize("widths", [[], [4], [6, 3], [5, 5, 5]], ids=str)
norms = pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no norm"])


def arguments(
    n_rows: int, widths: list[int], has_norm: bool, d: int = D, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, list[int], bool]:
    generator = torch.Generator().manual_seed(n_rows)
    sizes = sum(a * b + b for a, b in itertools.pairwise([d, *widths, 1])) + 2 * d * has_norm
    parameters = torch.randn(sizes, generator=generator, dtype=dtype) / math.sqrt(d)
    features = torch.randn(n_rows, d, generator=generator, dtype=dtype)
    return features.requires_grad_(), parameters.requires_grad_(), widths, has_norm


@rows
@networks
@norms
def test_all_orders_are_those_of_the_reference(n_rows: int, widths: list[int], has_norm: bool) -> None:
    given = arguments(n_rows, widths, has_norm)
    features = given[0]

    def orders(function) -> list[Tensor]:
        torch.manual_seed(1)
        y = function(*given)
        grad = torch.randn_like(y).requires_grad_()
        first = torch.autograd.grad(y, given[:2], grad, retain_graph=True)
        with feature_derivatives():
            (slope,) = torch.autograd.grad(y, features, grad, create_graph=True)
        options = {"retain_graph": True, "materialize_grads": True}
        of_slope = torch.autograd.grad(slope.tanh().square().sum(), given[:2], **options)
        loss = slope.tanh().square().sum() + y.square().sum()
        return [y, *first, *of_slope, *torch.autograd.grad(loss, [grad, *given[:2]])]

    torch.testing.assert_close(orders(fused_readout), orders(reference), **EXACT)


@norms
def test_gradcheck(has_norm: bool) -> None:
    features, parameters, *constants = arguments(3, [4, 3], has_norm)

    def first(grad: Tensor, features: Tensor, parameters: Tensor) -> tuple[Tensor, ...]:
        with feature_derivatives():
            y = fused_readout(features, parameters, *constants)
            return torch.autograd.grad(y, features, grad, create_graph=True)

    assert torch.autograd.gradcheck(lambda v, p: fused_readout(v, p, *constants), (features, parameters))
    grad = torch.randn(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(first, (grad, features, parameters))


@norms
def test_the_library_accepts_both_ops(has_norm: bool) -> None:
    given = arguments(4, [4, 3], has_norm)
    torch.library.opcheck(op._readout, (*given, True))
    features, parameters, *constants = given
    plain = (features.detach(), parameters.detach(), *constants)
    torch.library.opcheck(op._readout, (*plain, False))
    grad, direction = torch.randn(4, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    for by_y, by_slope in ((grad, None), (None, direction), (grad, direction)):
        for with_parameters in (False, True):
            torch.library.opcheck(op._readout_backward, [with_parameters, by_y, by_slope, *plain])


def test_either_gradient_alone() -> None:
    given = [t.detach() if isinstance(t, Tensor) else t for t in arguments(4, [4, 3], True)]
    grad, direction = torch.randn(4, dtype=torch.float64), torch.randn(4, D, dtype=torch.float64)
    both = bodies.backward(True, grad, direction, *given)
    energies = bodies.backward(True, grad, torch.zeros_like(direction), *given)
    forces = bodies.backward(True, None, direction, *given)
    # each gradient is linear in both
    torch.testing.assert_close(both[0], energies[0] + forces[0], **EXACT)
    torch.testing.assert_close(both[1], energies[1] + forces[1], **EXACT)
    torch.testing.assert_close(bodies.backward(True, grad, None, *given)[1], energies[1], **EXACT)
    torch.testing.assert_close(bodies.backward(False, grad, direction, *given)[0], both[0], **EXACT)


def test_parameters_learn_from_features_that_have_no_derivative() -> None:
    features, parameters, *constants = arguments(4, [4], True)
    y, slope = op._readout(features.detach(), parameters, *constants, False)
    assert not slope.numel()
    (found,) = torch.autograd.grad(y.square().sum(), parameters)
    (expected,) = torch.autograd.grad(reference(features, parameters, *constants).square().sum(), parameters)
    torch.testing.assert_close(found, expected, **EXACT)


def test_there_is_no_third_derivative() -> None:
    features, parameters, *constants = arguments(4, [4], True)
    y = fused_readout(features, parameters, *constants)
    (first,) = torch.autograd.grad(y.sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        second.sum().backward()


def test_a_parameter_s_gradient_has_no_derivative() -> None:
    features, parameters, *constants = arguments(4, [4], True)
    y = fused_readout(features, parameters, *constants)
    (first,) = torch.autograd.grad(y.sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()


@norms
@pytest.mark.parametrize("widths", [[], [4, 3]], ids=str)
def test_modules_are_packed_in_their_order(widths: list[int], has_norm: bool) -> None:
    torch.manual_seed(0)
    hidden = [m for a, b in itertools.pairwise([D, *widths]) for m in (nn.Linear(a, b), nn.SiLU())]
    layers = nn.Sequential(*hidden, nn.Linear([D, *widths][-1], 1)).double()
    norm = (nn.LayerNorm(D) if has_norm else nn.Identity()).double()
    modules = nn.ModuleList([norm, layers])
    for parameter in modules.parameters():
        nn.init.normal_(parameter)
    features = torch.randn(6, D, dtype=torch.float64)
    assert pack(norm, layers)[1:] == (widths, has_norm)

    def orders(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y.square().sum(), list(modules.parameters()))]

    found = orders(fused_readout(features, *pack(norm, layers)))
    torch.testing.assert_close(found, orders(layers(norm(features))[:, 0]), **EXACT)
    torch.testing.assert_close(orders(readout(features, norm, layers)), found, **EXACT)


def test_the_op_serves_where_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    fused = op.fused_readout
    monkeypatch.setattr(op, "fused_readout", lambda *given: called.append(given) or fused(*given))
    norm, layers = nn.LayerNorm(D), nn.Sequential(nn.Linear(D, 1))
    plain = readout(torch.ones(3, D), norm, layers)
    assert not called
    monkeypatch.setattr(runtime, "serves", lambda tensor: True)
    torch.testing.assert_close(readout(torch.ones(3, D), norm, layers), plain)
    assert len(called) == 1
