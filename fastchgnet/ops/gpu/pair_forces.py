# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.pair_forces` on fp32 vectors, with sums in fp64; symbols as there.

Forward, a program takes some atoms, eight of their edges at a time, and then one takes a crystal, some of its
atoms at a time; backward, a program takes a tile of bonds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastchgnet.ops import pair_forces
from fastchgnet.ops.gpu import runtime

ATOMS = 8
STEP = 8
ROWS = 64
WARPS = 2


@triton.jit
def _vector(table, row, live):
    at = table + row * 3
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + 1, mask=live, other=0.0),
        tl.load(at + 2, mask=live, other=0.0),
    )


@triton.jit(do_not_specialize=["n_atoms"])
def _forward_kernel(
    pulls,
    arm,
    edge_bond,
    edge_sign,
    atom_edge,
    forces,
    virials,
    n_atoms,
    N: tl.constexpr,
    ATOMS: tl.constexpr,
    STEP: tl.constexpr,
):
    lane = tl.arange(0, ATOMS * STEP)
    first_atom = tl.program_id(0).to(tl.int64) * ATOMS
    atom = first_atom + lane // STEP
    live = atom < n_atoms
    first = tl.load(atom_edge + atom, mask=live, other=0)
    end = tl.load(atom_edge + atom + 1, mask=live, other=0)
    edge, longest = first + lane % STEP, tl.max(end - first)
    none = tl.zeros([ATOMS * STEP], tl.float64)
    force = (none, none, none)
    xx, xy, xz, yx, yy, yz, zx, zy, zz = none, none, none, none, none, none, none, none, none
    done = longest * 0
    while done < longest:
        inside = edge < end
        bond = tl.load(edge_bond + edge, mask=inside, other=0)
        sign = tl.load(edge_sign + edge, mask=inside, other=0).to(tl.float64)
        f = _vector(pulls, bond * N, inside)
        force = force[0] + sign * f[0], force[1] + sign * f[1], force[2] + sign * f[2]
        r, g = _vector(arm, bond, inside), _vector(pulls, bond * N + N - 1, inside)
        x, y, z = r[0].to(tl.float64), r[1].to(tl.float64), r[2].to(tl.float64)
        xx, xy, xz = xx + x * g[0], xy + x * g[1], xz + x * g[2]
        yx, yy, yz = yx + y * g[0], yy + y * g[1], yz + y * g[2]
        zx, zy, zz = zx + z * g[0], zy + z * g[1], zz + z * g[2]
        edge += STEP
        done += STEP
    atom = first_atom + tl.arange(0, ATOMS)
    virial = (xx, xy, xz, yx, yy, yz, zx, zy, zz)
    for k in tl.static_range(3):
        total = tl.sum(force[k].reshape([ATOMS, STEP]), 1)
        tl.store(forces + atom * 3 + k, total.to(tl.float32), mask=atom < n_atoms)
    for k in tl.static_range(9):
        total = tl.sum(virial[k].reshape([ATOMS, STEP]), 1)
        tl.store(virials + atom * 9 + k, 0.5 * total, mask=atom < n_atoms)


@triton.jit
def _stress_kernel(virials, system_start, volume, stress, ROWS: tl.constexpr):
    system = tl.program_id(0).to(tl.int64)
    first, end = tl.load(system_start + system), tl.load(system_start + system + 1)
    column = tl.arange(0, 16)
    total = tl.zeros([ROWS, 16], tl.float64)
    while first < end:
        atom = first + tl.arange(0, ROWS)
        inside = (atom < end)[:, None] & (column < 9)[None, :]
        total += tl.load(virials + atom[:, None] * 9 + column[None, :], mask=inside, other=0.0)
        first += ROWS
    # a volume that is missing is not a number
    found = tl.sum(total, 0) / tl.load(volume + system)
    tl.store(stress + system * 9 + column, found.to(tl.float32), mask=column < 9)


@triton.jit(do_not_specialize=["n_bonds"])
def _backward_kernel(
    pulls,
    arm,
    by_forces,
    by_stress,
    center,
    neighbor,
    atom_system,
    volume,
    by_pulls,
    by_arm,
    n_bonds,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    bond = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = bond < n_bonds
    i = tl.load(center + bond, mask=live, other=0)
    j = tl.load(neighbor + bond, mask=live, other=0)
    system = tl.load(atom_system + i, mask=live, other=0)
    v = tl.load(volume + system, mask=live, other=1.0)
    scale = tl.where(v == v, 1.0 / v, 0.0)
    r, g = _vector(arm, bond, live), _vector(pulls, bond * N + N - 1, live)
    none = tl.zeros([BLOCK], tl.float64)
    of_pull = (none, none, none)
    for a in tl.static_range(3):
        y = _vector(by_stress, system * 3 + a, live)
        y = y[0] * scale, y[1] * scale, y[2] * scale
        found = y[0] * g[0] + y[1] * g[1] + y[2] * g[2]
        tl.store(by_arm + bond * 3 + a, found.to(tl.float32), mask=live)
        of_pull = of_pull[0] + y[0] * r[a], of_pull[1] + y[1] * r[a], of_pull[2] + y[2] * r[a]
    x_i, x_j = _vector(by_forces, i, live), _vector(by_forces, j, live)
    for b in tl.static_range(3):
        of_force = x_i[b].to(tl.float64) - x_j[b]
        at = by_pulls + bond * 3 * N + b
        if N == 1:
            tl.store(at, (of_force + of_pull[b]).to(tl.float32), mask=live)
        else:
            tl.store(at, of_force.to(tl.float32), mask=live)
            tl.store(at + 3, of_pull[b].to(tl.float32), mask=live)


def forward(pulls: Tensor, arm: Tensor, *graph: Tensor) -> tuple[Tensor, Tensor]:
    g = pair_forces._Graph(*(t.contiguous() for t in graph))
    n_atoms, n_systems = len(g.atom_system), len(g.volume)
    forces, stress = arm.new_empty(n_atoms, 3), arm.new_empty(n_systems, 3, 3)
    virials = arm.new_empty(n_atoms, 9, dtype=torch.float64)
    runtime.launch(
        _forward_kernel,
        max(1, triton.cdiv(n_atoms, ATOMS)),
        arm.device,
        *(t.contiguous() for t in (pulls, arm)),
        *(g.edge_bond, g.edge_sign, g.atom_edge, forces, virials, n_atoms),
        N=pulls.shape[1],
        ATOMS=ATOMS,
        STEP=STEP,
        num_warps=WARPS,
    )
    if n_systems:
        runtime.launch(
            *(_stress_kernel, n_systems, arm.device, virials, g.system_start, g.volume, stress),
            ROWS=ROWS,
            num_warps=WARPS,
        )
    return forces, stress


def backward(pulls: Tensor, arm: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    found = pulls.new_empty(pulls.shape), arm.new_empty(arm.shape)
    given = (t.contiguous() for t in (pulls, arm, *others))
    runtime.launch(
        _backward_kernel,
        max(1, triton.cdiv(len(arm), ROWS)),
        arm.device,
        *given,
        *found,
        len(arm),
        N=pulls.shape[1],
        BLOCK=ROWS,
        num_warps=WARPS,
    )
    return found
