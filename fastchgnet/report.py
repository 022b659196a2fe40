"""Show an evaluation: tables for the terminal, and a folder with figures, plots and a page to read."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from fastchgnet import __version__
from fastchgnet.evaluate import QUANTITIES, SHIFTED, Evaluation, Metric
from fastchgnet.files import check_folder, refuse_existing, write_atomically
from fastchgnet.markup import page, paragraphs
from fastchgnet.plots import (
    NEEDS_MATPLOTLIB,
    Curve,
    Parity,
    has_matplotlib,
    learning_figure,
    parity_figure,
    png,
)
from fastchgnet.prediction import FilePrediction, to_json, write_predictions
from fastchgnet.train.log import read_metrics
from fastchgnet.units import GPA

if TYPE_CHECKING:
    from collections.abc import Callable

MISSING = "—"

FEW_FRAMES = 5
"""Frames per fitted element energy below which a warning goes with the error after the fit."""

REPORT = ("metrics.json", "report.html", "parity.png", "learning.png")
"""Files of the report of an evaluation."""

CURVES = {
    "energy": "energy_mev_per_atom",
    "forces": "forces_mev_per_angstrom",
    "stress": "stress_gpa",
    "magmoms": "magmoms_mmub",
}
"""Names of the errors in a run's metrics.jsonl."""


class Table(NamedTuple):
    """A table of text."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def rich(self) -> RichTable:
        """Render for a terminal; all columns but the first are numbers."""
        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for position, name in enumerate(self.header):
            table.add_column(name, justify="right" if position else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def html(self) -> str:
        """Render for a page."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows
        )
        return (
            f"<h2>{html.escape(self.title)}</h2>\n<table>\n<thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{body}\n</tbody>\n</table>"
        )


def text(value: float | None, pattern: str, factor: float = 1) -> str:
    """Write a number times a factor, and a dash for what is missing."""
    return MISSING if value is None else pattern.format(value * factor if factor != 1 else value)


def summary_tables(evaluation: Evaluation) -> list[Table]:
    """Tabulate an evaluation: one line as in the paper's Table I, all quantities, and each config_type."""
    keys = list(evaluation.overall)
    errors = tuple(f"{QUANTITIES[key].name} ({QUANTITIES[key].error_unit})" for key in keys)
    model = (evaluation.model.name, f"{evaluation.n_parameters / 1000:.1f}k")
    return [
        Table(
            "Mean absolute errors",
            ("model", "param", *errors),
            [(*model, *_maes(evaluation.overall))],
        ),
        Table(
            "All quantities",
            ("quantity", "labels", "MAE", "RMSE", "unit", "R²"),
            [
                (
                    QUANTITIES[key].name,
                    str(m.n),
                    _figure(m.mae),
                    _figure(m.rmse),
                    QUANTITIES[key].error_unit,
                    _r2(m.r2),
                )
                for key, m in evaluation.overall.items()
            ],
        ),
        Table(
            "Mean absolute errors by config_type",
            ("config_type", "frames", *errors),
            [
                (name, str(evaluation.n_frames_by_config_type[name]), *_maes(metrics))
                for name, metrics in evaluation.by_config_type.items()
            ],
        ),
    ]


def detail_tables(evaluation: Evaluation) -> list[Table]:
    """Tabulate R^2 and the number of labels of each config_type."""
    names = tuple(QUANTITIES[key].name for key in evaluation.overall)
    rows = evaluation.by_config_type.items()
    return [
        Table(
            "R² by config_type",
            ("config_type", *names),
            [(name, *(_r2(m.r2) for m in metrics.values())) for name, metrics in rows],
        ),
        Table(
            "Labels by config_type",
            ("config_type", *names),
            [(name, *(str(m.n) for m in metrics.values())) for name, metrics in rows],
        ),
    ]


def prediction_table(predictions: Sequence[FilePrediction]) -> Table:
    """Tabulate predictions, a line for each frame; the title says what the energies mean."""
    meaning = predictions[0].prediction
    title = f"Functional {meaning.functional}, energy correction {meaning.energy_correction}"
    header = (
        "file",
        "index",
        "formula",
        "E (eV/atom)",
        "max |F| (eV/Å)",
        "pressure (GPa)",
        "total |m| (μ_B)",
    )
    rows = []
    for one in predictions:
        prediction = one.prediction
        pressure = -np.trace(prediction.stress) / 3 / GPA
        figures = (
            f"{prediction.energy_per_atom:.4f}",
            f"{np.linalg.norm(prediction.forces, axis=1).max():.4f}",
            MISSING if np.isnan(pressure) else f"{pressure:.3f}",
            f"{prediction.magmoms.sum():.3f}",
        )
        rows.append((one.crystal.file, str(one.crystal.index), one.formula, *figures))
    return Table(title, header, rows)


def notes(evaluation: Evaluation) -> list[str]:
    """Say in sentences where the labels come from and what the energies mean."""
    data, model, n_energies = evaluation.data, evaluation.model, evaluation.overall["energy"].n
    labels = ", ".join(filter(None, (data.name, *evaluation.files, data.source)))
    sentences = [
        f"Labels: {labels}; functional {data.functional}, energy correction {data.energy_correction}.",
        f"Model: {model.name}; functional {model.functional}, energy correction {model.energy_correction}.",
    ]
    if evaluation.shift is not None:
        sentences.append(
            "The functional or the correction differs or is unknown, so that energies cannot be compared as "
            "they are: 'Energy, shifted' is after adding one energy per element to the predictions, "
            f"{evaluation.n_shifted_elements} in all, fitted by least squares to the evaluated frames "
            f"({n_energies} with an energy)."
        )
        if n_energies < FEW_FRAMES * evaluation.n_shifted_elements:
            sentences.append("With so few frames the fitted energies hide a large part of the error.")
    sentences.append(
        "Energies are per atom, forces and stress by component, magnetic moments are magnitudes. "
        "Missing labels do not count."
    )
    return sentences


def parity_panels(evaluation: Evaluation) -> list[Parity]:
    """Prepare parity plots of the four quantities; energies after the shift where there is one."""
    left_out = "energy" if evaluation.shift is not None else SHIFTED
    panels = []
    for key, sample in evaluation.samples.items():
        if key == left_out:
            continue
        quantity, metric = QUANTITIES[key], evaluation.overall[key]
        shown, n = len(sample.reference), metric.n
        counted = f"{n:,} values" if shown == n else f"{shown:,} of {n:,} values, at random"
        note = f"MAE {_figure(metric.mae)} {quantity.error_unit}\nR² {_r2(metric.r2)}\n{counted}"
        name = quantity.name + (" per element" if key == SHIFTED else "")
        panels.append(Parity(name, quantity.value_unit, sample.reference, sample.prediction, note))
    return panels


def learning_curves(rows: Sequence[Mapping]) -> list[Curve]:
    """Extract validation errors over the epochs from the rows of a run's metrics.jsonl."""
    curves = []
    for key, name in CURVES.items():
        points = [(row["epoch"], row["val"][name]) for row in rows if row["val"].get(name) is not None]
        if points:
            epoch, value = zip(*points, strict=True)
            curves.append(Curve(QUANTITIES[key].name, QUANTITIES[key].error_unit, epoch, value))
    return curves


def metrics_json(evaluation: Evaluation, about: Mapping[str, str]) -> str:
    """Write all figures of an evaluation, and what it was made of, as JSON."""
    metrics = {"fastchgnet": __version__, **about, **evaluation.as_dict()}
    return json.dumps(metrics, indent=2, allow_nan=False)


def check_report(folder: Path | None) -> None:
    """Look before an evaluation whether a folder takes its report.

    Raises:
        InputError: it holds one, or no file can be written there.
    """
    if folder is not None:
        refuse_existing(folder / name for name in REPORT)
        check_folder(folder)


def write_report(
    evaluation: Evaluation, folder: Path, about: Mapping[str, str], history: Sequence[Mapping] = ()
) -> None:
    """Write the files of REPORT into a folder, learning.png only with a history.

    The page holds everything it shows. Without matplotlib there are no plots; the numbers are written.

    Args:
        evaluation: what to report.
        folder: where; made where it is missing.
        about: what was evaluated, by name: file, store, split, ...
        history: rows of the metrics.jsonl of the model's run.

    Raises:
        InputError: the folder does not take the files.
    """
    _write(folder / "metrics.json", metrics_json(evaluation, about) + "\n")
    images = {}
    if has_matplotlib():
        images["parity.png"] = png(parity_figure(parity_panels(evaluation), evaluation.model.name))
        if curves := learning_curves(history):
            images["learning.png"] = png(learning_figure(curves, f"Training of {evaluation.model.name}"))
    for name, content in images.items():
        _write(folder / name, content)
    _write(folder / "report.html", _page(evaluation, about, images))


def show_evaluation(
    evaluation: Evaluation, about: Mapping[str, str], folder: Path | None, as_json: bool
) -> None:
    """Print an evaluation, and write its report where a folder is given.

    `about["file"]` is the model's; learning curves come from the metrics.jsonl beside it.
    """
    if folder is not None:
        model = Path(about["file"])
        write_report(evaluation, folder, about, read_metrics(model.parent) if model.is_file() else ())
        if not has_matplotlib():
            Console(stderr=True).print(f"no plots in {folder}: {NEEDS_MATPLOTLIB}", markup=False)
    if as_json:
        print(metrics_json(evaluation, about))
    else:
        print_tables(summary_tables(evaluation), notes(evaluation))


def show_predictions(predictions: Sequence[FilePrediction], out: Path | None, as_json: bool) -> None:
    """Print predictions, and write them where a file is given."""
    if out is not None:
        write_predictions(predictions, out)
    if as_json:
        print(to_json(predictions))
    elif predictions:
        print_tables([prediction_table(predictions)])


def print_tables(tables: Iterable[Table], sentences: Iterable[str] = ()) -> None:
    """Print tables and sentences to stdout; where that is no terminal, lines are never cut."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=200)
    for table in tables:
        console.print(table.rich())
    for sentence in sentences:
        console.print(sentence, markup=False)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr, where that is a terminal; yield the function that moves it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


def _page(evaluation: Evaluation, about: Mapping[str, str], images: Mapping[str, bytes]) -> str:
    first, *others = summary_tables(evaluation)
    described = "; ".join(f"{name} {value}" for name, value in about.items())
    parts = [
        paragraphs([f"{described}; {evaluation.n_frames} frames.", *notes(evaluation)]),
        first.html(),
    ]
    headings = {"parity.png": "Predicted against labelled", "learning.png": "Learning curves"}
    for name, content in images.items():
        encoded = base64.b64encode(content).decode()
        parts.append(f"<h2>{headings[name]}</h2>")
        parts.append(f'<img alt="{headings[name]}" src="data:image/png;base64,{encoded}">')
    parts += [table.html() for table in (*others, *detail_tables(evaluation))]
    return page(f"Evaluation of {evaluation.model.name}", "\n".join(parts))


def _write(path: Path, content: str | bytes) -> None:
    data = content.encode() if isinstance(content, str) else content
    write_atomically(path, data)


def _maes(metrics: Mapping[str, Metric]) -> Iterator[str]:
    return (_figure(m.mae) for m in metrics.values())


def _figure(value: float) -> str:
    """Round to three significant digits, or to integers above a hundred, or to zero."""
    if math.isnan(value):
        return MISSING
    if abs(value) < 5e-4:
        return "0.000"
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _r2(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.4f}"
