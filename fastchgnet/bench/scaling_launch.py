"""Start the processes that `bench scaling` times, and end them in any case."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastchgnet.bench import timing
from fastchgnet.bench.session import NOISE, Session
from fastchgnet.bench.steps import write_frames
from fastchgnet.data.frame import Frame
from fastchgnet.errors import InputError

LIMIT = 540.0
"""Seconds that a number of processes may take for all their steps."""

_WORKER = "fastchgnet.bench.scaling_worker"


def n_devices(device: torch.device) -> int:
    """Count how many processes have a device of their own here: a core or a GPU each."""
    if device.type == "cuda":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(session: Session, n_ranks: int, frames: Sequence[Frame]) -> dict[str, Any]:
    """Time steps of several processes on a global batch.

    Raises:
        InputError: a process failed, or they did not end in time.
    """
    options = session.options
    session.say(f"scaling: {len(frames)} frames in {_processes(n_ranks)} on {session.device.type}")
    asked = {"readout": options.readouts[0], "device": session.device.type, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_frames(frames, folder)
        (folder / "asked.json").write_text(json.dumps({**asked, "limit": LIMIT + 60}))
        others = _watched(lambda: _run(n_ranks, folder))
        found = json.loads((folder / "found.json").read_text())
    wall = [float(p) for p in np.percentile(found[0]["wall"], (20, 50, 80))]
    if others is not None and others > NOISE:
        session.say(f"warning: other processes used {others:.2f} cores; do not trust these times")
    point: dict[str, Any] = {
        "ranks": n_ranks,
        "frames": len(frames),
        "seconds": wall[1],
        "wall_seconds": wall,
    }
    if session.device.type == "cpu":  # while it waits for others, a process uses its core little
        point["cpu_seconds"] = [float(np.median(of_rank["cpu"])) for of_rank in found]
    return point | {"other_work_cores": others}


def _watched(run: Callable[[], None]) -> float | None:
    """Run processes and return how many cores those of others used meanwhile, if the system tells."""
    start, before = time.monotonic(), os.times()
    with timing.OtherWork() as others:
        run()
    after = os.times()
    own = after.children_user + after.children_system - before.children_user - before.children_system
    return None if others.cores is None else max(0.0, others.cores - own / (time.monotonic() - start))


def _run(n_ranks: int, folder: Path) -> None:
    """Run the workers to their end, or to their time limit."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    command = [*torchrun, "-m", _WORKER, str(folder)]
    # one thread for each process, the only one too, so that times compare
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            status = launcher.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise InputError(f"{_processes(n_ranks)} did not end within {LIMIT:g} s") from None
        finally:
            _end(launcher)
    if status != 0 or not (folder / "found.json").exists():
        raise InputError(f"{_processes(n_ranks)} failed: {_reason(folder, status)}")


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _end(launcher: subprocess.Popen) -> None:
    """End the launcher, which ends its workers."""
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(60)
        except subprocess.TimeoutExpired:
            launcher.kill()  # workers have a time limit of their own
            launcher.wait()


def _reason(folder: Path, status: int) -> str:
    """Say what the first process that failed said."""
    failed = sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime)
    if failed:
        return failed[0].read_text()
    log = (folder / "log").read_text(errors="replace")
    clue = re.search(r"^\w*Error: .+|Signal .+ received by PID \d+", log, re.MULTILINE)
    return clue[0].strip() if clue else f"status {status}, and nobody said why"
