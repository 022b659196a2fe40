"""The training loop: plain PyTorch, top to bottom, and resumable between any two steps.

Several processes run it side by side, each with its own share of every batch and with the same weights; what
one of them decides, all do in the same step.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.config import RunConfig
from fastchgnet.errors import InputError
from fastchgnet.loss import Tally, coefficients, empty_tally, tally, total_loss
from fastchgnet.record import recording_on
from fastchgnet.train.batches import Batches, Division, prefetch, validation_batches
from fastchgnet.train.checkpoint import Progress, save_state
from fastchgnet.train.log import RunLog
from fastchgnet.train.optim import Optimizer, learning_rate, step_sizes
from fastchgnet.train.parcel import send
from fastchgnet.train.ranks import ALONE, Ranks
from fastchgnet.train.rooms import Room, frame_sizes
from fastchgnet.train.setup import Frames, blank_potential, first_potential
from fastchgnet.train.source import Item, open_sources
from fastchgnet.train.step import Later, Outcome, Step, Steps, Work
from fastchgnet.weights import save_potential

State = tuple[dict[str, Tensor], Progress]


class Watcher:
    """Follow a run; this one looks away. `fastchgnet.train.progress` has one for terminals."""

    def start(self, epoch: int, n_epochs: int, n_frames: int) -> None:
        """Note that epoch number `epoch` of `n_epochs` begins, with `n_frames` frames still to train on."""

    def advance(self, n_frames: int) -> None:
        """Note that a batch has been trained on."""

    def finish(self, row: dict) -> None:
        """Take the metrics of a finished epoch, as written to metrics.jsonl."""


class Unchecked(NamedTuple):
    """A step whose outcome the host has not looked at yet."""

    health: Later  # what `Step` returns
    step: int
    positions: NDArray[np.int64]


class Trainer:
    """A run in memory: the potential, its running average, the optimizer and the position."""

    def __init__(
        self,
        config: RunConfig,
        train: Frames,
        val: Frames,
        device: torch.device,
        state: State | None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Build a run anew, or as `state` left it; among several processes `align` comes next."""
        self.config, self.train, self.val, self.folder = config, train, val, config.train.out
        self.device, self.ranks = device, ranks
        build = first_potential if state is None else blank_potential
        self.potential = build(config, train, self.device)
        self.average = copy.deepcopy(self.potential).eval()
        current, average = self.potential.in_order(), self.average.in_order()
        self.optimizer = Optimizer(current, average, config.optim.clip_norm)
        plan = train.store.header.plan
        # sizes within the cutoffs of the store, whatever those of the model: no frame is counted again
        sizes = frame_sizes(train.store, train.indices, plan.atom_cutoff, plan.bond_cutoff)
        data = config.data
        self.batches = Batches(sizes, data.batch_size, config.train.seed, data.balance)
        division = Division(sizes, data.balance, ranks.count, data.accumulate)
        sources = open_sources(train, val, self.potential, config, self.batches, division)
        train_source, self.val_source = sources
        step = Step(self.potential, self.optimizer, config.loss, ranks)
        self.sums = step.sums
        record = recording_on(device) if config.train.capture == "auto" else None
        self.take_step = Steps(step, train_source, division, self._by_sums, record)
        self._label_counts = train.label_counts()
        self.progress = Progress(frames=f"{train.fingerprint()} {self.batches.fingerprint()}")
        if state is not None:
            self._restore(*state)
        self.unchecked: Unchecked | None = None
        self.told: Outcome | None = None  # of the last step that was looked at
        self.saved_at = time.monotonic()

    def align(self) -> None:
        """Take over from the first process what the next step depends on: the same, but for rounding."""
        self.ranks.from_first_([*self._weights().values(), *self.optimizer.state().values()])

    def run(self, stop: threading.Event, log: RunLog | None, watcher: Watcher) -> bool:
        """Train until the end, or until `stop` is set; return whether the end was reached."""
        for epoch in range(self.progress.epoch, self.config.train.epochs):
            batches = self.batches.epoch(epoch)
            n_done = sum(map(len, itertools.islice(batches, self.progress.batch)))
            watcher.start(epoch + 1, self.config.train.epochs, len(self.train.indices) - n_done)
            self.train_epoch(batches, stop, watcher)
            means = None if self.must_stop(stop) else self.validate(stop)
            if means is None:
                self.save_state()
                return False
            row = self.row(means)
            if log is not None:
                log.append(row)
            self.finish_epoch(row)
            watcher.finish(row)
        return True

    def train_epoch(
        self, batches: Iterable[NDArray[np.int64]], stop: threading.Event, watcher: Watcher
    ) -> None:
        """Take the remaining steps of an epoch, or those until `stop` is set."""
        self.potential.train()
        before, start = self.progress.seconds, time.perf_counter()
        for work in self.load(batches):
            self.step(work, stop.is_set())
            p = self.progress
            seconds = before + time.perf_counter() - start
            self.progress = dataclasses.replace(p, step=p.step + 1, batch=p.batch + 1, seconds=seconds)
            watcher.advance(len(work.positions))
            if self.must_stop(stop):
                break
            if self.told is not None and self.told.n_save:
                self.save_state()
        self.check()

    def must_stop(self, stop: threading.Event) -> bool:
        """Tell whether the run is to stop here: of several processes, whether all know that by now."""
        if self.ranks.count == 1:
            return stop.is_set()
        return self.told is not None and self.told.n_stop > 0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of this run."""
        n_batches, optim = len(self.batches), self.config.optim
        n_steps, n_warmup = n_batches * self.config.train.epochs, round(optim.warmup_epochs * n_batches)
        highest = optim.highest_rate(self.config.data.batch_size)
        return learning_rate(step, n_steps, n_warmup, highest, optim.final_fraction)

    def load(self, batches: Iterable[NDArray[np.int64]]) -> Iterator[Work]:
        """Yield what batches of training frames are made from, ahead of time."""
        return prefetch(self.take_step.prepare, batches)

    def _prepare_val(self, positions: NDArray[np.int64]) -> tuple[Item, Room | None]:
        room = self.val_source.room([positions])
        return self.val_source.prepare(positions, room), room

    def _by_sums(self, positions: NDArray[np.int64]) -> Tensor:
        """Derivative of the loss by the sums, [3, 4], from the labels of the whole batch."""
        count = torch.from_numpy(self._label_counts[positions].sum(0))
        return coefficients(count, torch.tensor(self.config.loss.weights, dtype=torch.float64))

    def step(self, work: Work, stop: bool = False) -> None:
        """Take one step of the optimizer; with `stop`, ask all processes to stop after it."""
        optim, step = self.config.optim, self.progress.step
        self.ranks.at(f"step {step + 1}")
        minutes = (time.monotonic() - self.saved_at) / 60
        save = self.ranks.first and minutes > self.config.train.checkpoint_minutes
        sizes = torch.tensor(step_sizes(step, self.learning_rate(step), optim.ema_decay), dtype=torch.float64)
        health = self.take_step(work, sizes, torch.tensor([stop, save], dtype=torch.float64))
        # Looking at the step before this one keeps the device busy while the host waits for the answer.
        self.check()
        self.unchecked = Unchecked(Later(health), step + 1, work.positions)

    def check(self) -> None:
        """Raise InputError where the last unchecked step went wrong; no state has been saved since."""
        last, self.unchecked = self.unchecked, None
        if last is None:
            return
        with self.ranks.waiting():
            self.told = Outcome(*last.health.values())
        if self.told.n_unfit:
            names = self.train.names(last.positions)
            self.ranks.refuse(f"graphs are larger than their store says; prepare it again; frames {names}")
        if not (math.isfinite(self.told.loss) and math.isfinite(self.told.norm)):
            self.ranks.refuse(
                self._not_a_number("loss or its gradient", last.step, self.train.names(last.positions))
            )

    def _not_a_number(self, what: str, step: int, names: str) -> str:
        state = self.folder / "state"
        return (
            f"the {what} is not a number at step {step} (the last good state is in {state}); frames {names}"
        )

    @torch.no_grad()
    def validate(self, stop: threading.Event) -> Tally | None:
        """Sum the losses of the averaged weights over the validation frames; None if asked to stop."""
        n_frames, size = len(self.val.indices), self.config.data.batch_size
        batches = validation_batches(n_frames, size, self.take_step.division)
        batches = batches[self.ranks.number :: self.ranks.count]
        parts = []
        for item, room in prefetch(self._prepare_val, batches):
            if stop.is_set():
                break
            made = self.val_source.make(send(item, self.device), room)
            parts.append(tally(self.average(made.batch), made.labels, made.batch, self.config.loss.delta))
        with self.ranks.together():
            for part, positions in zip(parts, batches, strict=False):
                if not torch.isfinite(part.huber).all():
                    names = self.val.names(positions)
                    raise InputError(self._not_a_number("validation loss", self.progress.step, names))
        if any(self.ranks.gather(len(parts) < len(batches))):
            return None
        return self._of_all(sum(parts, start=empty_tally(self.device)))

    def _of_all(self, sums: Tally) -> Tally:
        """Add up the sums of all processes."""
        total = empty_tally(self.device) + sums
        self.ranks.sum_(list(total.as_dict().values()))
        return total

    def row(self, validation: Tally) -> dict:
        """Describe the epoch that has just been trained and validated."""
        weights, p = self.config.loss.weights, self.progress
        described = {
            name: {"loss": total_loss(sums.huber, sums.count, weights).item(), **sums.report()}
            for name, sums in (("train", self._of_all(self.sums)), ("val", validation))
        }
        return {
            "epoch": p.epoch + 1,
            "step": p.step,
            "learning_rate": self.learning_rate(p.step - 1),
            **described,
            "seconds": p.seconds,
            "frames_per_second": len(self.train.indices) / p.seconds,
        }

    def finish_epoch(self, row: dict) -> None:
        """Save the averaged weights, as best ones too where they are, and the state of the run."""
        epoch, loss = row["epoch"], row["val"]["loss"]
        best = self.progress.best_loss is None or loss < self.progress.best_loss
        self.align()
        with self.ranks.together():
            for name in ("last", "best") if best else ("last",):
                if self.ranks.first:
                    save_potential(self.average, self.folder / f"{name}.safetensors", {"metrics": row})
        p = dataclasses.replace(self.progress, epoch=epoch, batch=0, seconds=0.0)
        self.progress = dataclasses.replace(p, best_loss=loss, best_epoch=epoch) if best else p
        self.sums.zero_()
        self.save_state()

    def save_state(self) -> None:
        """Save everything that the next step depends on, provided the steps so far were sound."""
        self.check()
        of_each = self.ranks.gather({name: t.cpu() for name, t in self.sums.as_dict().items()})
        tensors = self._weights() | {f"adam.{name}": t for name, t in self.optimizer.state().items()}
        # apart, since as many processes go on with the same bits only if each has its own again
        tensors |= {f"sums.{name}": torch.stack([sums[name] for sums in of_each]) for name in of_each[0]}
        with self.ranks.together():
            if self.ranks.first:
                save_state(self.folder / "state", tensors, self.progress)
        self.saved_at = time.monotonic()
        if self.told is not None:
            self.told = self.told._replace(n_save=0.0)

    def _weights(self) -> dict[str, Tensor]:
        named = {"potential": self.potential, "average": self.average}
        return {f"{kind}.{name}": t for kind, one in named.items() for name, t in one.state_dict().items()}

    def _restore(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        """Put a state in place, or only what is `shared` of it where the first process has the rest."""
        if progress.frames != self.progress.frames:
            raise InputError(
                f"{self.train.store.path}: not the frames that the run in {self.folder} began with, "
                "or not in the same batches"
            )
        self.progress = progress
        mine = self._weights() | {f"adam.{name}": t for name, t in self.optimizer.state().items()}
        sums = {f"sums.{name}": t for name, t in self.sums.as_dict().items()}
        mine = (mine if self.ranks.first else {}) | sums
        own = tensors | {name: self._own(tensors[name]) for name in sums.keys() & tensors.keys()}
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in mine.items()}:
            raise InputError(f"{self.folder}: its state was saved by another version; start a new run")
        for name, tensor in mine.items():
            tensor.copy_(own[name])

    def _own(self, of_each: Tensor) -> Tensor:
        """Return what this process goes on with of sums that each process had, [n_processes, ...]."""
        if len(of_each) == self.ranks.count:
            return of_each[self.ranks.number]
        return of_each.sum(0) if self.ranks.first else torch.zeros_like(of_each[0])


def shared(state: State) -> State:
    """Return the part of a state that all processes put in place, beside what `Trainer.align` takes over."""
    tensors, progress = state
    return {name: tensor for name, tensor in tensors.items() if name.startswith("sums.")}, progress
