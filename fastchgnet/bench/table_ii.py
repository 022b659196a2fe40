"""Steps of molecular dynamics as the FastCHGNet paper's Table II, its figures beside those measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ase.formula import Formula

from fastchgnet.bench.rows import Row
from fastchgnet.report import Table, text


class Published(NamedTuple):
    """A line of the FastCHGNet paper's Table II; one A100."""

    crystal: str
    n_atoms: int
    n_bonds: int
    n_angles: int
    chgnet: float  # s
    fastchgnet: float  # s
    speedup: float


TABLE_II = (
    Published("LiMnO2", 8, 336, 744, 0.022, 0.0077, 2.86),
    Published("LiTiPO5", 32, 1258, 2292, 0.021, 0.0076, 2.63),
    Published("Li9Co7O16", 32, 1780, 8376, 0.023, 0.0077, 3.03),
)

HEADER = (
    *("crystal", "atoms", "bonds", "angles", "chgnet ms", "ours, ASE ms", "ours ms", "ratio, ASE", "ratio"),
    *("paper: CHGNet ms", "FastCHGNet ms", "ratio"),
)


def tables(rows: Sequence[Row]) -> list[Table]:
    """Show rows of md as the paper's Table II, its figures beside ours."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        batch = row["batch"]
        known = [one for one in TABLE_II if _is(one, row)]
        times = [text(_ms(row, arm), "{:,.2f}") for arm in ("chgnet", "ours_ase", "ours")]
        counts = [f"{n:,}" for n in (batch["atoms"], batch["edges"] // 2, batch["angles"])]
        both = [text(row.get(name), "{:.1f}") for name in ("ratio_ase", "ratio")]
        lines.append((row["crystal"], *counts, *times, *both, *_paper(known[0] if known else None)))
    for one in TABLE_II:
        if not any(_is(one, row) for row in rows):
            counts = [f"{n:,}" for n in (one.n_atoms, one.n_bonds, one.n_angles)]
            lines.append((f"{one.crystal} (absent)", *counts, *["—"] * 5, *_paper(one)))
    where = rows[0]["environment"]
    title = f"A step of molecular dynamics; {where['device']}, {where['threads']} threads; the paper's: A100"
    return [Table(title, HEADER, lines)]


def _is(one: Published, row: Row) -> bool:
    same = Formula(one.crystal).count() == Formula(row["crystal"]).count()
    return same and one.n_atoms == row["batch"]["atoms"]


def _ms(row: Row, arm: str) -> float | None:
    return row[arm]["wall_seconds"][1] / row["steps"] * 1e3 if arm in row else None


def _paper(one: Published | None) -> tuple[str, ...]:
    if one is None:
        return ("—",) * 3
    return f"{1e3 * one.chgnet:.1f}", f"{1e3 * one.fastchgnet:.1f}", f"{one.speedup:.2f}"
