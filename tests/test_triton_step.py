"""Triton bodies of what surrounds the network in a step: gathering frames, losses, the optimizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from frames import labelled_frames
from interpreted import DEVICE, nan_filled  # noqa: F401, a fixture for every test here
from test_loss import batch, labels, output  # noqa: F401, fixtures
from torch import Tensor

from fastchgnet.config import Provenance
from fastchgnet.data.store import Store, write_store
from fastchgnet.graph import Batch, Labels, Output
from fastchgnet.ops import huber
from fastchgnet.ops.gpu import adam as gpu_adam
from fastchgnet.ops.gpu import frames as gpu_frames
from fastchgnet.ops.gpu import huber as gpu_huber
from fastchgnet.train import optim, resident

NAN = float("nan")


@pytest.mark.parametrize(
    ("order", "n_atoms"),
    [([4, 0, 4, 7, -1, -1], 64), ([2, -1], 65), ([-1], 3), ([3, 2, 1], 11), ([5, 6] + 2000 * [-1], 20)],
)
def test_frames(tmp_path: Path, order: list[int], n_atoms: int) -> None:
    write_store(labelled_frames(8), tmp_path / "store", Provenance(name="made"))
    frames = resident.ResidentFrames(Store(tmp_path / "store"), torch.device(DEVICE))
    numbers = torch.tensor(order, device=DEVICE)
    found, found_labels = gpu_frames.gather(numbers, frames._arrays, n_atoms)
    wanted, wanted_labels = resident._gather(numbers, frames._arrays, n_atoms)
    n_real = {"atomic_number": int(wanted.start[-1]), "cell": int(wanted.n_systems)}
    n_real |= {"position": n_real["atomic_number"], "pbc": n_real["cell"]}
    for pair in ((found, wanted), (found_labels, wanted_labels)):
        for field in dataclasses.fields(pair[0]):
            one, other = (getattr(record, field.name) for record in pair)
            assert one.dtype == other.dtype and one.shape == other.shape, field.name
            # spare rows of geometry may hold anything, spare labels may not
            rows = slice(None, n_real.get(field.name))
            one, other = (t if t.ndim == 0 else t[rows] for t in (one, other))
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def huber_arguments(batch: Batch, output: Output, labels: Labels) -> list[Tensor]:  # noqa: F811
    labels.energy[0], labels.forces[2], labels.magmoms[1] = NAN, NAN, NAN
    predicted = (output.energy, output.forces, output.stress, output.magmoms - 0.5)
    known = (labels.energy, labels.forces, labels.stress, labels.magmoms)
    return [t.detach().to(DEVICE) for t in (*predicted, *known, batch.n_atoms, batch.volume)]


@pytest.mark.parametrize("delta", [0.1, 10.0])
def test_losses(batch: Batch, output: Output, labels: Labels, delta: float) -> None:  # noqa: F811
    given = huber_arguments(batch, output, labels)
    # float64 throughout, in another order
    tolerance = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(gpu_huber.forward(*given, delta), huber._forward(*given, delta), **tolerance)
    grad = torch.arange(12.0, dtype=torch.float64, device=DEVICE).view(3, 4) + 1
    found, wanted = (body(grad, *given, delta) for body in (gpu_huber.backward, huber._backward))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        # rounded to float32 at the end
        torch.testing.assert_close(one, other, rtol=1e-6 if one.dtype == torch.float32 else 1e-12, atol=0)


def test_a_prediction_that_is_not_a_number_stays_one(batch: Batch, output: Output, labels: Labels) -> None:  # noqa: F811
    given = huber_arguments(batch, output, labels)
    given[1][0, 0] = NAN
    assert gpu_huber.forward(*given, 0.1).isnan().tolist() == [[False, True, False, False]] * 2 + [
        [False] * 4
    ]
    grad = torch.ones(3, 4, dtype=torch.float64, device=DEVICE)
    assert gpu_huber.backward(grad, *given, 0.1)[1].isnan().sum() == 1


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("n", [64, 1024, 1088])
def test_moves(n: int, clip_norm: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    buffers = [torch.randn(n, generator=generator).to(DEVICE) for _ in range(5)]
    buffers[4].square_()
    norm = torch.linalg.vector_norm(buffers[0])
    sizes = torch.tensor([0.3, 1.7, 0.2], device=DEVICE)
    mine, theirs = ([b.clone() for b in buffers] for _ in range(2))
    gpu_adam.move(*mine, norm, sizes, clip_norm)
    optim._move(*theirs, norm, sizes, clip_norm)
    for found, wanted, before in zip(mine[1:], theirs[1:], buffers[1:], strict=True):
        # the same operations in float32, fused or not
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, before)


def test_a_norm_that_is_not_a_number_leaves_no_weight_one() -> None:
    # nobody goes on with weights of which some have taken a step and others have not
    buffers = [torch.rand(8, device=DEVICE) for _ in range(5)]
    gpu_adam.move(*buffers, torch.tensor(NAN, device=DEVICE), torch.ones(3, device=DEVICE), 1.0)
    assert all(buffer.isnan().all() for buffer in buffers[1:])
