"""The rows of `bench lr` as a picture: errors over the epochs of large batches, as the paper's Fig. 6."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastchgnet.bench.rows import Row
from fastchgnet.plots import COLORS, INK, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {"base": ("#9a9a9a", ":"), "default": (COLORS[1], "-"), "scaled": (COLORS[0], "-")}

PANELS = {
    "energy_mev_per_atom": ("Energy", "meV/atom"),
    "forces_mev_per_angstrom": ("Force", "meV/Å"),
    "stress_gpa": ("Stress", "GPa"),
    "magmoms_mmub": ("Magmom", "mμ_B"),
}


def figure(rows: Sequence[Row]) -> Figure:
    """Draw a panel for each quantity that has labels, with a curve for each run of the last comparison."""
    last = rows[-1]
    of_arm = {row["arm"]: row for row in rows if row["options"] == last["options"]}
    runs = [of_arm[arm] for arm in LOOKS if arm in of_arm]
    panels = [key for key in PANELS if any(point[key] is not None for row in runs for point in row["curve"])]
    drawn = new_figure(len(panels))
    frames = last["frames"]
    title = f"{frames['train']:,} frames, {last['readout']} readout; errors of {frames['val']:,} others"
    drawn.suptitle(title, fontsize=12, color=INK)
    for axes, key in zip(drawn.axes, panels, strict=True):
        _panel(axes, runs, key)
    drawn.axes[0].legend(fontsize=8, frameon=False)
    return drawn


def _panel(axes: Axes, rows: Sequence[Row], key: str) -> None:
    name, unit = PANELS[key]
    style(axes, name, "Epoch", f"Validation MAE ({unit})")
    for row in rows:
        color, line = LOOKS[row["arm"]]
        epochs, errors = ([point[of] for point in row["curve"]] for of in ("epoch", key))
        label = f"batch {row['batch_size']:,}, rate {row['learning_rate']:.2g}"
        if row["failed_in_epoch"]:
            label += f", failed in epoch {row['failed_in_epoch']}"
        axes.plot(epochs, errors, line, color=color, lw=1.8, marker="o", ms=3, label=label)
    axes.locator_params(axis="x", integer=True)
