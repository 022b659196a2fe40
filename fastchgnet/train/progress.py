"""A run as seen on a terminal: a bar with frames/s and the time left, and one line per epoch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fastchgnet.config import load_run_config
from fastchgnet.errors import InputError
from fastchgnet.loss import REPORT_UNITS
from fastchgnet.train.launcher import is_first, told_once
from fastchgnet.train.loop import Watcher
from fastchgnet.train.run import Summary, train

_FORMATS = ("E {:.1f} meV/atom", "F {:.1f} meV/A", "S {:.3f} GPa", "M {:.1f} m mu_B")


class _Rate(ProgressColumn):
    """Frames per second."""

    def render(self, task: Task) -> Text:
        """Render the current rate."""
        return Text(f"{task.speed:.0f} frames/s" if task.speed else "")


class TerminalWatcher(Watcher):
    """Draw the bar on stderr, where that is a terminal, and print the line of each epoch."""

    def __init__(self) -> None:
        """Prepare the bar; use as a context."""
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("")

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def start(self, epoch: int, n_epochs: int, n_frames: int) -> None:
        """Begin the bar of an epoch."""
        self._bar.reset(self._task, description=f"epoch {epoch}/{n_epochs}", total=n_frames)

    def advance(self, n_frames: int) -> None:
        """Move the bar."""
        self._bar.advance(self._task, n_frames)

    def finish(self, row: dict) -> None:
        """Print the line of an epoch."""
        self.say(epoch_line(row))

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        self._bar.console.print(line, markup=False)


def train_in_terminal(path: Path, overrides: Sequence[str], resume: bool) -> Summary:
    """Run the YAML file `path` with its progress on stderr, which ends in one line on how to go on.

    Of several processes that torchrun has started, the first one shows it.

    Raises:
        InputError: as `load_run_config` and `train`.
    """
    try:
        config = load_run_config(path, overrides)
    except InputError as error:
        raise told_once(error) from error
    if not is_first():
        logging.getLogger("fastchgnet").setLevel(logging.ERROR)  # the first process warns of the same
        return train(config, resume)
    with TerminalWatcher() as watcher:
        summary = train(config, resume, watcher)
        epoch, step = summary.progress.epoch, summary.progress.step
        if summary.finished:
            watcher.say(f"{summary.folder}: finished; the best weights are in best.safetensors")
        else:
            watcher.say(f"{summary.folder}: stopped after {epoch} epochs, {step} steps; --resume continues")
    return summary


def epoch_line(row: dict) -> str:
    """Format the metrics of an epoch in one line, in the units of the paper's Table I."""
    values = [row["val"][name] for name in REPORT_UNITS]
    errors = [text.format(v) for text, v in zip(_FORMATS, values, strict=True) if v is not None]
    speed = f"{row['seconds']:.1f} s, {row['frames_per_second']:.0f} frames/s"
    losses = f"loss {row['train']['loss']:.4f}, val {row['val']['loss']:.4f}"
    return f"epoch {row['epoch']}: {losses}: {', '.join(errors)} ({speed})"
