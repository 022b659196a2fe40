"""Bodies of the ops agree in a whole model, and every run of a step gives the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from crystals import CONSERVATIVE, OLD, PAIR, SMOOTH, crystals, potential
from torch import Tensor

from fastchgnet.config import ModelConfig
from fastchgnet.graph import Labels
from fastchgnet.loss import tally, total_loss
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.ops.cpu import native

# several pieces of the PyTorch bodies and several threads of the compiled ones
CRYSTALS = [atoms.repeat((2, 2, 2)) for atoms in crystals()]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Give PyTorch two threads also where tests run side by side, with one each."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n_threads)


def loss_and_gradients(config: ModelConfig, device: str = "cpu") -> list[Tensor]:
    model = potential(config, torch.float32).to(device).train()
    batch = model.build_graph(systems_from_atoms(CRYSTALS))
    n_systems, n_atoms = batch.n_systems, len(batch.atomic_number)
    torch.manual_seed(3)
    labels = Labels(
        torch.randn(n_systems, dtype=torch.float64),
        torch.randn(n_atoms, 3),
        torch.randn(n_systems, 3, 3),
        torch.rand(n_atoms),
    ).to(device)
    sums = tally(model(batch), labels, batch)
    loss = total_loss(sums.huber, sums.count, (2.0, 1.5, 0.1, 0.1))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("config", [CONSERVATIVE, PAIR])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.usefixtures("two_threads")
def test_a_step_repeats_bit_for_bit(config: ModelConfig, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    first, second = loss_and_gradients(config, device), loss_and_gradients(config, device)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("config", [CONSERVATIVE, PAIR, SMOOTH, OLD])
def test_compiled_and_pytorch_bodies_train_alike(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(native, "n_threads", lambda _: 2)
    compiled = loss_and_gradients(config)
    with native.disabled():
        expected = loss_and_gradients(config)
    torch.testing.assert_close(compiled[0], expected[0], rtol=1e-6, atol=0)
    for ours, theirs in zip(compiled[1:], expected[1:], strict=True):
        # single precision through second derivatives; 9e-4 is what it differs by from double precision
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7
