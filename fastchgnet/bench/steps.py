"""Training steps of this device on shares of a batch: timed one by one, and what they cost."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastchgnet.bench import timing
from fastchgnet.bench.frames import ATOM_CUTOFF, BOND_CUTOFF
from fastchgnet.bench.session import Session
from fastchgnet.config import Provenance, RunConfig
from fastchgnet.data.formats import read_frames
from fastchgnet.data.frame import Frame
from fastchgnet.data.store import Store, write_store
from fastchgnet.device_graph import count_candidates
from fastchgnet.neighbors import graph_sizes
from fastchgnet.prediction import systems_from_frames
from fastchgnet.train.loop import Trainer
from fastchgnet.train.ranks import ALONE, Ranks
from fastchgnet.train.rooms import Rooms, frame_sizes
from fastchgnet.train.sampler import Cost, fit_cost, share
from fastchgnet.train.setup import Frames, reproducible
from fastchgnet.train.source import DeviceGraphs


class Fit(NamedTuple):
    """What steps cost, from timed ones."""

    cost: Cost  # seconds
    seconds_of: str  # cpu or wall
    fit_relative_error: float

    def as_dict(self) -> dict[str, Any]:
        """Describe it as JSON takes it."""
        return {**self._asdict(), "cost": self.cost._asdict()}


def file_sizes(path: Path) -> NDArray[np.int64]:
    """Count what the frames of a file need room for, as `sizes_of`."""
    return sizes_of(list(read_frames(path)))


def sizes_of(frames: Sequence[Frame]) -> NDArray[np.int64]:
    """Count what frames need room for, as `rooms.frame_sizes` those of a store."""
    systems = systems_from_frames(frames)
    sizes = graph_sizes(systems, ATOM_CUTOFF, BOND_CUTOFF)
    return np.column_stack([sizes, count_candidates(systems.cell, systems.pbc, sizes[:, 0], ATOM_CUTOFF)])


def global_batches(n_frames: int, size: int, seed: int, n_batches: int) -> Iterator[NDArray[np.int64]]:
    """Yield batches from epochs in random order, one after the other."""
    rng = np.random.default_rng(seed)
    n_epochs = -(-n_batches * size // n_frames)
    order = np.concatenate([rng.permutation(n_frames) for _ in range(n_epochs)])
    yield from order[: n_batches * size].reshape(n_batches, size)


@contextmanager
def trainer_on(session: Session, n_frames: int, readout: str) -> Iterator[Trainer]:
    """Set a training run up on the first frames of the pool, which are one batch.

    Raises:
        InputError: there are fewer frames than that.
    """
    with tempfile.TemporaryDirectory() as name:
        write_frames(session.pool.workload(n_frames).frames, Path(name))
        yield open_trainer(Path(name), readout, session.device)


def write_frames(frames: Iterable[Frame], folder: Path) -> None:
    """Write labelled frames for `open_trainer`."""
    write_store(frames, folder / "store", Provenance(name="bench"))


def open_trainer(
    folder: Path, readout: str, device: torch.device, ranks: Ranks = ALONE, preset: str = "paper"
) -> Trainer:
    """Set a training run up on all the frames in a folder, which are one batch; `preset` is of the loss."""
    store = Store(folder / "store")
    frames = Frames(store, np.arange(len(store)))
    values = {
        "model": {"readout": readout},
        "loss": {"preset": preset},
        "data": {"train": folder / "store", "batch_size": len(store)},
        "train": {"out": folder / "run", "device": device.type},
    }
    log = logging.getLogger("fastchgnet.references")
    log.disabled = True  # few frames may not determine all reference energies
    trainer = Trainer(RunConfig.model_validate(values), frames, frames, device, None, ranks)
    log.disabled = False
    trainer.potential.train()
    return trainer


def fit_steps(trainer: Trainer, n_ranks: int, n_rounds: int) -> Fit:
    """Fit the cost to steps on the shares of ranks as they come, and on halves of them.

    Halves, so that what a step takes in any case can be told from what its frames take.
    """
    sizes = trainer.train.store.sizes.astype(np.int64)
    shares = share(sizes, n_ranks, "sequential")
    batches = [*shares, *(one[: len(one) // 2] for one in shares if len(one) > 1)]
    seconds = time_steps(trainer, batches, n_rounds)
    rows = np.array([[len(one), *sizes[one].sum(0)] for one in batches])
    cost = fit_cost(rows, seconds)
    fitted = rows[:, [0, 1, 2, 4]] @ np.array(cost[:4]) + cost.step
    seconds_of = "cpu" if trainer.device.type == "cpu" else "wall"
    return Fit(cost, seconds_of, float(np.std(fitted / seconds - 1)))


def time_steps(trainer: Trainer, batches: Sequence[NDArray[np.int64]], n_rounds: int) -> NDArray[np.float64]:
    """Time a step on each batch: the shortest of the rounds, since whatever disturbs a step prolongs it.

    CPU seconds on a CPU, wall seconds on a GPU.
    """
    device, source, frames = trainer.device, trainer.take_step.source, trainer.train
    on_cpu = device.type == "cpu"
    if isinstance(source, DeviceGraphs):
        source.rooms = Rooms(
            frame_sizes(frames.store, frames.indices, ATOM_CUTOFF, BOND_CUTOFF), [[one] for one in batches]
        )
    seconds = np.full((n_rounds, len(batches)), np.inf)
    with reproducible(device):
        for number in range(-1, n_rounds):
            # The first round warms up: one step on a CPU, on a GPU two of each to record it.
            chosen = list(batches) if number >= 0 or not on_cpu else list(batches[:1])
            for place, work in enumerate(trainer.load(chosen)):
                if number < 0:
                    timing.warm_up(lambda work=work: trainer.step(work), device)  # type: ignore[misc]
                else:
                    wall, cpu = timing.sample(lambda work=work: trainer.step(work), 1, device)  # type: ignore[misc]
                    seconds[number, place] = cpu if on_cpu else wall
    return seconds.min(0)
