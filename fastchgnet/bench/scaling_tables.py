"""The rows of `bench scaling` as tables, with what the paper reports beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastchgnet.bench import rows as bench_rows
from fastchgnet.bench.rows import Row
from fastchgnet.bench.scaling_model import Mode
from fastchgnet.report import MISSING, Table, text

PAPER: dict[Mode, tuple[int, dict[int, float]]] = {
    "strong": (2048, {4: 1.0, 8: 1.65 / 2, 16: 3.18 / 4, 32: 5.26 / 8}),
    "weak": (512, {4: 1.0, 8: 0.915, 16: 0.846, 32: 0.746}),
}
"""Frames, and efficiencies relative to 4 GPUs, of FastCHGNet on A100: its Fig. 10 and the text about it.

For weak scaling the text lists three efficiencies for 4, 8, 16 and 32 GPUs: here those of the last three.
"""

SAMPLER = "lpt"
"""The strategy that training uses unless it is told otherwise."""


def tables(rows: Sequence[Row]) -> list[Table]:
    """Show what was measured, and what was simulated, to a reader."""
    measured = [row for row in rows if row["kind"] == "measured"]
    simulated = [row for row in rows if row["kind"] == "simulated"]
    found = [_measured(measured)] if measured else []
    return [*found, _simulated(simulated), _strategies(simulated)] if simulated else found


def markdown(rows: Sequence[Row]) -> str:
    """Show the rows as the documentation does: a table of those measured, and one of those simulated."""
    kinds = ([row for row in rows if row["kind"] == kind] for kind in ("measured", "simulated"))
    return "\n".join(bench_rows.markdown(of_kind, tables) for of_kind in kinds if of_kind)


def describe_step(row: Row) -> str:
    """Say what a step is taken to cost, and where that is from."""
    step, device = row["step"], row["environment"]
    where = "a CPU" if device["device_type"] == "cpu" else device["device"]
    of = "assumed" if step["of"] == "assumption" else f"measured on {where}"
    fixed = step["cost"]["step"]
    return f"{of}: {_time(step['mean_frame_seconds'])} a frame" + (f" + {_time(fixed)}" if fixed else "")


def _measured(rows: Sequence[Row]) -> Table:
    header = (
        "measured",
        "processes",
        "frames",
        "ms a step",
        "efficiency",
        "CPU ms",
        "modelled",
        "others, cores",
    )
    cells = [
        (
            f"{row['readout']}, {_case(row['mode'], row['size'])}",
            str(one["ranks"]),
            str(one["frames"]),
            f"{1e3 * one['seconds']:,.1f}",
            f"{one['efficiency_1']:.1%}",
            text(max(one["cpu_seconds"]) if "cpu_seconds" in one else None, "{:,.1f}", 1e3),
            f"{1e3 * one['modelled_seconds']:,.1f}",
            text(one["other_work_cores"], "{:.2f}"),
        )
        for row in rows
        for one in row["points"]
    ]
    device = rows[-1]["environment"]["device"]
    return Table(f"measured, a process for each device: {device}", header, cells)


def _simulated(rows: Sequence[Row]) -> Table:
    """Tabulate efficiencies relative to 4 GPUs, and on what the step with most GPUs is spent."""
    points = [{one["ranks"]: one for one in row["strategies"][SAMPLER]} for row in rows]
    ranks = sorted({n for of_row in points for n in of_row if n > 4})
    spent = ("waiting", "fixed", "allreduce", "planning")
    names = ("waiting", "fixed", "all-reduce", "planning")
    most = f"{max(map(max, points))}, "
    header = ("simulated", "step", *map(str, ranks), f"{most}last message", *(most + name for name in names))
    cells = [
        (
            f"{row['readout']}, {_case(row['mode'], row['size'])}",
            describe_step(row),
            *(_percent(of_row.get(n, {}).get("efficiency_4")) for n in ranks),
            _percent(of_row[max(of_row)]["efficiency_4_hidden"]),
            *(
                _percent(of_row[max(of_row)]["spent"][name] / of_row[max(of_row)]["seconds"])
                for name in spent
            ),
        )
        for row, of_row in zip(rows, points, strict=True)
    ]
    title = (
        f"simulated efficiency relative to 4 GPUs, divided by {SAMPLER}, nothing of the all-reduce hidden, "
        "or all but its last message; and shares of the step"
    )
    return Table(title, header, [*cells, *_published(ranks, len(header))])


def _published(ranks: Sequence[int], n_columns: int) -> Iterator[tuple[str, ...]]:
    for mode, (size, efficiency) in PAPER.items():
        cells = (f"published, {_case(mode, size)}", "A100", *(_percent(efficiency.get(n)) for n in ranks))
        yield cells + (MISSING,) * (n_columns - len(cells))


def _strategies(rows: Sequence[Row]) -> Table:
    names = list(rows[0]["strategies"])
    last = [{name: row["strategies"][name][-1] for name in names} for row in rows]
    cells = [
        (
            f"{row['readout']}, {_case(row['mode'], row['size'])}",
            str(of_row[SAMPLER]["ranks"]),
            *(_percent(of_row[name]["efficiency_4"]) for name in names),
        )
        for row, of_row in zip(rows, last, strict=True)
    ]
    return Table("simulated, by the way batches are divided", ("simulated", "GPUs", *names), cells)


def _case(mode: Mode, size: int) -> str:
    return f"{mode}, {size:,}" + (" each" if mode == "weak" else "")


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"
