"""Several processes on this machine that share a run, and what they do in the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import bulk
from ase.calculators.emt import EMT

from fastchgnet.config import Provenance, RunConfig
from fastchgnet.data.frame import Frame
from fastchgnet.data.store import Store, write_store
from fastchgnet.train.checkpoint import load_state
from fastchgnet.train.loop import State, Trainer, shared
from fastchgnet.train.ranks import ALONE, Ranks, joined
from fastchgnet.train.setup import Frames, reproducible

SECONDS = 120


def uneven_frames(n_frames: int) -> list[Frame]:
    """Rattled metals of 1 to 12 atoms, each without some of the labels."""
    rng = np.random.default_rng(5)
    frames = []
    for index in range(n_frames):
        atoms = bulk("Cu", a=3.6).repeat((1 + index % 3, 1 + index % 2, 1 + index % 2))
        atoms.symbols[:1] = "Al"
        atoms.rattle(0.1, rng=rng)
        atoms.calc = EMT()
        frames.append(
            Frame(
                numbers=atoms.numbers.astype(np.int64),
                positions=atoms.positions,
                cell=atoms.cell.array,
                pbc=atoms.pbc,
                source=f"metal:{index}",
                group=str(index),
                energy=atoms.get_potential_energy() if index % 5 else np.nan,
                forces=atoms.get_forces() if index % 4 else None,
                stress=atoms.get_stress(voigt=False) if index % 3 else None,
                magmoms=rng.normal(size=len(atoms)) if index % 2 else None,
            )
        )
    return frames


def write_stores(folder: Path) -> Path:
    """Write the stores `train`, 30 frames, and `val`, 7, and return the folder."""
    for name, n_frames in (("train", 30), ("val", 7)):
        write_store(uneven_frames(n_frames), folder / name, Provenance(name="metals"))
    return folder


def environment(number: int, count: int, port: int) -> dict[str, str]:
    """What a launcher tells a process."""
    told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in told.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(commands: Sequence[Sequence[str]], warnings: str = "error") -> list[subprocess.Popen]:
    """Start one process for each command, as a launcher would; arguments are those of python."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-W", warnings, *command],
            env=environment(number, len(commands), port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        for number, command in enumerate(commands)
    ]


def finish(processes: Sequence[subprocess.Popen], seconds: float = SECONDS) -> list[tuple[int, str, str]]:
    """Wait, and return how each ended: status, output, errors."""
    try:
        ended = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def run(count: int, function: str, *arguments: object) -> None:
    """Let `count` processes call a function of this module with arguments that are strings."""
    code = f"import ranks, sys; ranks.{function}(*sys.argv[1:])"
    ended = finish(start([["-c", code, *map(str, arguments)]] * count))
    assert [status for status, *_ in ended] == [0] * count, ended


# in the processes


def trainer_for(config: RunConfig, ranks: Ranks = ALONE, state: State | None = None) -> Trainer:
    """Set a run up without its files."""
    frames = Frames(Store(config.data.train), np.arange(len(Store(config.data.train))))
    trainer = Trainer(config, frames, frames, torch.device("cpu"), state, ranks)
    trainer.align()
    trainer.potential.train()
    return trainer


def steps(trainer: Trainer, batches: Sequence[np.ndarray]) -> dict[str, Any]:
    """Take steps; return their losses and gradients, in the layout of the weights."""
    losses, gradients = [], []
    for work in trainer.load(list(batches)):
        trainer.step(work)
        trainer.check()
        assert trainer.told is not None
        losses.append(trainer.told.loss)
        gradients.append(trainer.take_step.step.gradient.values.clone())
    return {"losses": losses, "gradients": gradients}


def take_steps(configurations: str, results: str) -> None:
    """Take steps on the first batches of each run of a file; the first process writes what came of them."""
    runs = torch.load(configurations, weights_only=False)
    found = []
    with joined("cpu", SECONDS, threading.Event()) as (ranks, device):
        for config, batches in runs:
            with reproducible(device):
                found.append(steps(trainer_for(config, ranks), batches))
        if ranks.first:
            torch.save(found, results)


def interrupt_an_epoch(configurations: str) -> None:
    """Save between two steps and go on from there; the bits are those of steps without a pause."""
    ((config, batches),) = torch.load(configurations, weights_only=False)
    with joined("cpu", SECONDS, threading.Event()) as (ranks, device), reproducible(device):
        straight, before = (trainer_for(config, ranks) for _ in range(2))
        steps(straight, batches)
        steps(before, batches[:-1])
        before.save_state()
        state = load_state(config.train.out / "state") if ranks.first else None
        found, *_ = ranks.gather(state and shared(state))
        after = trainer_for(config, ranks, state or found)
        steps(after, batches[-1:])
        for one, other in ((straight._weights(), after._weights()), *_sums(straight, after)):
            assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _sums(*trainers: Trainer) -> list[tuple[dict[str, torch.Tensor], ...]]:
    return [tuple(trainer._of_all(trainer.sums).as_dict() for trainer in trainers)]
