"""One step of the optimizer, as a function of tensors on the device alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastchgnet.config import LossConfig
from fastchgnet.graph import Batch, Labels
from fastchgnet.loss import empty_tally, tally, total_loss
from fastchgnet.potential import Potential
from fastchgnet.train.optim import Optimizer


class Step:
    """Losses, gradients, clipping, Adam, averaged weights and statistics; the host waits for none of them.

    Everything it changes is changed in place, so that it can be recorded once and replayed.

    Attributes:
        sums: losses and errors of the steps since they were last zeroed, on the device.
    """

    def __init__(self, potential: Potential, optimizer: Optimizer, config: LossConfig) -> None:
        self.potential, self.optimizer, self.config = potential, optimizer, config
        self.sums = empty_tally(potential.device)

    def __call__(self, batch: Batch, labels: Labels, sizes: Tensor) -> Tensor:
        """Take one step on a batch; return a number that is finite unless something went wrong.

        Args:
            batch: graphs of S crystals, padded or not.
            labels: their labels.
            sizes: `fastchgnet.train.optim.step_sizes`, [3].
        """
        sums = tally(self.potential(batch), labels, batch, self.config.delta)
        # These are the counts of the whole batch: processes that share one would add them up here, and
        # their gradients below.
        loss = total_loss(sums.huber, sums.count, self.config.weights)
        gradients = torch.autograd.grad(loss, self.optimizer.parameters, materialize_grads=True)
        norm = self.optimizer.update(gradients, sizes)
        self.sums.add_(sums)
        return loss.detach() + norm


class Later:
    """A number on its way to the host; waiting for it does not wait for what was launched after it."""

    def __init__(self, number: Tensor) -> None:
        self._number = number
        self._arrived: torch.cuda.Event | None = None
        if number.is_cuda:
            self._number = torch.empty_like(number, device="cpu", pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def value(self) -> float:
        """Wait for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._number.item()
