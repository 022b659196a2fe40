"""What a training step executes, and whether that depends on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastchgnet.bench import ours, reference
from fastchgnet.bench.frames import Workload
from fastchgnet.bench.profile import profiled
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Session
from fastchgnet.bench.timing import Work, warm_up
from fastchgnet.report import Table

N_TOP = 20
COUNTED = "kernels counted"
"""Command of the rows of benchmarks/kernel_counts.py."""
NOTE = (
    "One warm training step under torch's profiler, and one on the first half of the frames. `ops` are "
    "operators called from outside any other one, views included; a GPU has `kernels`, `launches` from the "
    "host and `waits` of the host too."
)


def row(session: Session, workload: Workload, readout: str) -> Row:
    """Profile training steps at two batch sizes."""
    found = session.row("kernels", workload, readout, NOTE)
    for batch in (workload, session.pool.workload(max(1, len(workload.frames) // 2))):
        with ours.training(batch, readout, session.device) as training:
            _profile(found, "ours", training.step, batch, session)
        if session.options.chgnet:
            _profile(found, "chgnet", reference.training(batch, session.device), batch, session)
    return found


def _profile(found: Row, arm: str, step: Work, batch: Workload, session: Session) -> None:
    warm_up(step, session.device)
    whole = arm not in found
    profile = profiled(step, session.device, N_TOP if whole else 0)
    described: dict[str, Any] = found.setdefault(arm, {})
    if whole:
        described |= {"counts": profile.counts, "top": profile.top}
    else:
        described["counts_of_half"] = profile.counts
        described["depends_on_batch"] = profile.counts != described["counts"]


def counted(rows: Sequence[Row]) -> list[Table]:
    """Show what was counted for each readout, by part of the step; and how much of it is our own kernels."""
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    columns = [["part of the step", *parts, "all"]]
    for row in rows:
        found = [row["parts"].get(part, {}) for part in parts]
        ours = [{name: n for name, n in names.items() if "::" not in name} for names in found]
        for title, counts in ((row["readout"], found), ("our kernels", ours)):
            totals = [sum(names.values()) for names in counts]
            columns.append([title, *(f"{total:,}" for total in (*totals, sum(totals)))])
    header, *lines = zip(*columns, strict=True)
    return [Table(rows[0]["label"], header, lines)]
