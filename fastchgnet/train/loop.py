"""The training loop: plain PyTorch, top to bottom, and resumable between any two steps."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.config import RunConfig, load_run_config
from fastchgnet.device import pick_device, to_device
from fastchgnet.errors import InputError
from fastchgnet.files import only_process, write_atomically
from fastchgnet.loss import Tally, empty_tally, tally, total_loss
from fastchgnet.record import CudaGraphs
from fastchgnet.train.batches import Batches, prefetch
from fastchgnet.train.checkpoint import Progress, load_state, save_state
from fastchgnet.train.log import RunLog, read_metrics
from fastchgnet.train.optim import Optimizer, learning_rate, step_sizes
from fastchgnet.train.rooms import frame_sizes
from fastchgnet.train.setup import (
    Frames,
    blank_potential,
    first_potential,
    open_frames,
    reproducible,
    resolve,
)
from fastchgnet.train.signals import stop_request
from fastchgnet.train.source import open_sources
from fastchgnet.train.step import Later, Step, Steps, Work
from fastchgnet.weights import save_potential


class Watcher:
    """Follow a run; this one looks away. `fastchgnet.train.progress` has one for terminals."""

    def start(self, epoch: int, n_epochs: int, n_frames: int) -> None:
        """Note that epoch number `epoch` of `n_epochs` begins, with `n_frames` frames still to train on."""

    def advance(self, n_frames: int) -> None:
        """Note that a batch has been trained on."""

    def finish(self, row: dict) -> None:
        """Take the metrics of a finished epoch, as written to metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How a call of `train` ended."""

    folder: Path
    finished: bool  # False where it was asked to stop; the run can be resumed
    progress: Progress
    last: dict | None  # metrics of the last finished epoch

    def as_dict(self) -> dict:
        """Describe it as JSON takes it."""
        position = dataclasses.asdict(self.progress)
        return {"folder": str(self.folder), "finished": self.finished, **position, "last": self.last}


class Unchecked(NamedTuple):
    """A step whose outcome the host has not looked at yet."""

    health: Later  # what `Step` returns
    step: int
    positions: NDArray[np.int64]


def train(config: RunConfig, resume: bool = False, watcher: Watcher | None = None) -> Summary:
    """Train a potential as `config` says and keep everything in the folder `config.train.out`.

    Ctrl-C or SIGTERM ends it between two steps with everything saved. On the CPU a resumed run gives
    the same numbers, bit for bit, as one that was never interrupted.

    Args:
        config: the run.
        resume: continue the run in the folder, or start it where there is none yet.
        watcher: told what happens.

    Raises:
        InputError: bad data, weights or device; a folder that holds another run, or a run without
            `resume`; a loss that is not a number, naming the frames.
    """
    config = resolve(config)
    state = _find_state(config, resume)
    frames = open_frames(config.data)
    device = pick_device(config.train.device)
    with reproducible(device), only_process(config.train.out), stop_request() as stop:
        trainer = Trainer(config, *frames, device, state)
        if state is None:
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
            trainer.save_state()
            write_atomically(config.train.out / "config.yaml", text)
        with RunLog(config.train.out, trainer.progress.epoch) as log:
            finished = trainer.run(stop, log, watcher or Watcher())
    rows = read_metrics(config.train.out)
    return Summary(config.train.out, finished, trainer.progress, rows[-1] if rows else None)


_HOW = {"train": {"out", "device", "capture", "checkpoint_minutes"}, "data": {"resident"}}
"""Settings that a resumed run may change: how it is run, not what."""

State = tuple[dict[str, Tensor], Progress]


def _find_state(config: RunConfig, resume: bool) -> State | None:
    """Load the state of the run in the folder, having made sure that it is this run."""
    folder = config.train.out
    if not (folder / "config.yaml").exists():
        leftover = load_state(folder / "state")
        if leftover is not None and leftover[1].step > 0:
            raise InputError(f"{folder}: holds states but no config.yaml; choose another train.out")
        return None
    if not resume:
        raise InputError(f"{folder}: already holds a run; --resume continues it, or choose another train.out")
    before, now = (
        c.model_dump(mode="json", exclude=_HOW) for c in (load_run_config(folder / "config.yaml"), config)
    )
    changed = [f"{part}.{key}" for part in now for key in now[part] if now[part][key] != before[part][key]]
    if changed:
        raise InputError(f"{folder}: cannot resume, the run there has another {', '.join(changed)}")
    state = load_state(folder / "state")
    if state is None:
        raise InputError(f"{folder}: holds a run whose state is missing; choose another train.out")
    return state


class Trainer:
    """A run in memory: the potential, its running average, the optimizer and the position."""

    def __init__(
        self, config: RunConfig, train: Frames, val: Frames, device: torch.device, state: State | None
    ) -> None:
        """Build a run anew, or as `state` left it."""
        self.config, self.train, self.val, self.folder = config, train, val, config.train.out
        self.device = device
        build = first_potential if state is None else blank_potential
        self.potential = build(config, train, self.device)
        self.average = copy.deepcopy(self.potential).eval()
        self.optimizer = Optimizer(self.potential, self.average, config.optim.clip_norm)
        plan = train.store.header.plan
        # sizes within the cutoffs of the store, whatever those of the model: no frame is counted again
        sizes = frame_sizes(train.store, train.indices, plan.atom_cutoff, plan.bond_cutoff)
        data = config.data
        self.batches = Batches(sizes, data.batch_size, config.train.seed, data.balance)
        train_source, self.val_source = open_sources(train, val, self.potential, config, self.batches)
        step = Step(self.potential, self.optimizer, config.loss)
        self.sums = step.sums
        captures = self.device.type == "cuda" and config.train.capture == "auto"
        self.take_step = Steps(step, train_source, CudaGraphs() if captures else None)
        self.progress = Progress(frames=f"{train.fingerprint()} {self.batches.fingerprint()}")
        if state is not None:
            self._restore(*state)
        self.unchecked: Unchecked | None = None
        self.saved_at = time.monotonic()

    def run(self, stop: threading.Event, log: RunLog, watcher: Watcher) -> bool:
        """Train until the end, or until `stop` is set; return whether the end was reached."""
        for epoch in range(self.progress.epoch, self.config.train.epochs):
            batches = self.batches.epoch(epoch)
            n_done = sum(map(len, itertools.islice(batches, self.progress.batch)))
            watcher.start(epoch + 1, self.config.train.epochs, len(self.train.indices) - n_done)
            self.train_epoch(batches, stop, watcher)
            means = None if stop.is_set() else self.validate(stop)
            if means is None:
                self.save_state()
                return False
            row = self.row(means)
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
        for work in self.load(self.train, batches):
            self.step(work)
            p = self.progress
            seconds = before + time.perf_counter() - start
            self.progress = dataclasses.replace(p, step=p.step + 1, batch=p.batch + 1, seconds=seconds)
            watcher.advance(len(work.positions))
            if stop.is_set():
                break
            if time.monotonic() - self.saved_at > 60 * self.config.train.checkpoint_minutes:
                self.save_state()
        self.check()

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of this run."""
        n_batches, optim = len(self.batches), self.config.optim
        n_steps, n_warmup = n_batches * self.config.train.epochs, round(optim.warmup_epochs * n_batches)
        highest = optim.highest_rate(self.config.data.batch_size)
        return learning_rate(step, n_steps, n_warmup, highest, optim.final_fraction)

    def load(self, frames: Frames, batches: Iterable[NDArray[np.int64]]) -> Iterator[Work]:
        """Yield what batches of the run's training or validation frames are made from, ahead of time."""
        return prefetch(self.take_step.prepare if frames is self.train else self._prepare_val, batches)

    def _prepare_val(self, positions: NDArray[np.int64]) -> Work:
        return Work(positions, (self.val_source.prepare(positions),))

    def step(self, work: Work) -> None:
        """Take one step of the optimizer."""
        optim, step = self.config.optim, self.progress.step
        sizes = torch.tensor(
            step_sizes(step, self.learning_rate(step), optim.ema_decay), dtype=self.potential.dtype
        )
        health = self.take_step(work, to_device(sizes, self.device))
        # Looking at the step before this one keeps the device busy while the host waits for the answer.
        self.check()
        self.unchecked = Unchecked(Later(health), step + 1, work.positions)

    def check(self) -> None:
        """Raise InputError where the last unchecked step went wrong; no state has been saved since."""
        last, self.unchecked = self.unchecked, None
        if last is None:
            return
        health, fits = last.health.values()
        if not fits:
            names = self.train.names(last.positions)
            raise InputError(f"graphs are larger than their store says; prepare it again; frames {names}")
        if not math.isfinite(health):
            self._refuse("loss or its gradient", last.step, self.train.names(last.positions))

    def _refuse(self, what: str, step: int, names: str) -> NoReturn:
        state = self.folder / "state"
        raise InputError(
            f"the {what} is not a number at step {step} (the last good state is in {state}); frames {names}"
        )

    @torch.no_grad()
    def validate(self, stop: threading.Event) -> Tally | None:
        """Sum the losses of the averaged weights over the validation frames; None if asked to stop."""
        n_frames, size = len(self.val.indices), self.config.data.batch_size
        batches = np.array_split(np.arange(n_frames), math.ceil(n_frames / size))
        parts = []
        for work in self.load(self.val, batches):
            if stop.is_set():
                return None
            (item,) = work.parts
            item.wait()
            made = self.val_source.make(item.tensors, item.room)
            parts.append(tally(self.average(made.batch), made.labels, made.batch, self.config.loss.delta))
        for part, positions in zip(parts, batches, strict=True):
            if not torch.isfinite(part.huber).all():
                self._refuse("validation loss", self.progress.step, self.val.names(positions))
        return sum(parts, start=empty_tally(self.device))

    def row(self, validation: Tally) -> dict:
        """Describe the epoch that has just been trained and validated."""
        weights, p = self.config.loss.weights, self.progress
        described = {
            name: {"loss": total_loss(sums.huber, sums.count, weights).item(), **sums.report()}
            for name, sums in (("train", self.sums), ("val", validation))
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
        for name in ("last", "best") if best else ("last",):
            save_potential(self.average, self.folder / f"{name}.safetensors", {"metrics": row})
        p = dataclasses.replace(self.progress, epoch=epoch, batch=0, seconds=0.0)
        self.progress = dataclasses.replace(p, best_loss=loss, best_epoch=epoch) if best else p
        self.sums.zero_()
        self.save_state()

    def save_state(self) -> None:
        """Save everything that the next step depends on, provided the steps so far were sound."""
        self.check()
        tensors = {f"potential.{name}": t for name, t in self.potential.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        tensors |= {f"adam.{name}": t for name, t in self.optimizer.state().items()}
        tensors |= {f"sums.{name}": t for name, t in self.sums.as_dict().items()}
        save_state(self.folder / "state", tensors, self.progress)
        self.saved_at = time.monotonic()

    def _restore(self, tensors: dict[str, Tensor], progress: Progress) -> None:
        if progress.frames != self.progress.frames:
            raise InputError(
                f"{self.train.store.path}: not the frames that the run in {self.folder} began with, "
                "or not in the same batches"
            )

        def below(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.potential.load_state_dict(below("potential."))
        self.average.load_state_dict(below("average."))
        rest = {"adam.": self.optimizer.state(), "sums.": self.sums.as_dict()}
        for prefix, mine in rest.items():
            saved = below(prefix)
            if saved.keys() != mine.keys():
                raise InputError(f"{self.folder}: its state was saved by another version; start a new run")
            for name, tensor in mine.items():
                tensor.copy_(saved[name])
        self.progress = progress
