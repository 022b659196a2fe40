"""What interpreted kernels must not do, as a GPU would not do the same, is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, nan_filled  # noqa: F401, a fixture for every test here

if DEVICE != "cpu":
    pytest.skip("is for the interpreter", allow_module_level=True)

import triton
import triton.language as tl
from watched import Fault

N = 8


@triton.jit
def _each_its_own(x, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, tl.load(x + at) + tl.load(out + at))


@triton.jit
def _in_order(x, out, N: tl.constexpr):
    before = tl.load(out + tl.program_id(0))
    tl.store(out + tl.program_id(0) + 1, before + tl.load(x))


@triton.jit
def _the_same(x, out, N: tl.constexpr):
    tl.store(out + tl.program_id(0) // 2, tl.load(x))


@triton.jit
def _two_lanes(x, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at // 2, tl.load(x + at))


@triton.jit
def _back(x, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, tl.load(x + at))
    tl.store(x + at, tl.load(out + at))


@triton.jit
def _turned(x, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    turned = tl.program_id(0) * N + N - 1 - tl.arange(0, N)
    tl.store(out + turned, tl.load(out + at))


@triton.jit
def _too_far(x, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N) + 1
    tl.store(out + at, tl.load(x + at - 1))


@triton.jit
def _open(x, out, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out + lane, tl.load(x + lane, mask=lane < 3) + tl.load(x + lane, mask=lane < 3, other=0.0))


@triton.jit
def _open_scalar(x, out, N: tl.constexpr):
    tl.store(out, tl.load(x, mask=tl.program_id(0) > 0))
    tl.store(out + 1, tl.load(x, mask=tl.program_id(0) > 0, other=0))


@triton.jit
def _least(x, out, N: tl.constexpr):
    tl.store(out, tl.minimum(tl.load(x), 1.0))
    tl.store(out + 1, tl.minimum(tl.load(x), 1.0, propagate_nan=tl.PropagateNan.ALL))


def run(kernel: Any, n_programs: int, x: torch.Tensor, out: torch.Tensor) -> None:
    kernel[(n_programs,)](x, out, N=N)


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (_in_order, "reads what another program writes"),
        (_the_same, "writes an element twice"),
        (_two_lanes, "writes an element twice"),
        (_back, "reads what it has written"),
        (_turned, "writes from one lane what it has read from another"),
        (_too_far, "touches memory beyond the tensors"),
    ],
)
def test_faults_are_found(kernel: Any, found: str) -> None:
    with pytest.raises(Fault, match=f"{kernel.__name__} {found}"):
        run(kernel, 2, torch.ones(2 * N), torch.ones(2 * N))


def test_what_is_right_is_let_through() -> None:
    x, out = torch.rand(2 * N), torch.rand(2 * N)
    expected = x + out
    run(_each_its_own, 2, x, out)
    assert torch.equal(out, expected)


def test_what_a_mask_leaves_open_is_no_number() -> None:
    out = torch.zeros(N)
    run(_open, 1, torch.ones(N), out)
    assert out[:3].tolist() == [2.0] * 3 and out[3:].isnan().all()
    run(_open_scalar, 1, torch.ones(N), out)
    assert out[0].isnan() and out[1] == 0


def test_the_lesser_of_a_number_and_nan_is_the_number() -> None:
    out = torch.zeros(2)
    run(_least, 1, torch.full((1,), torch.nan), out)
    assert out[0] == 1 and out[1].isnan()


def test_memory_that_nobody_has_written_holds_anything() -> None:
    made = [torch.empty(3), torch.ones(3).new_empty(2, 2), torch.empty_like(torch.ones(3))]
    assert all(tensor.isnan().all() for tensor in made)
    assert (torch.empty(3, dtype=torch.int64) < -(10**12)).all() and torch.empty(1, dtype=torch.bool).all()
