"""The rows of `bench balance` as a picture: loads batch by batch as the paper's Fig. 9, and efficiencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastchgnet.bench.rows import Row
from fastchgnet.plots import COLORS, INK, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {
    "sequential": ("#9a9a9a", "as they come"),
    "paper": (COLORS[0], "the paper's rule"),
    "lpt": (COLORS[1], "lpt"),
}
MARKERS = "osD^v"


def figure(rows: Sequence[Row]) -> Figure:
    """Draw the range of the ranks' features, batch by batch, of the first row, and the efficiency of all."""
    drawn = new_figure(2)
    _ranges(drawn.axes[0], rows[0])
    _efficiencies(drawn.axes[1], rows)
    return drawn


def _ranges(axes: Axes, row: Row) -> None:
    case = row["case"]
    title = f"{case['ranks']} ranks with {case['frames_per_rank']} frames each"
    style(axes, title, "Global batch", "Features of a rank, thousands")
    for name, (color, label) in LOOKS.items():
        found = row["strategies"][name]
        low, high = ([n / 1000 for n in of_ranks] for of_ranks in found["features"])
        text = f"{label}, CV {found['cv_features']:.3f}"
        axes.fill_between(range(1, len(low) + 1), low, high, color=color, alpha=0.55, lw=0.6, label=text)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, loc="lower left")


def _efficiencies(axes: Axes, rows: Sequence[Row]) -> None:
    style(axes, "Efficiency: mean over largest load", "Ranks", "")
    sizes = sorted({row["case"]["frames_per_rank"] for row in rows})
    for name, (color, label) in LOOKS.items():
        for marker, size in zip(MARKERS, sizes, strict=False):
            reached = {  # of two rows of one case the last counts
                row["case"]["ranks"]: row["strategies"][name]["efficiency_cost"]
                for row in rows
                if row["case"]["frames_per_rank"] == size
            }
            ranks = sorted(reached)
            axes.plot(ranks, [reached[n] for n in ranks], color=color, marker=marker, ms=4, lw=1.4)
        axes.plot([], [], color=color, lw=1.4, label=label)
        for row in (row for row in rows if "measured" in row):
            measured = row["measured"]["strategies"][name]["efficiency"]
            axes.plot(row["case"]["ranks"], measured, "*", color=color, ms=11, mec=INK, mew=0.7)
    if any("measured" in row for row in rows):
        axes.plot([], [], "*", color="white", ms=11, mec=INK, mew=0.7, label="measured steps")
    for marker, size in zip(MARKERS, sizes, strict=False):
        axes.plot([], [], marker, color=INK, ms=4, label=f"{size} frames each")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["case"]["ranks"] for row in rows}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(axes.get_ylim()[0] - 0.12, 1.02)  # room for the legend
    axes.legend(fontsize=8, frameon=False, loc="lower left", ncols=2)
