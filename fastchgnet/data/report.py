"""What is in a store: counts, elements, labels, and the sizes of its crystals (the paper's Fig. 5)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from fastchgnet.config import Config
from fastchgnet.data.layout import Counts, Plan
from fastchgnet.data.store import Store
from fastchgnet.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PERCENTILES = (5, 25, 50, 75, 95, 99)


class Distribution(Config):
    """How a count is spread over the frames."""

    mean: float
    percentiles: dict[str, float]
    minimum: int
    maximum: int
    total: int


class Report(Config):
    """Summary of a store."""

    store: str
    bytes_per_frame: float
    n_materials: int
    counts: Counts
    plan: Plan
    config_types: dict[str, int]
    elements: dict[str, int]
    distributions: dict[str, Distribution]


def inspect(store: Store) -> Report:
    """Summarise a store; `elements` counts atoms, `config_types` frames, `distributions` things per frame."""
    atoms_of = store.element_counts()
    names, n_frames = np.unique(store.config_types, return_counts=True)
    n_bytes = sum(path.stat().st_size for path in store.path.iterdir())
    return Report(
        store=str(store.path),
        bytes_per_frame=n_bytes / len(store),
        n_materials=len(np.unique(store.groups)),
        counts=store.header.counts,
        plan=store.header.plan,
        config_types=dict(zip(names.tolist(), n_frames.tolist(), strict=True)),
        elements={chemical_symbols[z]: int(atoms_of[z]) for z in np.flatnonzero(atoms_of)},
        distributions={name: _distribution(values) for name, values in _per_frame(store).items()},
    )


def render(report: Report) -> Group:
    """Lay a report out as tables for a terminal."""
    counts, plan = report.counts, report.plan
    facts = Table(title=report.store, show_header=False, title_justify="left")
    coverage = {
        label: f"{getattr(counts, f'with_{label}') / counts.n_frames:.1%}"
        for label in ("energy", "forces", "stress", "magmoms")
    }
    for name, value in (
        ("frames", f"{counts.n_frames:,}"),
        ("atoms", f"{counts.n_atoms:,}"),
        ("materials", f"{report.n_materials:,}"),
        ("frames with", ", ".join(f"{label} {share}" for label, share in coverage.items())),
        ("skipped", f"{counts.n_skipped:,} bad frames, {counts.n_stress_dropped:,} stresses of no volume"),
        ("functional", plan.provenance.functional),
        ("energy correction", plan.provenance.energy_correction),
        ("bytes per frame", f"{report.bytes_per_frame:,.0f}"),
    ):
        facts.add_row(name, value)
    cutoffs = f"bonds within {plan.atom_cutoff:g} A, angles between bonds within {plan.bond_cutoff:g} A"
    sizes = Table("per frame", "mean", *(f"{p}%" for p in PERCENTILES), "max", title=cutoffs)
    for name, spread in report.distributions.items():
        cells = (spread.mean, *spread.percentiles.values(), spread.maximum)
        sizes.add_row(name, *(f"{cell:,.0f}" for cell in cells))
    types = Table("config_type", "frames", title="frames by config_type")
    for name, n_frames in sorted(report.config_types.items(), key=lambda pair: -pair[1]):
        types.add_row(name, f"{n_frames:,}")
    ranked = sorted(report.elements.items(), key=lambda pair: -pair[1])
    return Group(
        facts,
        sizes,
        types,
        f"{len(ranked)} elements, by atoms: " + ", ".join(f"{symbol} {n:,}" for symbol, n in ranked),
    )


def plot(store: Store, path: Path) -> None:
    """Draw the distributions of atoms, bonds and angles per frame, as the paper's Fig. 5, into an image file.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install 'fastchgnet[plot]'") from None
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, 3), _per_frame(store).items(), strict=True):
        _histogram(axes, name, values)
    cutoffs = store.header.plan
    figure.suptitle(
        f"{store.path.name}: {len(store):,} frames; bonds within {cutoffs.atom_cutoff:g} \u00c5, "
        f"angles between bonds within {cutoffs.bond_cutoff:g} \u00c5"
    )
    beside = path.with_name(f".{path.name}.new")
    try:
        figure.savefig(beside, dpi=150, format=path.suffix.lstrip(".") or "png")
        beside.replace(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be drawn: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _per_frame(store: Store) -> dict[str, NDArray[np.int64]]:
    """Count atoms, undirected bonds within the atom cutoff, and angles of every frame."""
    sizes = store.sizes.astype(np.int64)
    return {"atoms": sizes[:, 0], "bonds": sizes[:, 1] // 2, "angles": sizes[:, 3]}


def _distribution(values: NDArray[np.int64]) -> Distribution:
    return Distribution(
        mean=float(values.mean()),
        percentiles={str(p): float(np.percentile(values, p)) for p in PERCENTILES},
        minimum=int(values.min()),
        maximum=int(values.max()),
        total=int(values.sum()),
    )


def _histogram(axes: Axes, name: str, values: NDArray[np.int64]) -> None:
    """Draw one long-tailed count over a logarithmic axis, with its median and mean."""
    shown = values[values > 0]
    smallest, largest = (int(shown.min()), int(shown.max())) if len(shown) else (1, 1)
    # Narrower bins than one would leave gaps between whole numbers.
    edges = np.unique(np.round(np.geomspace(smallest, largest + 1, 41))) - 0.5
    axes.hist(shown, bins=edges.tolist(), color="tab:blue", edgecolor="white", linewidth=0.3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(edges[0], edges[-1])
    mean, median = float(values.mean()), float(np.median(values))
    axes.axvline(max(median, edges[0]), color="black", linewidth=1, label=f"median {median:,.0f}")
    axes.axvline(max(mean, edges[0]), color="black", linewidth=1, linestyle="--", label=f"mean {mean:,.0f}")
    axes.legend(frameon=False, fontsize="small", loc="best")
    absent = len(values) - len(shown)
    axes.set_xlabel(f"{name} per frame" + (f" ({absent:,} frames have none)" if absent else ""))
    axes.set_ylabel("frames")
