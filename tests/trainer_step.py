"""The trainer's own step as on a GPU: resident frames, graphs built beside them, static shapes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from crystals import potential
from frames import labelled_frames
from torch import Tensor

from fastchgnet.config import LossConfig, ModelConfig, Provenance
from fastchgnet.data.store import Store, write_store
from fastchgnet.flat import views
from fastchgnet.loss import coefficients
from fastchgnet.padding import Capacity
from fastchgnet.record import Record
from fastchgnet.train.batches import Division
from fastchgnet.train.optim import Optimizer, step_sizes
from fastchgnet.train.resident import ResidentFrames
from fastchgnet.train.rooms import Room, frame_sizes
from fastchgnet.train.setup import Frames
from fastchgnet.train.source import DeviceGraphs, Planning
from fastchgnet.train.step import Step, Steps, Work

CPU = torch.device("cpu")


class TrainerStep(NamedTuple):
    """A step that is about to be taken."""

    steps: Steps
    work: Work
    sizes: Tensor
    wishes: Tensor

    def take(self) -> Tensor:
        """Take it; return its outcome."""
        return self.steps(self.work, self.sizes, self.wishes)

    def found(self) -> dict[str, Tensor]:
        """What it has left behind: sums, and gradient and buffers of the optimizer by parameter."""
        step, optimizer = self.steps.step, self.steps.step.optimizer
        flat = {"gradient": step.gradient.values, "mean": optimizer.mean, "square": optimizer.square}
        flat |= {"weights": optimizer.weights, "average": optimizer.average}
        return step.sums.as_dict() | {
            f"{kind} of {name}": view.clone()
            for kind, buffer in flat.items()
            for name, view in zip(optimizer.names, views(buffer, optimizer.parameters), strict=True)
        }


def trainer_step(
    readout: str,
    n_frames: int,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    record: Record | None = None,
) -> TrainerStep:
    """Make a step on one frame or two, the same in every process; `folder` takes a store."""
    # few neighbours: an interpreter takes its time
    config = ModelConfig(readout=readout, atom_cutoff=4.0, bond_cutoff=3.4)
    write_store(labelled_frames(2), folder / "store", Provenance(name="made"))
    frames = Frames(Store(folder / "store"), np.arange(2))
    sizes = frame_sizes(frames.store, frames.indices, config.atom_cutoff, config.bond_cutoff)
    division, batch = Division(sizes), np.arange(2)[-n_frames:]
    atoms, edges, short, angles, n_candidates = sizes[batch].sum(0).tolist()
    # the smallest one with fillers of all kinds
    room = Room(
        Capacity(n_frames + 1, atoms + 2, short + 1, edges // 2 - short + 1, angles + 2), n_candidates
    )
    trained = potential(config, dtype).train()
    source = DeviceGraphs(
        frames, trained, Planning(sizes, [batch], division), ResidentFrames(frames.store, CPU)
    )
    source.rooms = lambda parts: room  # type: ignore[assignment]
    optimizer = Optimizer(trained.in_order(), copy.deepcopy(trained).in_order(), clip_norm=0.1)
    # with a history; a first step would follow signs of the gradient, those of its smallest parts as well
    optimizer.square.fill_(1.0)
    loss = LossConfig()
    by_sums = coefficients(
        torch.from_numpy(frames.label_counts()[batch].sum(0)), torch.tensor(loss.weights).double()
    )
    steps = Steps(Step(trained, optimizer, loss), source, division, lambda _: by_sums, record)
    step_size = torch.tensor(step_sizes(step=100, rate=0.1, ema_decay=0.9), dtype=torch.float64)
    return TrainerStep(steps, steps.prepare(batch), step_size, torch.zeros(2, dtype=torch.float64))
