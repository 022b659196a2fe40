"""What a simulation has shown: a table for the terminal, and a page with curves and moving crystals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fastchgnet.report import Table, text
from fastchgnet.sim.md.files import RunFolder, read_log
from fastchgnet.sim.md.loop import MolecularDynamics
from fastchgnet.sim.outputs import read_frames
from fastchgnet.sim.page import Indices, Line, Movie, Panel, write_page


class _Curve(NamedTuple):
    """A panel of the page."""

    name: str
    unit: str
    column: str
    per_atom: bool
    scale: float = 1.0
    from_start: bool = False


_CURVES = (
    _Curve("Temperature", "K", "temperature_k", False),
    _Curve("Potential energy", "eV/atom", "potential_ev", True),
    _Curve("Conserved energy, change", "meV/atom", "conserved_ev", True, 1000.0, True),
    _Curve("Pressure", "GPa", "pressure_gpa", False),
)
_VOLUME = _Curve("Volume", "Å³/atom", "volume_a3", True)


def summary_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Tabulate what became of each crystal."""
    header = ("crystal", "formula", "ps", "T (K)", "P (GPa)", "drift (meV/atom/ps)", "ended")
    lines = [
        (
            row["name"],
            row["formula"],
            f"{row['time_ps']:.3f}",
            text(row["mean_temperature_k"], "{:.1f}"),
            text(row["mean_pressure_gpa"], "{:.3f}"),
            text(row["drift_mev_per_atom_per_ps"], "{:.3g}"),
            row["reason"] or "well",
        )
        for row in rows
    ]
    return Table("Means over the frames", header, lines)


def show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print what became of each crystal, as a table or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        Console().print(summary_table(rows).rich())


def write_report(
    path: Path, folder: RunFolder, dynamics: MolecularDynamics, rows: Sequence[dict[str, Any]]
) -> None:
    """Write the page of a run.

    Raises:
        InputError: the page cannot be written, or what draws it is not installed.
    """
    settings, provenance = dynamics.settings, dynamics.potential.provenance
    numbers = [number for number, row in enumerate(rows) if row["frames"]]

    @cache
    def log(number: int, kept: tuple[int, ...]) -> dict[str, list[float]]:
        return read_log(folder.log(number), kept)

    def line(number: int, curve: _Curve) -> Line:
        def read(kept: Indices) -> tuple[list[float], list[float]]:
            columns = log(number, tuple(kept.tolist()))
            return columns["time_ps"], _values(curve, columns[curve.column], rows[number]["n_atoms"])

        return Line(rows[number]["frames"], read)

    curves = (*_CURVES, _VOLUME) if settings.ensemble == "npt" else _CURVES
    panels = [
        Panel(
            curve.name,
            curve.unit,
            "time (ps)",
            {rows[number]["name"]: line(number, curve) for number in numbers},
        )
        for curve in curves
    ]
    movies = {
        rows[number]["name"]: Movie(
            rows[number]["frames"],
            rows[number]["n_atoms"],
            partial(read_frames, folder.trajectory(number)),
        )
        for number in numbers
    }
    notes = [
        f"{settings.ensemble.upper()}, steps of {settings.timestep:g} fs, seed {settings.seed}.",
        f"Model {provenance.name}, functional {provenance.functional}, "
        f"energy correction {provenance.energy_correction}.",
        "Drift is the slope of the conserved energy by least squares.",
    ]
    write_page(path, "Molecular dynamics", notes, [summary_table(rows)], panels, movies)


def _values(curve: _Curve, values: Sequence[float], n_atoms: int) -> list[float]:
    start = values[0] if curve.from_start else 0.0
    scale = curve.scale / (n_atoms if curve.per_atom else 1)
    return [(value - start) * scale for value in values]
