"""The record of a run: one JSON line per epoch, and the same for TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from fastchgnet.errors import InputError
from fastchgnet.files import write_atomically

Row = Mapping[str, object]


class RunLog:
    """Append to `metrics.jsonl` and `tensorboard/` in the folder of a run; close after use."""

    def __init__(self, folder: Path, epoch: int) -> None:
        """Open the record, without the epochs after `epoch`, which the run is about to repeat."""
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["epoch"] <= epoch]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.path, text)
        self._writer = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)

    def append(self, row: Row) -> None:
        """Write the row of one epoch."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for name, value in _flat(row):
                self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()

    def __enter__(self) -> Self:
        """Return the open record."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(folder: Path) -> list[dict]:
    """Return the rows of `metrics.jsonl` in the folder of a run, the first epoch first.

    A last line that a killed process left unfinished does not count.

    Raises:
        InputError: another line is not the row of an epoch.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            is_epoch = "epoch" in row and isinstance(row["val"], dict)
        except (ValueError, TypeError, KeyError):
            is_epoch = False
        if not is_epoch:
            raise InputError(f"{path}: line {number} is not the row of an epoch")
        rows.append(row)
    return rows


def _flat(row: Row) -> list[tuple[str, float]]:
    """Name the numbers of a row as `val/stress_gpa`."""
    pairs: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            pairs += [(f"{name}/{inner}", number) for inner, number in _flat(value)]
        elif isinstance(value, int | float) and name != "epoch":
            pairs.append((name, value))
    return pairs
