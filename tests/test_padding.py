"""Fillers change nothing: neither a prediction nor the gradient of a parameter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ase import Atoms
from crystals import CONSERVATIVE, OLD, PAIR, PAPER, SMOOTH, benzene, check_indices, crystals, potential

from fastchgnet.config import ModelConfig
from fastchgnet.graph import Batch, Labels, Output
from fastchgnet.loss import tally, total_loss
from fastchgnet.neighbors import build_graph, systems_from_atoms
from fastchgnet.padding import Capacity, pad, pad_labels, rows_of
from fastchgnet.potential import Potential

SPARE = [
    Capacity(1, 1, 1, 0, 0),
    Capacity(1, 3, 1, 2, 5),
    Capacity(3, 11, 7, 40, 23),
    Capacity(2, 2, 30, 1, 3),
]
LONE = Atoms("Cs", cell=[20, 20, 20], pbc=True)

# fp64; sums over the rows of a batch change their order with its length
TOLERANCE = 1e-13


def plus(rows: Capacity, spare: Capacity) -> Capacity:
    return Capacity(*(a + b for a, b in zip(rows, spare, strict=True)))


def padded(batch: Batch, spare: Capacity) -> Batch:
    return pad(batch, plus(rows_of(batch), spare))


def graph(atoms: list[Atoms], config: ModelConfig = CONSERVATIVE) -> Batch:
    return build_graph(systems_from_atoms(atoms), config.atom_cutoff, config.bond_cutoff)


@pytest.mark.parametrize("spare", SPARE)
@pytest.mark.parametrize("atoms", [[], [LONE], crystals()], ids=["nothing", "no bonds", "crystals"])
@pytest.mark.filterwarnings("ignore:some atoms have no neighbour")
def test_a_padded_batch_keeps_the_contract(atoms: list[Atoms], spare: Capacity) -> None:
    batch = padded(graph(atoms), spare)
    assert rows_of(batch) == plus(rows_of(graph(atoms)), spare)
    check_indices(batch)
    for name in ("edge_center", "angle_center", "angle_i", "atom_system"):
        assert (getattr(batch, name).diff() >= 0).all()
    ends = torch.stack([batch.bond_center, batch.bond_neighbor], 1)
    assert (batch.edge_center[batch.bond_edge] == ends).all()
    assert (batch.edge_bond[batch.bond_edge] == torch.arange(len(ends))[:, None]).all()
    assert (batch.edge_sign[batch.bond_edge] == torch.tensor([1, -1])).all()
    assert (batch.short_bond[batch.bond_short] == torch.arange(batch.n_short_bonds)[:, None]).all()
    assert (batch.short_sign[batch.bond_short] == torch.tensor([1, -1])).all()
    shift = torch.einsum("us,usx->ux", batch.bond_image.double(), batch.cell[batch.bond_system])
    lengths = batch.bond_vector.norm(dim=1)
    ghost = lengths > 20
    assert ghost.sum() == spare.bonds and torch.equal(batch.bond_vector[ghost], shift[ghost])
    assert (batch.n_atoms > 0).all() and batch.n_atoms.sum() == len(batch.atomic_number)


def test_the_tensors_have_the_types_of_an_unpadded_batch() -> None:
    batch = graph(crystals())
    for field in dataclasses.fields(Batch):
        before, after = (getattr(b, field.name) for b in (batch, padded(batch, SPARE[2])))
        assert before.dtype == after.dtype and before.shape[1:] == after.shape[1:], field.name


def random_labels(batch: Batch) -> Labels:
    generator = torch.Generator().manual_seed(0)
    n_systems, n_atoms = batch.n_systems, len(batch.atomic_number)
    shapes = ((n_systems,), (n_atoms, 3), (n_systems, 3, 3), (n_atoms,))
    labels = Labels(*(torch.randn(*s, dtype=torch.float64, generator=generator) for s in shapes))
    labels.magmoms[::3] = torch.nan
    return labels


def loss_and_gradients(model: Potential, batch: Batch, labels: Labels) -> tuple[Output, list[torch.Tensor]]:
    output = model.train()(batch)
    sums = tally(output, labels, batch)
    loss = total_loss(sums.huber, sums.count, (2.0, 1.5, 0.1, 0.1))
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return output, [loss, *(g for g in found if g is not None)]


@pytest.mark.parametrize("config", [CONSERVATIVE, PAIR, PAPER, SMOOTH, OLD])
@pytest.mark.parametrize("spare", SPARE[1:3])
@pytest.mark.filterwarnings("ignore:some atoms have no neighbour")
def test_predictions_and_gradients_do_not_see_fillers(config: ModelConfig, spare: Capacity) -> None:
    model = potential(config)
    # the lone atom has no angle, which a model with an output bias can tell
    batch = graph([*crystals(), benzene(), LONE], config)
    labels = random_labels(batch)
    wide = padded(batch, spare)
    output, gradients = loss_and_gradients(model, batch, labels)
    wide_output, wide_gradients = loss_and_gradients(model, wide, pad_labels(labels, rows_of(wide)))
    for plain, other in zip(output, wide_output, strict=True):
        torch.testing.assert_close(other[: len(plain)], plain, rtol=TOLERANCE, atol=1e-13, equal_nan=True)
    assert len(gradients) == len(wide_gradients)
    for plain, other in zip(gradients, wide_gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=TOLERANCE, atol=TOLERANCE * plain.abs().max().item())


def test_what_does_not_fit_is_refused() -> None:
    batch = graph(crystals())
    rows = rows_of(batch)
    for spare in [(0, 1, 1, 0, 0), (2, 1, 1, 0, 0), (1, 1, 0, 0, 0), (1, 1, 1, -1, 0), (1, 1, 1, 0, -1)]:
        with pytest.raises(ValueError, match="does not fit"):
            pad(batch, plus(rows, Capacity(*spare)))
