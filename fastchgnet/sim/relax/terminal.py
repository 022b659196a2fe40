"""What `fastchgnet relax` shows: a bar on stderr, then a table, and a page where one is asked for."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastchgnet.published import load
from fastchgnet.report import Table, print_tables, text
from fastchgnet.sim.outputs import check_report, read_frames
from fastchgnet.sim.page import Line, Movie, Panel, require_libraries, write_page
from fastchgnet.sim.relax.files import Outcome, Task, read_inputs, relax_files, trajectory_path
from fastchgnet.sim.relax.record import Row
from fastchgnet.train.signals import stop_request
from fastchgnet.units import GPA

SHOWN = 50
"""Relaxations in the table of a terminal; the .jsonl file has them all."""

MOVIES = 24
"""Crystals shown in three dimensions on a page."""


class TerminalWatcher:
    """A bar on stderr, where that is a terminal, with the steps that all crystals take in a second."""

    def __init__(self, stop: threading.Event) -> None:
        """Prepare the bar; use as a context. `stop` ends the command between two steps."""
        console = Console(stderr=True)
        columns = (
            TextColumn("relax"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None, rate="")
        self._stop = stop

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def begin(self, n_crystals: int, n_done: int) -> None:
        """Begin the bar."""
        self._bar.reset(self._task, total=n_crystals, completed=n_done)

    def show(self, n_done: int, n_crystal_steps: int) -> None:
        """Move the bar."""
        elapsed = self._bar.tasks[self._task].elapsed or 0
        rate = f"{n_crystal_steps / elapsed:.0f} steps/s" if elapsed else ""
        self._bar.update(self._task, completed=n_done, rate=rate)

    def stops(self) -> bool:
        """Tell whether somebody has pressed Ctrl-C."""
        return self._stop.is_set()


def relax_in_terminal(
    files: Sequence[Path], model: tuple[str, str, str], task: Task, as_json: bool, report: Path | None
) -> int:
    """Relax the crystals of files, show what comes of it, and return the status of the command.

    0: every crystal has been relaxed, converged or not; 1: some could not be read or failed; 2: nothing
    could be done; 130: stopped between two steps, and the same command goes on there.

    Args:
        files: crystals, in any format that `fastchgnet predict` reads.
        model: name or path, device and dtype, as `fastchgnet.load` takes them.
        task: what to do.
        as_json: whether to print JSON instead of a table.
        report: where to write a page with curves and crystals.

    Raises:
        InputError: a wrong option, or a record of another command.
    """
    task.check(files)
    if report is not None:
        require_libraries()
    check_report(report, task.lines.exists())
    inputs = read_inputs(files)
    rows: list[Row] = []
    finished = True
    if inputs.crystals:
        potential = load(*model)  # type: ignore[arg-type]
        with stop_request() as stop, TerminalWatcher(stop) as watcher:
            outcome = relax_files(potential, inputs, task, watcher)
        rows, finished = outcome.rows, outcome.finished
        if report is not None:
            _write_report(report, outcome, task)
        _show(rows, task, as_json)
    failed = [row for row in rows if row["failed"]]
    for error in inputs.errors:
        print(f"error: {error}", file=sys.stderr)
    for row in failed:
        print(f"error: {row['file']}:{row['index']}: {row['reason']}", file=sys.stderr)
    if not finished:
        n_left = len(inputs.crystals) - len(rows)
        print(f"stopped: {n_left} crystals are left; the same command goes on with them", file=sys.stderr)
        return 130
    if not inputs.errors and not failed:
        return 0
    return 1 if len(rows) > len(failed) else 2


def _show(rows: Sequence[Row], task: Task, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, allow_nan=False))
        return
    sentences = [_summary(rows), f"Crystals in {task.out}, every step's energy in {task.lines}."]
    if len(rows) > SHOWN:
        sentences.insert(0, f"{len(rows) - SHOWN} more are in {task.lines}.")
    print_tables([_table(rows[:SHOWN])] if rows else [], sentences)


def _summary(rows: Sequence[Row]) -> str:
    n_converged, n_failed = (sum(row[key] for row in rows) for key in ("converged", "failed"))
    left = len(rows) - n_converged - n_failed
    meaning = "".join(
        f" Functional {functional}, energy correction {correction}."
        for functional, correction in {(row["functional"], row["energy_correction"]) for row in rows}
    )
    return f"{n_converged} converged, {left} out of steps, {n_failed} failed.{meaning}"


def _table(rows: Sequence[Row]) -> Table:
    header = ("crystal", "formula", "steps", "fmax (eV/Å)", "energy (eV/atom)", "volume (%)", "outcome")
    return Table(
        "Relaxations",
        header,
        [
            (
                f"{row['file']}:{row['index']}",
                row["formula"],
                str(row["steps"]),
                text(row["fmax"], "{:.4f}"),
                text(row["energy_per_atom"], "{:.5f}"),
                text(row["volume_change"], "{:+.2f}", 100),
                row["reason"],
            )
            for row in rows
        ],
    )


def _write_report(path: Path, outcome: Outcome, task: Task) -> None:
    """Write the page: a table, the way energies and forces went, and the crystals from start to end."""
    rows, settings = outcome.rows, task.settings
    model = ", ".join(sorted({f"{row['settings']['model']} in {row['settings']['dtype']}" for row in rows}))
    energies, forces = {}, {}
    for row in rows:
        name, steps = f"{row['file']}:{row['index']} {row['formula']}", range(len(row["energies"]))
        above = [1000 * (energy - row["energy"]) / row["n_atoms"] for energy in row["energies"]]
        energies[name] = Line.of(steps, above)
        forces[name] = Line.of(steps, row["fmaxs"])
    movies: dict[str, Movie] = {}
    for place, (file, index) in enumerate(outcome.inputs.keys):
        if (file, index) in outcome.record.rows and len(movies) < MOVIES:
            movies[f"{file}:{index}"] = _movie(outcome, place, task)
    write_page(
        path,
        "Relaxation",
        [
            _summary(rows),
            f"Model {model}.",
            f"To {settings.fmax:g} eV/Å in at most {settings.max_steps} steps, cell {settings.cell}, "
            f"pressure {settings.pressure / GPA:g} GPa.",
        ],
        [_table(rows)],
        [
            Panel("Energy above the last step's", "meV/atom", "step", energies),
            Panel("Longest force", "eV/Å", "step", forces),
        ],
        movies,
    )


def _movie(outcome: Outcome, place: int, task: Task) -> Movie:
    """Show every step of a crystal where these have been written, else the first and the last."""
    crystal, key = outcome.inputs.crystals[place], outcome.inputs.keys[place]
    if task.trajectory is not None and (path := trajectory_path(task.trajectory, key)).is_file():
        row = outcome.record.rows[key]
        return Movie(len(row["energies"]), row["n_atoms"], partial(read_frames, path))
    return Movie.of([crystal.as_atoms(), outcome.record.crystal(key)])
