"""What `fastchgnet prepare` shows on stderr while it runs and says when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastchgnet.config import Provenance
from fastchgnet.data.prepare import Prepared, prepare
from fastchgnet.data.reading import ReadOptions

SHOWN = 20
"""Skipped frames named in the terminal; skipped.txt in the store has them all."""


def prepare_in_terminal(
    inputs: Sequence[Path], out: Path, options: ReadOptions, provenance: Provenance, skip_bad: bool
) -> Prepared:
    """Run `prepare` with a progress bar, then list on stderr what was skipped and what looks wrong."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    columns = (TextColumn("{task.fields[frames]:>12,} frames"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=1.0, frames=0)
        prepared = prepare(
            inputs,
            out,
            options,
            provenance,
            skip_bad=skip_bad,
            progress=lambda frames, done: bar.update(task, completed=done, frames=frames),
        )
    for line in prepared.skipped[:SHOWN]:
        console.print(f"skipped: {line}", markup=False)
    if len(prepared.skipped) > SHOWN:
        console.print(f"skipped: {len(prepared.skipped) - SHOWN:,} more, see {out / 'skipped.txt'}")
    for line in prepared.warnings:
        console.print(f"WARNING: {line}", markup=False, style="bold red")
    counts = prepared.counts
    console.print(f"{out}: {counts.n_frames:,} frames, {counts.n_skipped:,} skipped")
    return prepared
