"""The rows of `bench scaling` as a picture: strong and weak scaling, as the paper's Fig. 10 and beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastchgnet.bench.rows import Row
from fastchgnet.bench.scaling_model import Mode
from fastchgnet.bench.scaling_tables import PAPER, SAMPLER, describe_step
from fastchgnet.plots import COLORS, INK, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES: Mapping[Mode, str] = {"strong": "Strong scaling", "weak": "Weak scaling"}
DASHES = ("--", "-.", ":")
GREY = "#7a7a7a"

_GAP = 3
"""Least distance, in percent, of the figures behind the last points."""


def figure(rows: Sequence[Row]) -> Figure:
    """Draw efficiencies over the number of GPUs, or of processes where these were measured.

    What is simulated is dashed, with nothing of the all-reduce hidden, and its band reaches to where all but
    the last message is; what was measured has filled markers.
    """
    drawn = new_figure(2)
    drawn.set_size_inches(11.5, 6.4)
    steps = {row["readout"] + describe_step(row): None for row in rows if row["kind"] == "simulated"}
    colors = dict(zip(steps, COLORS * len(steps), strict=False))
    for axes, mode in zip(drawn.axes, TITLES, strict=True):
        style(
            axes,
            TITLES[mode],
            "GPUs (measured: processes)",
            "Efficiency relative to 4 GPUs (measured: to 1 process), %",
        )
        _panel(axes, mode, [row for row in rows if row["mode"] == mode], colors)
    return drawn


def _panel(axes: Axes, mode: Mode, rows: Sequence[Row], colors: Mapping[str, str]) -> None:
    simulated = [row for row in rows if row["kind"] == "simulated"]
    measured = [row for row in rows if row["kind"] == "measured"]
    ranks = {n for curve in map(_measured_curve, measured) for n in curve} | _published(axes, mode)
    for row in simulated:
        ranks |= {one["ranks"] for one in row["strategies"][SAMPLER] if one["ranks"] >= 4}
    sizes = sorted({row["size"] for row in simulated})
    ends = []
    for row in simulated:
        color = colors[row["readout"] + describe_step(row)]
        dashes = DASHES[sizes.index(row["size"]) % len(DASHES)]
        ends.append((*_simulated(axes, row, color, dashes), color))
    _label_ends(axes, max(ranks), ends)
    for marker, row in zip("osv^", measured, strict=False):
        curve = _measured_curve(row)
        label = f"measured: {row['readout']}, {_frames(mode, row['size'])}, processes on {_device(row)}"
        axes.plot(
            list(curve), list(curve.values()), f"-{marker}", color=INK, ms=5, lw=1.2, label=label, zorder=4
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ranks))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(min(ranks) / 1.15, max(ranks) * 1.8)  # room for the figures of the last points
    axes.set_ylim(min(50, axes.get_ylim()[0]), 108)
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))


def _published(axes: Axes, mode: Mode) -> set[int]:
    size, efficiency = PAPER[mode]
    values = [100 * value for value in efficiency.values()]
    label = f"published: direct, {_frames(mode, size)}, A100"
    axes.plot(list(efficiency), values, "-D", color=GREY, ms=5, lw=1.4, label=label)
    for n, value in list(zip(efficiency, values, strict=True))[1:]:
        offset = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{value:.3g}", (n, value), fontsize=8, color=GREY, **offset)  # type: ignore[arg-type]
    return set(efficiency)


def _simulated(axes: Axes, row: Row, color: str, dashes: str) -> tuple[float, str]:
    """Draw a curve and its band; return where it ends, and the figures to be written there."""
    points = [one for one in row["strategies"][SAMPLER] if one["ranks"] >= 4]
    ranks = [one["ranks"] for one in points]
    low, high = ([100 * one[f"efficiency_4{suffix}"] for one in points] for suffix in ("", "_hidden"))
    what = f"{row['readout']}, {_frames(row['mode'], row['size'])}"
    label = f"simulated: {what}, step {describe_step(row)}"
    axes.plot(ranks, low, dashes, color=color, lw=1.6, label=label)
    axes.fill_between(ranks, low, high, color=color, alpha=0.2, lw=0)
    lowest, highest = f"{low[-1]:.0f}", f"{high[-1]:.0f}"
    return low[-1], lowest if lowest == highest else f"{lowest} to {highest}"


def _label_ends(axes: Axes, x: int, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write figures behind the last points, the highest first, each clear of the one above."""
    below = 108.0
    for height, text, color in sorted(ends, reverse=True):
        below = min(height, below - _GAP)
        axes.annotate(text, (1.08 * x, below), fontsize=8, color=color, va="center")


def _measured_curve(row: Row) -> dict[int, float]:
    return {one["ranks"]: 100 * one["efficiency_1"] for one in row["points"]}


def _frames(mode: Mode, size: int) -> str:
    return f"{size:,} frames" + (" each" if mode == "weak" else "")


def _device(row: Row) -> str:
    return "a CPU" if row["environment"]["device_type"] == "cpu" else row["environment"]["device"]
