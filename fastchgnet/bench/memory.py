"""Peak memory, each arm in a fresh process.

On a GPU the peak of torch's allocator, model and graphs included. On a CPU the highest resident size
during one run less that right before it: the process has then loaded and once used its libraries on the
smallest frame, holds model, frames and, for training, graphs, and has given freed memory back.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from fastchgnet.bench import ours, reference
from fastchgnet.bench.frames import Workload
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Options, Session
from fastchgnet.bench.timing import Work
from fastchgnet.errors import InputError

_PROC = Path("/proc/self")
NOTE = (
    "Each arm in its own process. CPU: highest resident size during one step less that right before it, "
    "graphs and model held by both; GPU: peak of torch's allocator."
)


def row(session: Session, workload: Workload, readout: str) -> Row:
    """Measure the peak of a training step."""
    found = session.row("memory", workload, readout, NOTE) | {"ours": {}}
    if session.options.chgnet:
        found["chgnet"] = {}
    return added(found, session.options, {})


def added(row: Row, options: Options, batch_sizes: dict[str, int]) -> Row:
    """Add to both arms of a row their peak, MB, where it is asked for and can be measured."""
    if options.memory and (row["environment"]["device_type"] == "cuda" or (_PROC / "clear_refs").exists()):
        task = "infer" if row["command"] == "infer" else "train"
        asked = {"task": task, "readout": row["readout"], "n_frames": row["batch"]["systems"]}
        _give_back()  # gigabytes that the other process may need
        for arm in row.keys() & {"ours", "chgnet"}:
            row[arm]["peak_memory_mb"] = _in_fresh_process(
                {**asked, "arm": arm, "batch_size": batch_sizes.get(arm)}, options
            )
        peaks = [row.get(arm, {}).get("peak_memory_mb") for arm in ("ours", "chgnet")]
        if all(peaks):
            row["memory_ratio"] = peaks[1] / peaks[0]
    return row


def _in_fresh_process(asked: dict[str, Any], options: Options) -> float | None:
    """Measure one arm; None where it does not fit."""
    described = dataclasses.asdict(options) | {"frames": str(options.frames)}
    command = [sys.executable, "-m", __name__, json.dumps({"asked": asked, "options": described})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # -9: Linux has ended it for want of memory
    if done.returncode == -9 or "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()[-1:]), "no message")
        raise InputError(f"memory of {asked['arm']}: process ended with {done.returncode} ({reason})")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(asked: dict[str, Any], options: Options) -> float:
    """Run the work of one arm in this process and return the peak, MB."""
    session = Session(options)
    workload = session.pool.workload(asked["n_frames"])
    smallest = min(workload.frames, key=lambda frame: len(frame.numbers))
    with _work(asked, dataclasses.replace(workload, frames=[smallest]), session) as warm_up:
        warm_up()
    with _work(asked, workload, session) as work:
        return (_peak_on_gpu if session.device.type == "cuda" else _peak_on_cpu)(work) / 1e6


@contextlib.contextmanager
def _work(asked: dict[str, Any], workload: Workload, session: Session) -> Iterator[Work]:
    """Set up what one arm does."""
    size = asked["batch_size"]
    if asked["task"] == "train":
        if asked["arm"] == "ours":
            with ours.training(workload, asked["readout"], session.device) as training:
                yield training.step
        else:
            yield reference.training(workload, session.device)
    elif asked["arm"] == "ours":
        model = ours.Inference(asked["readout"], session.device)
        yield partial(model.predict, ours.atoms_of(workload), size)
    else:
        published = reference.Inference(session.device)
        yield partial(published.predict, reference.structures_of(workload), size)


def _peak_on_gpu(work: Work) -> int:
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):  # as it comes, recorded, replayed
        work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _give_back() -> None:
    """Return freed memory to the system; glibc keeps it, and it would count as used before the work."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak_on_cpu(work: Work) -> int:
    _give_back()
    before = _status("VmRSS")
    (_PROC / "clear_refs").write_text("5")  # the highest resident size so far is the present one
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Read a size of this process, bytes."""
    lines = (_PROC / "status").read_text().splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(size)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(_measure(given["asked"], TypeAdapter(Options).validate_python(given["options"]))))
