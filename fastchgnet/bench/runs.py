"""Which run each sub-command starts, with which batch sizes unless others are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from fastchgnet.bench import correctness, data, graph, infer, kernels, memory, rows, train
from fastchgnet.bench.frames import Workload
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Options, Session
from fastchgnet.errors import InputError, first_line

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

ALL = ("train", "infer", "graph", "kernels", "data")
"""What `all` runs, in this order; peaks of memory come with `train` and `infer`."""

LARGE = (256, 512)
"""Batch sizes at which `all` times our training alone on a GPU: chgnet does not fit."""


def run(name: str, options: Options, out: Path | None, say: Callable[[str], None]) -> list[Row]:
    """Run a sub-command, or all of them after a check of the results; append rows to `out` as they come.

    Of all, one that fails does not keep the others from running.

    Raises:
        InputError: no chgnet, unreadable frames, a batch that does not fit, or wrong results on this device;
            or, behind all rows, which of all sub-commands have failed.
    """
    rows.check_out(out)
    session = Session(options, say)
    done: list[Row] = []

    def add(found: Iterable[Row]) -> None:
        for row in found:
            done.append(row)
            if out is not None:
                rows.append(out, [row])

    if name != "all":
        add(_rows(name, session))
        return done
    add(correctness.check(session))
    parts = {each: _rows(each, session) for each in ALL}
    if session.device.type == "cuda" and not options.batches:
        large = _rows("train", session.with_options(batches=LARGE, chgnet=False))
        parts["train"] = itertools.chain(parts["train"], large)
    failed = []
    for each, found in parts.items():
        try:
            add(found)
        except (InputError, RuntimeError) as error:
            say(f"warning: {each} failed, the others go on: {first_line(error)}")
            failed.append(each)
    if failed:
        raise InputError(f"{session.device}: {', '.join(failed)} failed, the others are done; see above")
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
