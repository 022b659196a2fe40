# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton body of `fastchgnet.train.resident.ResidentFrames.gather`: one launch for all frames of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.device_graph import SpareSystems
from fastchgnet.graph import Labels
from fastchgnet.ops.gpu import runtime
from fastchgnet.units import MATRIX_FROM_VOIGT

TILE = 8192
"""Atoms times systems that a program compares at once; with many systems it takes few atoms."""
MOST = 64
WARPS = 2

_MATRIX = tl.constexpr(tuple(MATRIX_FROM_VOIGT))


class Frames(NamedTuple):
    """Arrays of a store."""

    pointer: Any
    atomic_number: Any
    position: Any
    cell: Any
    pbc: Any
    energy: Any
    forces: Any
    stress: Any
    magmoms: Any


class Out(NamedTuple):
    """Systems and labels of a batch."""

    atomic_number: Any
    position: Any
    cell: Any
    pbc: Any
    start: Any
    n_systems: Any
    energy: Any
    forces: Any
    stress: Any
    magmoms: Any


@triton.jit
def _gather_systems(frames, numbers, out, n_systems, SYSTEMS: tl.constexpr):
    """Write everything of systems, and return their first atoms."""
    lane = tl.arange(0, SYSTEMS)
    number = tl.load(numbers + lane, mask=lane < n_systems, other=-1)
    real = number >= 0
    first = tl.load(frames.pointer + number, mask=real, other=0)
    n_atoms = tl.load(frames.pointer + number + 1, mask=real, other=0) - first
    end = tl.cumsum(n_atoms)
    if tl.program_id(0) == 0:
        live = lane < n_systems
        tl.store(out.start + lane, end - n_atoms, mask=live)
        tl.store(out.start + lane + 1, end, mask=lane == n_systems - 1)
        tl.store(out.n_systems, tl.sum(real.to(tl.int64)))
        missing = float("nan")
        tl.store(out.energy + lane, tl.load(frames.energy + number, mask=real, other=missing), mask=live)
        for k in tl.static_range(3):
            value = tl.load(frames.pbc + number * 3 + k, mask=real, other=0)
            tl.store(out.pbc + lane * 3 + k, value, mask=live)
        for k in tl.static_range(9):
            value = tl.load(frames.cell + number * 9 + k, mask=real, other=0.0)
            tl.store(out.cell + lane * 9 + k, value, mask=live)
            value = tl.load(frames.stress + number * 6 + _MATRIX[k], mask=real, other=missing)
            tl.store(out.stress + lane * 9 + k, value, mask=live)
    return first, n_atoms, end


@triton.jit
def _gather_kernel(frames, numbers, out, n_systems, n_atoms, SYSTEMS: tl.constexpr, BLOCK: tl.constexpr):
    first, length, end = _gather_systems(frames, numbers, out, n_systems, SYSTEMS)
    atom = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # the one system that each atom lies in adds its shift; spare systems have no atoms
    inside = (atom[:, None] >= (end - length)[None, :]) & (atom[:, None] < end[None, :])
    row = atom + tl.sum(tl.where(inside, (first - end + length)[None, :], 0), 1)
    real = tl.sum(inside.to(tl.int32), 1) > 0
    live = atom < n_atoms
    missing = float("nan")
    number = tl.load(frames.atomic_number + row, mask=live & real, other=0)
    tl.store(out.atomic_number + atom, number.to(tl.int64), mask=live)
    for k in tl.static_range(3):
        value = tl.load(frames.position + row * 3 + k, mask=live & real, other=0.0)
        tl.store(out.position + atom * 3 + k, value.to(tl.float64), mask=live)
        value = tl.load(frames.forces + row * 3 + k, mask=live & real, other=missing)
        tl.store(out.forces + atom * 3 + k, value, mask=live)
    value = tl.load(frames.magmoms + row, mask=live & real, other=missing)
    tl.store(out.magmoms + atom, value, mask=live)


def gather(numbers: Tensor, arrays: dict[str, Tensor], n_atoms: int) -> tuple[SpareSystems, Labels]:
    n_systems, device = len(numbers), numbers.device
    width = triton.next_power_of_2(n_systems)
    block = max(1, min(MOST, TILE // width))

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    out = Out(
        atomic_number=empty(torch.int64, n_atoms),
        position=empty(torch.float64, n_atoms, 3),
        cell=empty(torch.float64, n_systems, 3, 3),
        pbc=empty(torch.bool, n_systems, 3),
        start=empty(torch.int64, n_systems + 1),
        n_systems=empty(torch.int64, 1),
        energy=empty(torch.float64, n_systems),
        forces=empty(torch.float32, n_atoms, 3),
        stress=empty(torch.float32, n_systems, 3, 3),
        magmoms=empty(torch.float32, n_atoms),
    )
    runtime.launch(
        _gather_kernel,
        triton.cdiv(n_atoms, block),
        device,
        Frames(**arrays),
        numbers,
        out,
        n_systems,
        n_atoms,
        SYSTEMS=width,
        BLOCK=block,
        num_warps=WARPS,
    )
    systems = SpareSystems(out.atomic_number, out.position, out.cell, out.pbc, out.start, out.n_systems[0])
    return systems, Labels(out.energy, out.forces, out.stress, out.magmoms)
