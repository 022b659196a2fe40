"""Triton bodies of the energy readout against the PyTorch ones, at every level."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from interpreted import DEVICE, nan_filled, without_syncs  # noqa: F401, a fixture for every test here
from test_ops_readout import arguments
from torch import Tensor

from fastchgnet.ops import _readout_torch, readout
from fastchgnet.ops.gpu import readout as gpu_readout
from fastchgnet.ops.gpu import runtime

# Relative to the length of each result, against float64: a few roundings of 6e-8, times what norms of
# single rows and three layers make of them.
FP32 = 1e-5


def inputs_of(n_rows: int, n_layers: int, has_norm: bool, d: int = 16) -> tuple[Any, ...]:
    features, parameters, *constants = arguments(n_rows, [d] * n_layers, has_norm, d, torch.float32)
    return features.detach().to(DEVICE), parameters.detach().to(DEVICE), *constants


def drawn(features: Tensor) -> tuple[Tensor, Tensor]:
    """Draw gradients of both outputs, the one of the slope transposed in memory."""
    torch.manual_seed(1)
    n_rows, d = features.shape
    return torch.randn(n_rows, device=DEVICE), torch.randn(d, n_rows, device=DEVICE).t()


def levels(bodies: Any, inputs: tuple[Any, ...], grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Return every result that the bodies can be asked for."""
    found = [*bodies.forward(*inputs, True), *bodies.forward(*inputs, False)]
    for with_parameters, by_y, by_slope in itertools.product(
        (True, False), (grads[0], None), (grads[1], None)
    ):
        found += bodies.backward(with_parameters, by_y, by_slope, *inputs)
    return found


def widened(tensors: Any) -> tuple[Any, ...]:
    return tuple(t.double() if isinstance(t, Tensor) else t for t in tensors)


def check(inputs: tuple[Any, ...]) -> None:
    grads = drawn(inputs[0])
    expected = levels(_readout_torch, widened(inputs), widened(grads))
    for ours, theirs in zip(levels(gpu_readout, inputs, grads), expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= FP32 * theirs.norm()


@pytest.mark.parametrize("n_rows", [0, 1, 16, 33])
@pytest.mark.parametrize("n_layers", [0, 1, 3])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no norm"])
def test_all_levels_are_those_of_pytorch(n_rows: int, n_layers: int, has_norm: bool) -> None:
    check(inputs_of(n_rows, n_layers, has_norm))


@pytest.mark.parametrize("d", [32, 64])
def test_wider_networks(d: int) -> None:
    check(inputs_of(17, 3, True, d))


def test_an_atom_s_results_do_not_depend_on_those_behind_it() -> None:
    features, *others = inputs_of(40, 3, True)
    both = (gpu_readout.forward(v, *others, True) for v in (features, features[:21]))
    for long, short in zip(*both, strict=True):
        assert torch.equal(long[:21], short)


@pytest.mark.parametrize("widths", [[4, 4], [16, 32]], ids=str)
def test_other_widths_are_pytorch_s(widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "launch", None)
    features, parameters, *constants = arguments(3, widths, True, widths[0], torch.float32)
    inputs = (features.detach(), parameters.detach(), *constants)
    grads = (torch.randn(3), torch.randn(3, widths[0]))
    found, expected = (levels(bodies, inputs, grads) for bodies in (gpu_readout, _readout_torch))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("n_rows", [0, 100])
def test_one_launch_each_whatever_the_rows(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        started.append(kernel.__name__)

    monkeypatch.setattr(runtime, "launch", launch)
    inputs = inputs_of(n_rows, 3, True)
    grads = drawn(inputs[0])
    gpu_readout.forward(*inputs, True)
    gpu_readout.backward(False, *grads, *inputs)
    gpu_readout.backward(True, *grads, *inputs)
    assert started == ["_forward_kernel", "_backward_kernel", "_backward_kernel"]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_results_repeat_bit_for_bit_in_a_graph() -> None:
    inputs = inputs_of(2000, 3, True, 64)
    grads = drawn(inputs[0])
    with without_syncs():
        expected = levels(gpu_readout, inputs, grads)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = levels(gpu_readout, inputs, grads)
        graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_op_takes_the_kernels_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    launch = runtime.launch

    def counted(kernel: Any, *args: Any, **options: Any) -> None:
        started.append(kernel.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(runtime, "launch", counted)
    features, parameters, *constants = inputs_of(65, 3, True, 64)
    features.requires_grad_(), parameters.requires_grad_()
    y = readout.fused_readout(features, parameters, *constants)
    (slope,) = torch.autograd.grad(y.sum(), features, create_graph=True)
    (y.sum() + slope.square().sum()).backward()
    assert set(started) == {"_forward_kernel", "_backward_kernel"}
