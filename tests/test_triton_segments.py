"""Triton sums by segment against the PyTorch ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, nan_filled, without_syncs  # noqa: F401, a fixture for every test here
from test_ops_message import index
from torch import Tensor

from fastchgnet.graph import Index
from fastchgnet.ops import segments
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu import segments as gpu_segments


def made(segment: Tensor, n: int, is_sorted: bool) -> Index:
    return Index(*(None if t is None else t.to(DEVICE) for t in index(segment, n, is_sorted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 9, 64])
def test_sums_are_those_of_pytorch(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # segments of none, few and many rows, and a number of segments that no block divides
    segment = torch.cat([torch.full((37,), 1), torch.randint(3, 12, (60,))])
    rows = torch.randn(97, width, dtype=dtype, device=DEVICE)
    for by in (made(segment.sort().values, 14, True), made(segment, 14, False)):
        found = gpu_segments.segment_sum(rows, *by)
        expected = segments.reference(rows.double(), by)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=40 * tolerance)


@pytest.mark.parametrize(("n_rows", "n_segments"), [(0, 0), (0, 3), (1, 1), (65, 1)])
def test_few_rows_and_few_segments(n_rows: int, n_segments: int) -> None:
    rows = torch.randn(n_rows, 3, device=DEVICE)
    by = made(torch.zeros(n_rows, dtype=torch.long), n_segments, False)
    found = gpu_segments.segment_sum(rows, *by)
    torch.testing.assert_close(found, segments.reference(rows, by), rtol=1e-5, atol=1e-5)


def test_rows_and_their_order_may_lie_anywhere() -> None:
    rows = torch.randn(4, 20, device=DEVICE).t()
    by = made(torch.arange(20) % 3, 3, False)
    found = gpu_segments.segment_sum(rows, *by)
    torch.testing.assert_close(found, segments.reference(rows, by), rtol=1e-5, atol=1e-5)


def test_a_segment_sums_to_the_same_bits_in_any_company() -> None:
    rows = torch.randn(90, 8, device=DEVICE)
    alone = gpu_segments.segment_sum(rows[50:], *made(torch.zeros(40, dtype=torch.long), 1, True))
    among = gpu_segments.segment_sum(rows, *made(torch.arange(90).clamp(max=50), 51, True))
    assert torch.equal(alone[0], among[50])


def test_several_sums_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    started, launch = [], runtime.launch

    def counted(*args: Any, **options: Any) -> None:
        started.append(args)
        launch(*args, **options)

    monkeypatch.setattr(runtime, "launch", counted)
    rows = [torch.randn(30, width, device=DEVICE) for width in (4, 2, 4, 1, 8)]
    by = [made(torch.randint(n, (30,)), n, False) for n in (7, 1, 30, 4, 9)]
    found = gpu_segments.sum_all(
        [gpu_segments.Terms(r, s.start, s.order) for r, s in zip(rows, by, strict=True)]
    )
    assert len(started) == 1
    expected = [segments.reference(r, s) for r, s in zip(rows, by, strict=True)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_width_and_too_wide_rows_are_pytorch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "launch", None)
    by = made(torch.arange(20) % 3, 3, False)
    for width in (0, 300):
        rows = torch.randn(20, width)
        found = gpu_segments.segment_sum(rows, *by)
        torch.testing.assert_close(found, segments.reference(rows, by), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_shares", [1, 31, 70])
def test_sums_and_shares_are_added_to_what_there_is(n_shares: int) -> None:
    rows, by = torch.randn(30, 8, device=DEVICE), made(torch.randint(7, (30,)), 7, False)
    of_weights, of_biases = (torch.randn(n_shares, n, device=DEVICE) for n in (48, 16))
    onto = [torch.randn(*shape, device=DEVICE) for shape in ((7, 8), (3, 16))]
    wanted = [
        gpu_segments.Terms(rows, by.start, by.order, (onto[0], onto[0])),
        gpu_segments.shares(of_weights, 16, (onto[1],)),
        gpu_segments.shares(of_biases, 16, ()),
    ]
    found = gpu_segments.sum_all(wanted)
    expected = [segments.reference(rows, by) + 2 * onto[0], of_weights.sum(0).view(3, 16) + onto[1]]
    expected.append(of_biases.sum(0)[None])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_op_takes_the_kernel_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    started, launch = [], runtime.launch
    monkeypatch.setattr(
        runtime, "launch", lambda *args, **options: (started.append(args), launch(*args, **options))
    )
    rows, by = torch.randn(97, 3, device=DEVICE, requires_grad=True), made(torch.arange(97) % 5, 5, False)
    with without_syncs():
        segments.segment_sum(rows, by).sum().backward()
    assert len(started) == 1 and torch.equal(rows.grad, torch.ones_like(rows))
