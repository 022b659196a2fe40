"""One step of the optimizer, as a function of tensors on the device alone."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.config import LossConfig
from fastchgnet.errors import InputError, first_line
from fastchgnet.loss import TARGETS, empty_tally, tally
from fastchgnet.ops.gpu.runtime import precision
from fastchgnet.potential import Potential
from fastchgnet.record import Record, Recorder
from fastchgnet.train.batches import Division
from fastchgnet.train.gradient import Gradient
from fastchgnet.train.optim import Optimizer
from fastchgnet.train.parcel import Layout, send
from fastchgnet.train.ranks import ALONE, Ranks
from fastchgnet.train.rooms import Room
from fastchgnet.train.source import Item, Made, Source

logger = logging.getLogger(__name__)


class Inputs(NamedTuple):
    """What a step takes beside its batch, float64."""

    by_sums: Tensor  # [3, 4] derivative of the loss by the sums over the whole batch, see `coefficients`
    sizes: Tensor  # [3] `fastchgnet.train.optim.step_sizes`
    start: Tensor  # [8] `Outcome` before it


class Outcome(NamedTuple):
    """What comes of a step, the same in all processes."""

    energy: float  # what each target adds to the loss
    forces: float
    stress: float
    magmoms: float
    norm: float  # of the gradient
    n_unfit: float  # parts whose graphs were larger than planned
    n_stop: float  # processes that want to stop after it
    n_save: float  # and to save

    @property
    def loss(self) -> float:
        """Loss of the batch."""
        return self.energy + self.forces + self.stress + self.magmoms

    @classmethod
    def before(cls, n_parts: int, wishes: Tensor) -> Tensor:
        """Return what a process starts from: none of its parts has shown that it fits.

        Args:
            n_parts: parts that it takes.
            wishes: whether it wants to stop, and to save, [2] float64.
        """
        zeros = wishes.new_zeros(cls._fields.index("n_unfit"))
        return torch.cat([zeros, wishes.new_full((1,), n_parts), wishes])


class Step:
    """Losses, gradients, clipping, Adam, averaged weights and statistics; the host waits for none of them.

    Everything it changes is changed in place, so that it can be recorded once and replayed.

    Attributes:
        sums: losses and errors of the steps of this process since they were last zeroed, on the device.
    """

    def __init__(
        self, potential: Potential, optimizer: Optimizer, config: LossConfig, ranks: Ranks = ALONE
    ) -> None:
        self.potential, self.optimizer, self.config = potential, optimizer, config
        self.gradient = Gradient(optimizer.parameters, ranks)
        self.sums = empty_tally(potential.device)

    @precision("tf32")
    def __call__(self, parts: Sequence[Made], inputs: Inputs) -> Tensor:
        """Take one step on a batch.

        Args:
            parts: this process's share of the batch, as parts that are taken one after the other, or nothing.
            inputs: what else it takes, on the device.

        Returns:
            `Outcome`, as a tensor.
        """
        numbers = self.gradient.numbers[: len(Outcome._fields)].copy_(inputs.start)
        losses, (norm, n_unfit, *_) = numbers[: len(TARGETS)], numbers[len(TARGETS) :].unbind()
        for n, part in enumerate(parts):
            sums = tally(self.potential(part.batch), part.labels, part.batch, self.config.delta)
            self.sums.add_(sums)
            losses.addcmul_(sums.huber.detach(), inputs.by_sums[0])
            n_unfit.add_(part.fits, alpha=-1)
            self.gradient.take(sums.sums, inputs.by_sums, add=n > 0, complete=n == len(parts) - 1)
        if not parts:
            self.gradient.take_nothing()
        self.gradient.wait()
        self.optimizer.update(self.gradient.values, inputs.sizes, norm)
        return numbers


class Work(NamedTuple):
    """A batch of frames, by their places in the run, and what this process's share of it is made from."""

    positions: NDArray[np.int64]
    parts: tuple[Item, ...]
    room: Room | None
    by_sums: Tensor  # see `Inputs`, on the host
    division: Division


class _Shapes(NamedTuple):
    """What a recorded step goes by: shapes of the batch, and of what is sent for it."""

    room: Room
    layout: Layout


class Together:
    """Make recordings in all processes, or in none: recorded messages might not meet those that are not.

    All processes take the same steps in the same rooms, and so record in the same step.

    Args:
        record: makes recordings in this process.
        ranks: the processes.
    """

    def __init__(self, record: Record, ranks: Ranks) -> None:
        self._record, self._ranks = record, ranks

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record `function`; raise RuntimeError in all processes where one of them cannot."""
        if torch.cuda.is_available():
            # a recording begins with this, where nobody would notice that a process is missing
            with self._ranks.waiting():
                torch.cuda.synchronize()
        made, text = None, None
        try:
            made = self._record(function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = first_line(error)
        texts = self._ranks.gather(text)
        failed = [number for number, one in enumerate(texts) if one is not None]
        if made is None or failed:
            raise RuntimeError(f"rank {failed[0]}: {texts[failed[0]]}")
        return made


class Steps:
    """Take steps on work: recorded where that is possible, in more parts where memory asks for it.

    `close` it before the links between processes end.

    Args:
        step: what to do with a batch.
        source: makes parts of batches from items.
        division: how batches are divided among processes and into parts.
        weigh: gives the derivative of the loss by the sums of each target, [4], for a batch.
        record: makes recordings; None for none.
    """

    def __init__(
        self,
        step: Step,
        source: Source,
        division: Division,
        weigh: Callable[[NDArray[np.int64]], Tensor],
        record: Record | None,
    ) -> None:
        self.step, self.source, self.division, self.weigh = step, source, division, weigh
        self._ranks = step.gradient.ranks
        self._halved = False
        if record is not None and self._ranks.count > 1:
            record = Together(record, self._ranks)
        self._recorder = Recorder(self._in_room, step.potential.device, record)

    def close(self) -> None:
        """Drop all recordings and make no more: NCCL does not end its links while one of them is there."""
        self._recorder.stop()

    def prepare(self, positions: NDArray[np.int64]) -> Work:
        """Have the source prepare this process's share of the frames at these positions."""
        division = self.division  # a thread prepares; where memory runs out there will be another one
        parts = division(positions)
        room = self.source.room(parts)
        own = division.own(parts, self._ranks.number)
        # in static shapes an empty part is all fillers; otherwise there is nothing to be made of it
        items = tuple(self.source.prepare(part, room) for part in own if len(part) or room is not None)
        return Work(positions, items, room, self.weigh(positions), division)

    def __call__(self, work: Work, sizes: Tensor, wishes: Tensor) -> Tensor:
        """Take one step; return what `Step` returns, which the next step may overwrite.

        Args:
            work: the batch.
            sizes: see `Inputs`, float64, on the host.
            wishes: see `Outcome.before`, likewise.

        Raises:
            InputError: it is too much for the memory.
        """
        may_halve = not self._halved and self._ranks.count == 1 and len(work.positions) > 1
        try:
            return self._run(work, sizes, wishes)
        except torch.OutOfMemoryError as error:
            if not may_halve:
                raise InputError(
                    f"out of memory on a batch of {len(work.positions)} frames, taken in "
                    f"{self.division.n_parts} parts; choose a larger data.accumulate, or a smaller batch"
                ) from error
        # here the exception no longer holds on to the tensors of the step
        self._halve(work)
        return self(work, sizes, wishes)

    def _run(self, work: Work, sizes: Tensor, wishes: Tensor) -> Tensor:
        if work.division is not self.division:
            work = self.prepare(work.positions)  # it was prepared before the memory ran out
        inputs = Inputs(work.by_sums, sizes, Outcome.before(len(work.parts), wishes))
        device = self.step.potential.device
        if work.room is None:
            made = [self.source.make(send(part, device), None) for part in work.parts]
            return self.step(made, Inputs(*send(inputs, device)))
        tensors = [*inputs, *itertools.chain.from_iterable(work.parts)]
        layout = Layout.of(tensors)
        return self._recorder(_Shapes(work.room, layout), [layout.packed(tensors, device)])

    def _in_room(self, shapes: _Shapes, given: Sequence[Tensor]) -> Tensor:
        """Make the parts, each from as many tensors, and take the step."""
        tensors = shapes.layout.views(given[0])
        n_inputs, n_parts = len(Inputs._fields), self.division.n_parts
        size = (len(tensors) - n_inputs) // n_parts
        parts = [tensors[n : n + size] for n in range(n_inputs, len(tensors), size)]
        return self.step([self.source.make(part, shapes.room) for part in parts], Inputs(*tensors[:n_inputs]))

    def _halve(self, work: Work) -> None:
        """Give up recordings and take each batch in twice as many parts."""
        logger.warning(
            "out of memory on %d frames: each batch is taken in two halves now, with the same gradient",
            len(work.positions),
        )
        self._halved = True
        self._recorder.stop()
        division = self.division.halved()
        self.source.plan(division)
        self.division = division  # last: what a thread prepares in between is prepared again
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
