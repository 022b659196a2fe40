"""Training in large batches with the default learning rate and with the scaled one, as the paper's Fig. 6."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from fastchgnet.bench.rows import Row, environment
from fastchgnet.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from fastchgnet.device import pick_device
from fastchgnet.errors import InputError
from fastchgnet.report import Table, text
from fastchgnet.train import Watcher, train
from fastchgnet.train.progress import epoch_line
from fastchgnet.train.setup import Frames, open_frames

NOTE = (
    "The same network trained from scratch with the same seed, frames and number of epochs: `default` in "
    "large batches with the default learning rate, `scaled` in large batches with that rate times batch over "
    "base batch (Eq. 14), `base` in base batches with the default rate. All else is as the trainer has "
    "it by default, cosine included. `curve` has validation loss and mean absolute errors of the averaged "
    "weights after each epoch; in `failed_in_epoch` the loss or its gradient was no longer a number."
)

COLUMNS = {
    "energy_mev_per_atom": ("E meV/atom", "{:,.0f}"),
    "forces_mev_per_angstrom": ("F meV/Å", "{:,.1f}"),
    "stress_gpa": ("S GPa", "{:,.3f}"),
    "magmoms_mmub": ("M mμ_B", "{:,.1f}"),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a user asked for."""

    train: Path
    val: Path | None
    batch: int
    base_batch: int
    rate: float
    epochs: int
    readout: str
    device: str
    threads: int | None
    seed: int
    label: str

    def as_dict(self) -> dict[str, Any]:
        """Describe it as JSON takes it; of the paths only the names, since rows are published."""
        return {**dataclasses.asdict(self), "train": self.train.name, "val": self.val and self.val.name}


class Arm(NamedTuple):
    """One of the runs that are compared."""

    name: str
    batch_size: int
    base_batch_size: int | None  # None leaves the rate as it is


def run(asked: Comparison, say: Callable[[str], None]) -> list[Row]:
    """Train the three arms, one after the other, in folders that are removed; return a row of each.

    Raises:
        InputError: unusable stores or device, sizes or a rate that make no comparison, or no run that
            finishes an epoch.
        KeyboardInterrupt: the user asked to stop.
    """
    if not asked.base_batch < asked.batch:
        raise InputError(f"--base-batch {asked.base_batch}: expected fewer frames than --batch {asked.batch}")
    if not (math.isfinite(asked.rate * asked.batch) and asked.rate > 0):
        raise InputError(f"--rate {asked.rate:g}: expected a positive number, such as 3e-4")
    pick_device(asked.device)
    frames = open_frames(DataConfig(train=asked.train, val=asked.val))
    n_train = len(frames[0].indices)
    if asked.batch > n_train:
        raise InputError(f"--batch {asked.batch}: {asked.train} has only {n_train} training frames")
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    rows = [_row(asked, arm, frames, say) for arm in _arms(asked)]
    if not any(row["curve"] for row in rows):
        raise InputError(f"--rate {asked.rate:g}: no run finished an epoch; try a lower one")
    return rows


def tables(rows: Sequence[Row]) -> list[Table]:
    """Show the errors at the end of each run to a reader."""
    header = ("run", "batch", "highest rate", "steps", *(name for name, _ in COLUMNS.values()))
    cells = []
    for row in rows:
        failed = row["failed_in_epoch"]
        last = {} if failed else row["curve"][-1]
        steps = f"failed in epoch {failed}" if failed else f"{last['step']:,}"
        errors = (text(last.get(key), pattern) for key, (_, pattern) in COLUMNS.items())
        run = " ".join(filter(None, (row["arm"], row["label"])))
        cells.append((run, f"{row['batch_size']:,}", f"{row['learning_rate']:.2g}", steps, *errors))
    asked, frames = rows[0]["options"], rows[0]["frames"]
    title = f"{asked['readout']}, {frames['train']:,} frames, {asked['epochs']} epochs"
    return [Table(title, header, cells)]


def _arms(asked: Comparison) -> list[Arm]:
    return [
        Arm("default", asked.batch, None),
        Arm("scaled", asked.batch, asked.base_batch),
        Arm("base", asked.base_batch, None),
    ]


def _row(asked: Comparison, arm: Arm, frames: tuple[Frames, Frames], say: Callable[[str], None]) -> Row:
    """Train one arm and describe how it went."""
    optim = OptimConfig(learning_rate=asked.rate, base_batch_size=arm.base_batch_size)
    highest = optim.highest_rate(arm.batch_size)
    say(f"lr: {arm.name}, batches of {arm.batch_size} frames, learning rate {highest:g}")
    row: Row = {
        "command": "lr",
        "readout": asked.readout,
        "label": asked.label,
        "note": NOTE,
        "options": asked.as_dict(),
        "environment": environment(pick_device(asked.device)),
        "frames": {name: len(part.indices) for name, part in zip(("train", "val"), frames, strict=True)},
        "arm": arm.name,
        "batch_size": arm.batch_size,
        "learning_rate": highest,
    }
    follower = _Follower(say)
    with TemporaryDirectory() as folder:
        config = RunConfig(
            model=ModelConfig.model_validate({"readout": asked.readout}),
            optim=optim,
            data=DataConfig(train=asked.train, val=asked.val, batch_size=arm.batch_size),
            train=TrainConfig(
                out=Path(folder) / arm.name, epochs=asked.epochs, seed=asked.seed, device=asked.device
            ),
        )
        failed = not _trains(config, follower)
    return row | {
        "curve": follower.curve,
        "failed_in_epoch": len(follower.curve) + 1 if failed else None,
    }


def _trains(config: RunConfig, follower: _Follower) -> bool:
    """Train to the end; False where the numbers fail, which is a result here and no mistake of the user."""
    try:
        summary = train(config, watcher=follower)
    except InputError as error:
        if "is not a number" not in str(error):
            raise
        follower.say(f"  {error}")
        return False
    if not summary.finished:
        raise KeyboardInterrupt
    return True


class _Follower(Watcher):
    """Keeps the validation errors of every epoch, and says them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.curve: list[dict[str, Any]] = []

    def finish(self, row: dict) -> None:
        kept = {name: row[name] for name in ("epoch", "step", "seconds")}
        self.curve.append(kept | row["val"])
        self.say(f"  {epoch_line(row)}")
