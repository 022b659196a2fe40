"""Steps of several processes in static shapes, as GPUs take them, on the CPU; a script for each process."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ranks
import torch
from recordings import CalledAgain

from fastchgnet.config import RunConfig
from fastchgnet.data.store import Store
from fastchgnet.train import loop
from fastchgnet.train.loop import Trainer
from fastchgnet.train.ranks import Ranks, joined
from fastchgnet.train.resident import ResidentFrames
from fastchgnet.train.rooms import frame_sizes
from fastchgnet.train.setup import Frames, reproducible
from fastchgnet.train.source import DeviceGraphs, HostGraphs, Planning
from fastchgnet.train.step import Outcome, Steps


class Case(NamedTuple):
    """A run, its batches, and how a GPU would take them."""

    config: RunConfig
    batches: list[np.ndarray]
    resident: bool
    cannot_record: tuple[int, ...] = ()  # numbers of processes


def trainer_for(case: Case, together: Ranks) -> tuple[Trainer, CalledAgain]:
    """Set a run up with graphs in static shapes."""

    def open_sources(train: Frames, val: Frames, potential: Any, config: RunConfig, *rest: Any) -> Any:
        sizes = frame_sizes(train.store, train.indices, config.model.atom_cutoff, config.model.bond_cutoff)
        resident = ResidentFrames(train.store, potential.device) if case.resident else None
        planning = Planning(sizes, case.batches, rest[-1])
        return DeviceGraphs(train, potential, planning, resident), HostGraphs(val, potential)

    store = Store(case.config.data.train)
    frames = Frames(store, np.arange(len(store)))
    before, loop.open_sources = loop.open_sources, open_sources
    try:
        trainer = Trainer(case.config, frames, frames, torch.device("cpu"), None, together)
    finally:
        loop.open_sources = before
    steps, record = (
        trainer.take_step,
        CalledAgain(len(Outcome._fields), fails=together.number in case.cannot_record),
    )
    trainer.take_step = Steps(steps.step, steps.source, steps.division, steps.weigh, record)
    trainer.align()
    trainer.potential.train()
    return trainer, record


def main(cases: Path, results: Path) -> None:
    """Take the steps of each case of a file; the first process writes what came of them."""
    found = []
    with joined("cpu", ranks.SECONDS, threading.Event()) as (together, device):
        for case in torch.load(cases, weights_only=False):
            with reproducible(device):
                trainer, record = trainer_for(case, together)
                taken = ranks.steps(trainer, case.batches)
            shares = [trainer.take_step.division(batch) for batch in case.batches]
            taken["empty"] = [sum(not len(part) for part in parts) for parts in shares]
            taken["rooms"] = len({trainer.take_step.source.room(parts) for parts in shares})
            taken["recordings"] = together.gather((record.n_recorded, record.n_replayed))
            weights = trainer.optimizer.weights
            taken["weights"] = together.gather(weights)
            trainer.take_step.close()
            found.append(taken)
        if together.first:
            torch.save(found, results)


if __name__ == "__main__":
    # what is pickled here is not of a module called __main__
    import ranks_in_rooms

    ranks_in_rooms.main(*map(Path, sys.argv[1:]))
