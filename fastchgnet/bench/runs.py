"""Which run each sub-command starts, with which batch sizes unless others are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from fastchgnet.bench import correctness, data, graph, infer, kernels, memory, rows, train
from fastchgnet.bench.frames import Workload
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Options, Session
from fastchgnet.errors import InputError

RowMaker = Callable[[Session, Workload, str], Row]

RUNS: dict[str, tuple[RowMaker, tuple[int, ...], tuple[int, ...]]] = {
    "train": (train.row, (16,), (16, 32, 64)),
    "infer": (infer.row, (64,), (64,)),
    "graph": (graph.row, (64,), (64,)),
    "kernels": (kernels.row, (16,), (64,)),
    "memory": (memory.row, (16,), (16, 64)),
    "data": (data.row, (16,), (64,)),
}
"""The run, its batch sizes on a CPU, and on a GPU."""

LARGE = (256, 512)
"""Batch sizes at which `all` times our training alone on a GPU: chgnet does not fit."""


def run(name: str, options: Options, out: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Run a sub-command, or all of them after a check of the results; append rows to `out` as they come.

    Raises:
        InputError: no chgnet, unreadable frames, a batch that does not fit, or wrong results on this device.
    """
    rows.check_out(out)
    session = Session(options, say)
    done: list[Row] = []

    def add(found: Iterable[Row]) -> None:
        for row in found:
            done.append(row)
            if out is not None:
                rows.append(out, [row])

    if name == "all":
        add(correctness.check(session))
    for each in RUNS if name == "all" else (name,):
        add(_rows(each, session))
    if name == "all" and session.device.type == "cuda" and not options.batches:
        add(_rows("train", session.with_options(batches=LARGE, chgnet=False)))
    return done


def _rows(name: str, session: Session) -> Iterator[Row]:
    make, on_cpu, on_gpu = RUNS[name]
    sizes = session.options.batches or (on_gpu if session.device.type == "cuda" else on_cpu)
    # Graphs are the same for every readout.
    readouts = session.options.readouts[: 1 if name == "graph" else None]
    session = session.with_options(batches=sizes, readouts=readouts)
    for workload, readout in session.cases():
        try:
            yield make(session, workload, readout)
        except torch.OutOfMemoryError:
            if not session.options.chgnet:
                raise InputError(f"{session.device}: {len(workload.frames)} systems do not fit") from None
            session.say("warning: out of memory with chgnet beside us; ours alone")
            yield make(session.with_options(chgnet=False), workload, readout)
