# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton bodies of `fastchgnet.ops.pair_forces` on fp32 vectors, with sums in fp64; symbols as there.

Forward, a program takes some atoms, eight of their edges at a time; backward, a tile of bonds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    force, arm, pull, edge_bond, edge_sign, atom_edge, out, n_atoms, ATOMS: tl.constexpr, STEP: tl.constexpr
):
    lane = tl.arange(0, ATOMS * STEP)
    first_atom = tl.program_id(0).to(tl.int64) * ATOMS
    atom = first_atom + lane // STEP
    live = atom < n_atoms
    first = tl.load(atom_edge + atom, mask=live, other=0)
    end = tl.load(atom_edge + atom + 1, mask=live, other=0)
    edge, longest = first + lane % STEP, tl.max(end - first)
    none = tl.zeros([ATOMS * STEP], tl.float64)
    forces = (none, none, none)
    xx, xy, xz, yx, yy, yz, zx, zy, zz = none, none, none, none, none, none, none, none, none
    done = longest * 0
    while done < longest:
        inside = edge < end
        bond = tl.load(edge_bond + edge, mask=inside, other=0)
        sign = tl.load(edge_sign + edge, mask=inside, other=0).to(tl.float64)
        f = _vector(force, bond, inside)
        forces = forces[0] + sign * f[0], forces[1] + sign * f[1], forces[2] + sign * f[2]
        r, g = _vector(arm, bond, inside), _vector(pull, bond, inside)
        x, y, z = r[0].to(tl.float64), r[1].to(tl.float64), r[2].to(tl.float64)
        xx, xy, xz = xx + x * g[0], xy + x * g[1], xz + x * g[2]
        yx, yy, yz = yx + y * g[0], yy + y * g[1], yz + y * g[2]
        zx, zy, zz = zx + z * g[0], zy + z * g[1], zz + z * g[2]
        edge += STEP
        done += STEP
    atom = first_atom + tl.arange(0, ATOMS)
    virials = (xx, xy, xz, yx, yy, yz, zx, zy, zz)
    for k in tl.static_range(3):
        total = tl.sum(forces[k].reshape([ATOMS, STEP]), 1)
        tl.store(out + atom * 12 + k, total, mask=atom < n_atoms)
    for k in tl.static_range(9):
        total = tl.sum(virials[k].reshape([ATOMS, STEP]), 1)
        tl.store(out + atom * 12 + 3 + k, 0.5 * total, mask=atom < n_atoms)


@triton.jit(do_not_specialize=["n_bonds"])
def _backward_kernel(
    arm, pull, grad, center, neighbor, by_force, by_arm, by_pull, n_bonds, BLOCK: tl.constexpr
):
    bond = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = bond < n_bonds
    i = grad + tl.load(center + bond, mask=live, other=0) * 12
    j = grad + tl.load(neighbor + bond, mask=live, other=0) * 12
    r, g = _vector(arm, bond, live), _vector(pull, bond, live)
    none = tl.zeros([BLOCK], tl.float64)
    of_pull = (none, none, none)
    for a in tl.static_range(3):
        found = tl.load(i + a, mask=live, other=0.0) - tl.load(j + a, mask=live, other=0.0)
        tl.store(by_force + bond * 3 + a, found.to(tl.float32), mask=live)
        at = 3 + 3 * a
        x = tl.load(i + at, mask=live, other=0.0) + tl.load(j + at, mask=live, other=0.0)
        y = tl.load(i + at + 1, mask=live, other=0.0) + tl.load(j + at + 1, mask=live, other=0.0)
        z = tl.load(i + at + 2, mask=live, other=0.0) + tl.load(j + at + 2, mask=live, other=0.0)
        found = 0.5 * (x * g[0] + y * g[1] + z * g[2])
        tl.store(by_arm + bond * 3 + a, found.to(tl.float32), mask=live)
        of_pull = of_pull[0] + x * r[a], of_pull[1] + y * r[a], of_pull[2] + z * r[a]
    for b in tl.static_range(3):
        tl.store(by_pull + bond * 3 + b, (0.5 * of_pull[b]).to(tl.float32), mask=live)


def forward(
    force: Tensor,
    arm: Tensor,
    pull: Tensor,
    bond_center: Tensor,
    bond_neighbor: Tensor,
    edge_bond: Tensor,
    edge_sign: Tensor,
    atom_edge: Tensor,
) -> Tensor:
    n_atoms = len(atom_edge) - 1
    out = force.new_empty(n_atoms, 12, dtype=torch.float64)
    given = (t.contiguous() for t in (force, arm, pull, edge_bond, edge_sign, atom_edge))
    n_programs = max(1, triton.cdiv(n_atoms, ATOMS))
    runtime.launch(
        _forward_kernel, n_programs, out.device, *given, out, n_atoms, ATOMS=ATOMS, STEP=STEP, num_warps=WARPS
    )
    return out


def backward(
    arm: Tensor, pull: Tensor, grad: Tensor, bond_center: Tensor, bond_neighbor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found = arm.new_empty(arm.shape), arm.new_empty(arm.shape), arm.new_empty(arm.shape)
    given = (t.contiguous() for t in (arm, pull, grad, bond_center, bond_neighbor))
    n_programs = max(1, triton.cdiv(len(arm), ROWS))
    runtime.launch(
        _backward_kernel, n_programs, arm.device, *given, *found, len(arm), BLOCK=ROWS, num_warps=WARPS
    )
    return found
