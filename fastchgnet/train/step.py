"""One step of the optimizer, as a function of tensors on the device alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.config import LossConfig
from fastchgnet.errors import InputError
from fastchgnet.loss import coefficients, empty_tally, tally
from fastchgnet.ops.gpu.runtime import precision
from fastchgnet.ops.huber import label_counts
from fastchgnet.potential import Potential
from fastchgnet.record import Record, Recorder
from fastchgnet.train.optim import Optimizer
from fastchgnet.train.rooms import Room
from fastchgnet.train.source import Item, Made, Source

logger = logging.getLogger(__name__)


class Step:
    """Losses, gradients, clipping, Adam, averaged weights and statistics; the host waits for none of them.

    Everything it changes is changed in place, so that it can be recorded once and replayed.

    Attributes:
        sums: losses and errors of the steps since they were last zeroed, on the device.
    """

    def __init__(self, potential: Potential, optimizer: Optimizer, config: LossConfig) -> None:
        self.potential, self.optimizer, self.config = potential, optimizer, config
        self.sums = empty_tally(potential.device)
        self.weights = torch.tensor(config.weights, dtype=torch.float64, device=potential.device)

    @precision("tf32")
    def __call__(self, parts: Sequence[Made], sizes: Tensor) -> Tensor:
        """Take one step on a batch.

        Args:
            parts: the batch, or parts of it that together are the batch but take less memory.
            sizes: `fastchgnet.train.optim.step_sizes`, [3].

        Returns:
            Two numbers: one that is finite unless something went wrong, and whether all graphs fitted.
        """
        losses = []
        counts = [label_counts(part.labels, part.batch) for part in parts if len(parts) > 1]
        for number, part in enumerate(parts):
            sums = tally(self.potential(part.batch), part.labels, part.batch, self.config.delta)
            # These are the counts of the whole batch: processes that share one would add them up here, and
            # their gradients below.
            count = torch.stack(counts).sum(0) if counts else sums.count
            by_sums = coefficients(count, self.weights)
            gradients = torch.autograd.grad(
                sums.huber, self.optimizer.parameters, by_sums, materialize_grads=True
            )
            self.optimizer.take(gradients, add=number > 0)
            self.sums.add_(sums)
            losses.append((sums.huber.detach() * by_sums).sum())
        norm = self.optimizer.update(sizes)
        fits = torch.stack([part.fits for part in parts]).all()
        return torch.stack([torch.stack(losses).sum() + norm.double(), fits.double()])


class Work(NamedTuple):
    """A batch of frames, named by their places among those of the run, and what it is made from."""

    positions: NDArray[np.int64]
    parts: tuple[Item, ...]  # the batch, or both its halves


class Steps:
    """Take steps on items: recorded where that is possible, in halves where memory asks for it.

    Args:
        step: what to do with a batch.
        source: makes batches from items.
        record: makes recordings; None for none.
    """

    def __init__(self, step: Step, source: Source, record: Record | None) -> None:
        self.step, self.source = step, source
        self.in_halves = False
        self._recorder = Recorder(self._whole, record)

    def prepare(self, positions: NDArray[np.int64]) -> Work:
        """Have the source prepare a batch of the frames at these positions, or both its halves."""
        parts = np.array_split(positions, 2) if self.in_halves else [positions]
        return Work(positions, tuple(self.source.prepare(part) for part in parts if len(part)))

    def __call__(self, work: Work, sizes: Tensor) -> Tensor:
        """Take one step; return what `Step` returns, which the next step may overwrite.

        Raises:
            InputError: half the batch, or a single frame, is still too much for the memory.
        """
        if not self.in_halves:
            (item,) = work.parts
            item.wait()
            try:
                return self._recorder(item.room, (*item.tensors, sizes))
            except torch.OutOfMemoryError:
                pass  # go on where the exception no longer holds on to the tensors of the step
            self._halve(work)
        if len(work.parts) == 1:
            work = self.prepare(work.positions)
        try:
            for part in work.parts:
                part.wait()
            return self.step([self.source.make(part.tensors, part.room) for part in work.parts], sizes)
        except torch.OutOfMemoryError as error:
            raise InputError(
                "out of memory even on half a batch; choose a smaller data.batch_size"
            ) from error

    def _whole(self, room: Room | None, inputs: Sequence[Tensor]) -> Tensor:
        *tensors, sizes = inputs
        return self.step([self.source.make(tensors, room)], sizes)

    def _halve(self, work: Work) -> None:
        """Give up recordings and whole batches."""
        logger.warning(
            "out of memory on %d frames: each batch is taken in two halves now, with the same gradient",
            len(work.positions),
        )
        self.in_halves = True
        self._recorder.stop()
        self.source.halve()
        if self.step.potential.device.type == "cuda":
            torch.cuda.empty_cache()


class Later:
    """Numbers on their way to the host; waiting for them does not wait for what was launched after them."""

    def __init__(self, numbers: Tensor) -> None:
        # a copy in any case: the next step may overwrite them
        self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=numbers.is_cuda)
        self._numbers.copy_(numbers, non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[float]:
        """Wait for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
