"""The masked Huber loss: values, normalisation, and what a missing label must not do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ase.build import bulk, molecule

from fastchgnet.config import LossConfig
from fastchgnet.graph import Batch, Labels, Output
from fastchgnet.loss import Tally, empty_tally, tally, total_loss
from fastchgnet.neighbors import build_graph, systems_from_atoms
from fastchgnet.units import GPA

NAN = float("nan")


@pytest.fixture
def batch() -> Batch:
    """Two crystals and a molecule: 2 + 1 + 3 atoms."""
    atoms = [bulk("NaCl", "rocksalt", a=5.6), bulk("Cu"), molecule("H2O", vacuum=3)]
    return build_graph(systems_from_atoms(atoms), 5.0, 3.0)


@pytest.fixture
def output(batch: Batch) -> Output:
    """Random predictions with gradients; the molecule has no stress."""
    torch.manual_seed(0)
    n_atoms = len(batch.atomic_number)
    tensors = (
        torch.randn(3, dtype=torch.float64),
        torch.randn(n_atoms, 3),
        torch.randn(3, 3, 3) * GPA,
        torch.rand(n_atoms),
        torch.randn(n_atoms, dtype=torch.float64),
    )
    tensors[2][2] = NAN
    return Output(*(tensor.requires_grad_() for tensor in tensors))


@pytest.fixture
def labels(batch: Batch) -> Labels:
    """Labels of everything, the molecule's stress included."""
    torch.manual_seed(1)
    n_atoms = len(batch.atomic_number)
    energy = torch.randn(3, dtype=torch.float64)
    return Labels(energy, torch.randn(n_atoms, 3), torch.randn(3, 3, 3) * GPA, torch.randn(n_atoms))


def loss_of(sums: Tally, **weights: float) -> torch.Tensor:
    return total_loss(sums.huber, sums.count, LossConfig(**weights).weights)


def test_agrees_with_torch_in_the_documented_units(batch: Batch, output: Output, labels: Labels) -> None:
    sums = tally(output, labels, batch)
    pairs = (
        (output.energy / torch.tensor([2, 1, 3]), labels.energy / torch.tensor([2, 1, 3])),
        (output.forces, labels.forces),
        (output.stress[:2] / GPA, labels.stress[:2] / GPA),
        (output.magmoms, labels.magmoms.abs()),
    )
    means = [torch.nn.functional.huber_loss(p.double(), q.double(), delta=0.1) for p, q in pairs]
    expected = 2 * means[0] + 1.5 * means[1] + 0.1 * means[2] + 0.1 * means[3]
    # Sums of at most 18 terms in float64; stress and forces enter as float32 and are exact from there,
    # but for their division by GPA, which is rounded in float32.
    torch.testing.assert_close(loss_of(sums), expected, rtol=1e-6, atol=0)
    assert sums.count.tolist() == [3, 18, 18, 6]
    mae = [(p.double() - q.double()).abs().mean().item() for p, q in pairs]
    expected_report = [1000 * mae[0], 1000 * mae[1], mae[2], 1000 * mae[3]]
    assert list(sums.report().values()) == pytest.approx(expected_report, rel=1e-6)


def test_missing_labels_change_neither_loss_nor_gradient(
    batch: Batch, output: Output, labels: Labels
) -> None:
    energy, forces, magmoms = labels.energy.clone(), labels.forces.clone(), labels.magmoms.clone()
    energy[1], forces[3], magmoms[:2] = NAN, NAN, NAN
    masked = dataclasses.replace(labels, energy=energy, forces=forces, magmoms=magmoms)
    sums = tally(output, masked, batch)
    assert sums.count.tolist() == [2, 15, 18, 4]
    loss_of(sums).backward()
    assert output.energy.grad is not None and output.energy.grad[1] == 0
    assert output.forces.grad is not None and (output.forces.grad[3] == 0).all()
    assert output.stress.grad is not None and (output.stress.grad[2] == 0).all()
    assert output.magmoms.grad is not None and (output.magmoms.grad[:2] == 0).all()
    kept = (output.energy.grad[[0, 2]], output.forces.grad[:3], output.magmoms.grad[2:])
    assert all((gradient != 0).all() for gradient in kept)


def test_a_target_without_labels_adds_zero(batch: Batch, output: Output, labels: Labels) -> None:
    none = torch.full_like(labels.magmoms, NAN)
    sums = tally(output, dataclasses.replace(labels, magmoms=none), batch)
    assert loss_of(sums, magmoms=5.0) == loss_of(sums, magmoms=0.0)
    assert sums.report()["magmoms_mmub"] is None


@pytest.mark.parametrize("name", ["energy", "forces", "stress", "magmoms"])
def test_a_prediction_that_is_not_a_number_is_not_hidden(
    batch: Batch, output: Output, labels: Labels, name: str
) -> None:
    broken = getattr(output, name).detach().clone()
    broken[0] = NAN
    assert loss_of(tally(output._replace(**{name: broken}), labels, batch)).isnan()


def test_parts_of_a_batch_add_up_to_the_whole(batch: Batch, output: Output, labels: Labels) -> None:
    """The gradient of parts divided by the whole's counts is the gradient of the whole."""
    whole = tally(output, labels, batch)
    parts = []
    for keep in (torch.tensor([True, False, True]), torch.tensor([False, True, False])):
        atoms = keep[batch.atom_system]
        part = Labels(
            labels.energy.where(keep, NAN),
            labels.forces.where(atoms[:, None], NAN),
            labels.stress.where(keep[:, None, None], NAN),
            labels.magmoms.where(atoms, NAN),
        )
        parts.append(tally(output, part, batch))
    joined = sum(parts, start=empty_tally())
    assert joined.count.tolist() == whole.count.tolist()
    weights = LossConfig(preset="chgnet").weights
    losses = [total_loss(part.huber, joined.count, weights) for part in parts]
    torch.testing.assert_close(losses[0] + losses[1], total_loss(whole.huber, whole.count, weights))


def test_large_total_energies_keep_their_small_differences() -> None:
    """A millielectronvolt on a crystal of -1e6 eV is lost in float32, not here."""
    batch = build_graph(systems_from_atoms([bulk("Cu")]), 3.0, 3.0)
    energy = torch.tensor([-1.0e6], dtype=torch.float64)
    missing = torch.full((1, 3), NAN)
    label = Labels(energy - 1e-3, missing, torch.full((1, 3, 3), NAN), missing[:, 0])
    output = Output(energy, torch.zeros(1, 3), torch.zeros(1, 3, 3), torch.zeros(1), energy)
    # 1e-9 relative: float64 resolves 1e-10 eV at 1e6 eV.
    assert tally(output, label, batch).report()["energy_mev_per_atom"] == pytest.approx(1.0, rel=1e-6)


def test_presets_and_single_weights() -> None:
    assert LossConfig().weights == (2.0, 1.5, 0.1, 0.1)
    assert LossConfig(preset="chgnet", stress=0).weights == (1.0, 1.0, 0.0, 0.1)
