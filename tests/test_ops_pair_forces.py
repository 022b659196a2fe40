"""Sums over the bonds of each atom."""

from __future__ import annotations

import pytest
import torch
from crystals import crystals
from torch import Tensor

from fastchgnet.graph import Batch
from fastchgnet.neighbors import build_graph, systems_from_atoms
from fastchgnet.ops import pair_forces as op
from fastchgnet.ops.pair_forces import forces_and_stress, reference

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


def arguments(n_bonds: int, n: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Pulls, arms and the graph: all atoms are of the second of three crystals."""
    generator = torch.Generator().manual_seed(n_bonds)
    pulls, arm = (
        torch.randn(n_bonds, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((n, 3), (3,))
    )
    volume = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    return [pulls, arm, *graph(n_bonds), torch.ones(4, dtype=torch.long), torch.tensor([0, 0, 4, 4]), volume]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("n_bonds", [0, 1, 7])
def test_values_and_gradients_are_those_of_the_reference(n_bonds: int, n: int) -> None:
    given = arguments(n_bonds, n)
    ours, expected = op._pair_forces(*given), reference(*given)
    torch.testing.assert_close(ours, expected, **EXACT)
    grads = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(
        torch.autograd.grad(ours, given[:2], grads), torch.autograd.grad(expected, given[:2], grads), **EXACT
    )


@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_may_know_one_of_both(which: int) -> None:
    given = arguments(7)
    ours, expected = (
        torch.autograd.grad(function(*given)[which].tanh().sum(), given[:2], materialize_grads=True)
        for function in (op._pair_forces, reference)
    )
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("n", [1, 2])
def test_gradcheck_and_the_library(n: int) -> None:
    given = arguments(7, n)
    assert torch.autograd.gradcheck(lambda *v: op._pair_forces(*v, *given[2:]), given[:2])
    torch.library.opcheck(op._pair_forces, given)
    pulls, arm, center, neighbor, *_, system, _, volume = (t.detach() for t in given)
    grads = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 3, 3, dtype=torch.float64)
    torch.library.opcheck(op._pair_forces_backward, [pulls, arm, *grads, center, neighbor, system, volume])


def test_single_precision_is_added_up_in_double() -> None:
    given = arguments(7, dtype=torch.float32)
    found = op._pair_forces(*given)
    exact = reference(*(t.double() if t.is_floating_point() else t for t in given))
    # rounded once, at the end
    torch.testing.assert_close(found, tuple(t.float() for t in exact), rtol=1.2e-7, atol=0)
    gradients = torch.autograd.grad(found[0].sum() + found[1].sum(), given[:2])
    assert {g.dtype for g in gradients} == {torch.float32}


def test_a_missing_volume_sends_nothing() -> None:
    given = arguments(7)
    given[-1][1] = torch.nan
    forces, stress = op._pair_forces(*given)
    assert stress[1].isnan().all() and not stress[::2].isnan().any() and not forces.isnan().any()
    by_pulls, by_arm = torch.autograd.grad(stress.nansum(), given[:2])
    assert not by_pulls.any() and not by_arm.any()


def test_a_second_derivative_raises() -> None:
    given = arguments(7)
    (first,) = torch.autograd.grad(op._pair_forces(*given)[0].square().sum(), given[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="one derivative more"):
        first.sum().backward()


def test_forces_and_stress_of_crystals() -> None:
    """A spring between every two atoms within 4 A: no net force, and the virial of all bonds."""
    batch: Batch = build_graph(systems_from_atoms(crystals()), 4.0, 3.0)
    vector = batch.bond_vector
    pull = vector * (vector.norm(dim=1, keepdim=True) - 2)
    forces, stress = forces_and_stress(pull[:, None], vector, batch)
    assert forces.abs().max() > 1
    torch.testing.assert_close(forces.sum(0), torch.zeros(3, dtype=torch.float64), **EXACT)
    for number, found in enumerate(stress):
        mine = batch.bond_system == number
        virial = vector[mine].t() @ pull[mine]
        torch.testing.assert_close(found * batch.volume[number], virial, rtol=1e-12, atol=1e-9)
    given = [pull[:, None].requires_grad_(), vector.requires_grad_()]
    given += [getattr(batch, name) for name in op._Graph._fields]
    ours, expected = (
        torch.autograd.grad(function(*given)[1].sin().sum(), given[:2])
        for function in (op._pair_forces, reference)
    )
    torch.testing.assert_close(ours, expected, **EXACT)
