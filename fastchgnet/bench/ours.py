"""Our arm: the very calls that `fastchgnet train` and `fastchgnet.predict` make."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms

from fastchgnet.bench.frames import Answer, Workload
from fastchgnet.bench.steps import open_trainer, write_frames
from fastchgnet.bench.timing import Work
from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.graph import Batch, Systems
from fastchgnet.potential import Potential
from fastchgnet.prediction import predict
from fastchgnet.published import load
from fastchgnet.train.parcel import send
from fastchgnet.train.setup import reproducible


class Training(NamedTuple):
    """What one optimiser step of our trainer consists of."""

    step: Work  # of a batch that has been prepared: with its graphs on a CPU, as raw frames on a GPU
    step_with_graphs: Work  # the batch is prepared first, from frames in the store
    gather: Work  # frames from the store
    build: Work  # graphs of gathered frames, by the device


@contextlib.contextmanager
def training(workload: Workload, readout: str, device: torch.device) -> Iterator[Training]:
    """Set a training run up whose only batch is the workload; its settings are the defaults.

    Those shorten long gradients and average the weights, which the published trainer does not.
    """
    with tempfile.TemporaryDirectory() as name:
        write_frames(workload.frames, Path(name))
        trainer = open_trainer(Path(name), readout, device, preset="chgnet")
        frames = trainer.train
        positions = np.arange(len(frames.indices))
        (prepared,) = trainer.load([positions])
        systems, _ = frames.gather(positions)

        def step() -> None:
            # The trainer's own settings, entered for this call alone: they are not for the other arm.
            with reproducible(device):
                trainer.step(prepared)

        def step_with_graphs() -> None:
            with reproducible(device):
                (fresh,) = trainer.load([positions])
                trainer.step(fresh)

        def build() -> None:
            if device.type == "cuda":
                (item,) = prepared.parts
                trainer.take_step.source.make(send(item, device), prepared.room)
            else:
                trainer.potential.build_graph(systems)

        yield Training(
            step=step,
            step_with_graphs=step_with_graphs,
            gather=lambda: frames.gather(positions),
            build=build,
        )


def atoms_of(workload: Workload) -> list[Atoms]:
    """Give the workload as ASE atoms, our input."""
    return [
        Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc) for frame in workload.frames
    ]


class Inference:
    """Energies, forces, stresses and magnetic moments of crystals, graphs included."""

    def __init__(self, readout: str, device: torch.device) -> None:
        """Take the published weights, or an untrained model where there are none for the readout."""
        if readout == "conservative":
            self.potential = load("chgnet-0.3.0", device.type)
        else:
            self.potential = untrained(ModelConfig(readout="direct")).to(device).eval()

    def predict(self, atoms: Sequence[Atoms], batch_size: int) -> list[Answer]:
        """Predict all four quantities."""
        done = predict(self.potential, atoms, batch_size)
        return [(one.energy_per_atom, one.forces) for one in done]


def graph_builder(device: torch.device) -> Callable[[Systems], Batch]:
    """Return what builds the graph of a batch for the default model on a device."""
    return untrained(ModelConfig()).to(device).build_graph


def untrained(config: ModelConfig) -> Potential:
    """Return a potential with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Potential(config, torch.zeros(94, dtype=torch.float64), Provenance(name="untrained"))
