"""The rows as a picture: the steps of the optimisation one after the other, as the paper's Fig. 8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastchgnet.bench import balance_plot, learning_plot, scaling_plot
from fastchgnet.bench.rows import Row, read
from fastchgnet.errors import InputError
from fastchgnet.files import write_atomically
from fastchgnet.plots import COLORS, INK, new_figure, png, require_matplotlib, style
from fastchgnet.published import CHGNET_VERSION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    ("train", "conservative"): "Training step, conservative",
    ("train", "direct"): "Training step, direct",
    ("infer", "conservative"): "Inference, conservative",
    ("infer", "direct"): "Inference, direct",
}
OTHERS = {"balance": balance_plot.figure, "lr": learning_plot.figure, "scaling": scaling_plot.figure}
"""Figures of rows of one command, which are kept in files of their own."""

BASELINE = f"chgnet {CHGNET_VERSION}"


def draw(source: Path, out: Path) -> None:
    """Draw the training and inference rows of a file, or its rows of one of `OTHERS`, as a PNG.

    Raises:
        InputError: no such rows, rows of several devices, no matplotlib, or `out` cannot be written.
    """
    require_matplotlib()
    every = read(source)
    for command, figure_of in OTHERS.items():
        if every and all(row["command"] == command for row in every):
            write_atomically(out, png(figure_of(every)))
            return
    rows = [row for row in every if (row["command"], row["readout"]) in TITLES]
    if not rows:
        raise InputError(f"{source}: no rows of training or inference")
    if len({(row["environment"]["device"], row["environment"]["threads"]) for row in rows}) > 1:
        raise InputError(f"{source}: rows of several devices or numbers of threads; keep one file for each")
    write_atomically(out, png(figure(rows)))


def figure(rows: Sequence[Row]) -> Figure:
    """Draw one panel for each kind of run; steps in the order of their first rows, the last row counts."""
    kinds = [kind for kind in TITLES if any((row["command"], row["readout"]) == kind for row in rows)]
    drawn = new_figure(len(kinds))
    device = rows[-1]["environment"]
    threads = f", {device['threads']} threads" if device["device_type"] == "cpu" else ""
    drawn.suptitle(f"{device['device']}{threads}", fontsize=12, color=INK)
    for axes, kind in zip(drawn.axes, kinds, strict=True):
        _panel(axes, [row for row in rows if (row["command"], row["readout"]) == kind], TITLES[kind])
    return drawn


def _panel(axes: Axes, rows: Sequence[Row], title: str) -> None:
    style(axes, title, "", "systems per second")
    labels = list(dict.fromkeys(row["label"] or "no label" for row in rows))
    sizes = sorted({row["batch"]["systems"] for row in rows})
    width = 0.8 / len(sizes)
    how: dict[str, Any] = {
        "textcoords": "offset points",
        "ha": "center",
        "va": "bottom",
        "fontsize": 8,
        "color": INK,
        "rotation": 90 if len(sizes) > 1 else 0,  # bars side by side are narrower than their figures
    }
    for place, size in enumerate(sizes):
        of_size = {row["label"] or "no label": row for row in rows if row["batch"]["systems"] == size}
        offset = (place - (len(sizes) - 1) / 2) * width
        theirs = [row["chgnet"]["systems_per_second"] for row in of_size.values() if "chgnet" in row]
        heights = {0: (theirs[-1], "1x")} if theirs else {}
        for step, label in enumerate(labels, start=1):
            if label in of_size:
                row = of_size[label]
                text = f"{row['ratio']:.3g}x" if "ratio" in row else ""
                heights[step] = (row["ours"]["systems_per_second"], text)
        color = COLORS[place % len(COLORS)]
        axes.bar(
            [step + offset for step in heights],
            [height for height, _ in heights.values()],
            width=0.92 * width,
            color=color,
            label=f"{size} systems",
        )
        for step, (height, text) in heights.items():
            axes.annotate(text, (step + offset, height), (0, 2), **how)
    axes.set_xticks(range(len(labels) + 1), [BASELINE, *labels], rotation=20, ha="right")
    axes.margins(y=0.2)
    axes.legend(fontsize=8, frameon=False)
