# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.huber`: tiles of every target in turn, sums of programs in fixed order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops.gpu import runtime
from fastchgnet.units import GPA

BLOCK = 256
PROGRAMS = 32
WARPS = 4

_GPA = tl.constexpr(GPA)


class Tables(NamedTuple):
    """Predictions, labels, and what belongs to crystals."""

    energy: Any
    forces: Any
    stress: Any
    magmoms: Any
    energy_label: Any
    forces_label: Any
    stress_label: Any
    magmoms_label: Any
    n_atoms: Any
    volume: Any


@triton.jit
def _difference(t, target: tl.constexpr, row, live):
    """Return d of some rows, whether their labels are present, and how d changes with the prediction."""
    p = tl.load(t[target] + row, mask=live, other=0.0).to(tl.float64)
    q = tl.load(t[target + 4] + row, mask=live, other=0.0).to(tl.float64)
    present = live & (q == q)
    slope = tl.full(row.shape, 1.0, tl.float64)
    if target == 0:
        slope = slope / tl.load(t.n_atoms + row, mask=live, other=1).to(tl.float64)
    if target == 2:
        volume = tl.load(t.volume + row // 9, mask=live, other=0.0)
        present &= volume == volume
        slope = slope / tl.full((), _GPA, tl.float64)
    if target == 3:
        slope = tl.where(p > 0, slope, tl.where(p < 0, -slope, 0.0))
        p, q = tl.abs(p), tl.abs(q)
        return tl.where(present, p - q, 0.0), present, slope
    return tl.where(present, (p - q) * slope, 0.0), present, slope


@triton.jit(do_not_specialize=["n_systems", "n_atoms"])
def _forward_kernel(t, out, n_systems, n_atoms, DELTA: tl.constexpr, BLOCK: tl.constexpr):
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    delta = tl.full((), DELTA, tl.float64)
    sizes = (n_systems, 3 * n_atoms, 9 * n_systems, n_atoms)
    for target in tl.static_range(4):
        none = tl.zeros([BLOCK], tl.float64)
        huber, absolute, count = none, none, none
        first = program * BLOCK
        while first < sizes[target]:
            row = first + tl.arange(0, BLOCK)
            d, present, _ = _difference(t, target, row, row < sizes[target])
            size = tl.abs(d)
            huber += tl.where(size < delta, 0.5 * d * d, delta * (size - 0.5 * delta))
            absolute += size
            count += present.to(tl.float64)
            first += n_programs * BLOCK
        tl.store(out + program * 12 + target, tl.sum(huber))
        tl.store(out + program * 12 + 4 + target, tl.sum(absolute))
        tl.store(out + program * 12 + 8 + target, tl.sum(count))


@triton.jit(do_not_specialize=["n_systems", "n_atoms"])
def _backward_kernel(t, grad, found, n_systems, n_atoms, DELTA: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    delta = tl.full((), DELTA, tl.float64)
    sizes = (n_systems, 3 * n_atoms, 9 * n_systems, n_atoms)
    for target in tl.static_range(4):
        n_blocks = tl.cdiv(sizes[target], BLOCK)
        if (block >= 0) & (block < n_blocks):
            row = block * BLOCK + tl.arange(0, BLOCK)
            live = row < sizes[target]
            d, _, slope = _difference(t, target, row, live)
            d = tl.where(d > delta, delta, tl.where(d < -delta, -delta, d))
            value = tl.load(grad + target) * d * slope
            tl.store(found[target] + row, value.to(found[target].dtype.element_ty), mask=live)
        block -= n_blocks


def forward(*inputs: Any) -> Tensor:
    *tensors, delta = inputs
    t = Tables(*(tensor.contiguous() for tensor in tensors))
    partial = t.energy.new_empty(PROGRAMS, 12, dtype=torch.float64)
    sizes = len(t.energy), len(t.magmoms)
    runtime.launch(
        _forward_kernel,
        PROGRAMS,
        partial.device,
        t,
        partial,
        *sizes,
        DELTA=delta,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return partial.sum(0).view(3, 4)


def backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, delta = inputs
    t = Tables(*(tensor.contiguous() for tensor in tensors))
    found = tuple(table.new_empty(table.shape) for table in t[:4])
    n_programs = max(1, sum(triton.cdiv(table.numel(), BLOCK) for table in found))
    sizes = len(t.energy), len(t.magmoms)
    runtime.launch(
        _backward_kernel,
        n_programs,
        grad.device,
        t,
        grad,
        found,
        *sizes,
        DELTA=delta,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return found
