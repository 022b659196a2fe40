"""Plots for reports: parity and learning curves, drawn on Figure objects.

Nothing here imports pyplot or touches rcParams, so a caller's own plots and backend stay as they are.
matplotlib is optional: `require_matplotlib` says so in one line.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastchgnet.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDS_MATPLOTLIB = "plots need matplotlib: pip install 'fastchgnet[plot]'"

INK = "#333333"
COLORS = ("#2f6690", "#d1603d", "#4f9d69", "#8e6c8a")


@dataclass(frozen=True, slots=True)
class Parity:
    """One parity plot: values in `unit`, and the error as the tables give it."""

    name: str
    unit: str
    reference: NDArray[np.float64]  # [n]
    prediction: NDArray[np.float64]  # [n]
    note: str  # the corner: MAE, R^2, how many values


@dataclass(frozen=True, slots=True)
class Curve:
    """One learning curve."""

    name: str
    unit: str
    epoch: Sequence[float]
    value: Sequence[float]


def has_matplotlib() -> bool:
    """Tell whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise InputError where matplotlib is not installed."""
    if not has_matplotlib():
        raise InputError(NEEDS_MATPLOTLIB)


def parity_figure(panels: Sequence[Parity], title: str) -> Figure:
    """Draw predicted against reference values, coloured by the logarithm of their density.

    Source: the paper's Fig. 7, for all four quantities.
    """
    figure = new_figure(len(panels))
    figure.suptitle(title, fontsize=12, color=INK)
    for axes, panel in zip(figure.axes, panels, strict=True):
        _draw_parity(axes, panel)
    return figure


def learning_figure(curves: Sequence[Curve], title: str) -> Figure:
    """Draw one panel per curve over the epochs, on a logarithmic axis where the range is wide."""
    figure = new_figure(len(curves))
    from matplotlib.ticker import LogLocator

    figure.suptitle(title, fontsize=12, color=INK)
    for axes, curve, color in zip(figure.axes, curves, COLORS, strict=False):
        axes.plot(curve.epoch, curve.value, color=color, lw=1.8, marker="o", ms=3)
        if 0 < 3 * min(curve.value) < max(curve.value):
            axes.set_yscale("log", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        style(axes, curve.name, "Epoch", f"Validation MAE ({curve.unit})")
    return figure


def new_figure(n_panels: int) -> Figure:
    """Make a figure of square panels, two to a row, without pyplot's global state."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_columns = min(2, n_panels)
    n_rows = -(-n_panels // n_columns)
    figure = Figure(figsize=(4.8 * n_columns, 4.2 * n_rows + 0.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for position in range(n_panels):
        figure.add_subplot(n_rows, n_columns, position + 1)
    return figure


def style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Give axes the look that all reports share."""
    axes.set_title(title, fontsize=11, color=INK)
    axes.set_xlabel(_typeset(x_label), fontsize=10, color=INK)
    axes.set_ylabel(_typeset(y_label), fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(visible=True, color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def png(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _typeset(text: str) -> str:
    """Set the Bohr magneton with its subscript."""
    return text.replace("μ_B", r"$\mu_\mathrm{B}$")


def _draw_parity(axes: Axes, panel: Parity) -> None:
    style(axes, panel.name, f"Reference ({panel.unit})", f"Predicted ({panel.unit})")
    axes.set_box_aspect(1)
    if not len(panel.reference):
        axes.text(0.5, 0.5, "no labels", transform=axes.transAxes, ha="center", color=INK)
        return
    both = np.concatenate([panel.reference, panel.prediction])
    low, high = both.min(), both.max()
    margin = 0.04 * (high - low) or 0.5
    low, high = low - margin, high + margin
    axes.plot([low, high], [low, high], color="black", lw=1.0, zorder=3)
    bins = axes.hexbin(
        panel.reference,
        panel.prediction,
        gridsize=60,
        extent=(low, high, low, high),
        mincnt=1,
        bins="log",
        cmap="viridis",
        linewidths=0.1,
        zorder=2,
    )
    axes.locator_params(nbins=7)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
    corner = axes.text(0.04, 0.96, _typeset(panel.note), transform=axes.transAxes, va="top", bbox=box)
    corner.set(fontsize=9, color=INK, linespacing=1.4, zorder=4)
    bins.set_clim(1, max(10, np.asarray(bins.get_array()).max()))
    scale = axes.figure.colorbar(bins, ax=axes, shrink=0.8, pad=0.02)
    scale.ax.tick_params(labelsize=8, colors=INK)
    scale.ax.minorticks_off()
    scale.set_label("values per hexagon", fontsize=8, color=INK)
