"""Sums over the bonds of each atom."""

from __future__ import annotations

import pytest
import torch
from crystals import crystals
from torch import Tensor

from fastchgnet.graph import Batch
from fastchgnet.neighbors import build_graph, systems_from_atoms
from fastchgnet.ops import pair_forces as op
from fastchgnet.ops.pair_forces import forces_and_virials, reference

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # fp64 rounding


def graph(n_bonds: int) -> list[Tensor]:
    """Bonds between four atoms of which one has none and one is bonded to its own image."""
    center, neighbor = torch.tensor([[2, 0, 3, 0, 0, 2, 3], [0, 0, 0, 3, 2, 2, 0]])[:, :n_bonds].clone()
    edge_center = torch.cat([center, neighbor])
    order = edge_center.argsort(stable=True)
    sign = torch.ones(2 * n_bonds, dtype=torch.int8)
    sign[n_bonds:] = -1
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(edge_center, minlength=4).cumsum(0)])
    return [center, neighbor, torch.arange(n_bonds).repeat(2)[order], sign[order], start]


def arguments(n_bonds: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n_bonds)
    vectors = torch.randn(3, n_bonds, 3, generator=generator, dtype=torch.float64).to(dtype)
    return [*(v.clone().requires_grad_() for v in vectors), *graph(n_bonds)]


@pytest.mark.parametrize("n_bonds", [0, 1, 7])
def test_values_and_gradients_are_those_of_the_reference(n_bonds: int) -> None:
    given = arguments(n_bonds)
    ours, expected = op._pair_forces(*given), reference(*given)
    torch.testing.assert_close(ours, expected, **EXACT)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, given[:3], grad), torch.autograd.grad(expected, given[:3], grad), **EXACT
    )


def test_gradcheck_and_the_library() -> None:
    *vectors, _, _, _, _, _ = given = arguments(7)
    assert torch.autograd.gradcheck(lambda *v: op._pair_forces(*v, *given[3:]), vectors)
    torch.library.opcheck(op._pair_forces, given)
    grad = torch.randn(4, 12, dtype=torch.float64)
    arm, pull, *ends = (t.detach() for t in given[1:5])
    torch.library.opcheck(op._pair_forces_backward, [arm, pull, grad, *ends])


def test_one_tensor_may_be_force_and_pull() -> None:
    force, arm, _, *rest = arguments(7)
    ours, expected = (
        torch.autograd.grad(function(force, arm, force, *rest).tanh().sum(), force)
        for function in (op._pair_forces, reference)
    )
    torch.testing.assert_close(ours, expected, **EXACT)


def test_single_precision_is_added_up_in_double() -> None:
    given = arguments(7, torch.float32)
    found = op._pair_forces(*given)
    exact = reference(*(t.double() if t.is_floating_point() else t for t in given))
    torch.testing.assert_close(found, exact, **EXACT)
    gradients = torch.autograd.grad(found.sum(), given[:3])
    assert {g.dtype for g in gradients} == {torch.float32}


def test_a_second_derivative_raises() -> None:
    given = arguments(7)
    (first,) = torch.autograd.grad(op._pair_forces(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="one derivative more"):
        first.sum().backward()


def test_forces_and_virials_of_crystals() -> None:
    """A spring between every two atoms within 4 A: no net force, and the virial of all bonds."""
    batch: Batch = build_graph(systems_from_atoms(crystals()), 4.0, 3.0)
    vector = batch.bond_vector
    pull = vector * (vector.norm(dim=1, keepdim=True) - 2)
    forces, virials = forces_and_virials(pull, vector, pull, batch)
    assert forces.abs().max() > 1
    torch.testing.assert_close(forces.sum(0), torch.zeros(3, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(virials.sum(0), vector.t() @ pull, rtol=1e-12, atol=1e-9)
