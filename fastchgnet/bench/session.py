"""What all sub-commands share: options, the device, the frames, and how a row is put together."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastchgnet.bench import roofline, timing
from fastchgnet.bench.frames import Composition, Pool, Workload
from fastchgnet.bench.reference import require_chgnet
from fastchgnet.bench.rows import Row, environment
from fastchgnet.device import pick_device

NOISE = 0.1
"""Cores that other processes may use; at their barriers, threads of ours spin while they wait for a core."""


TRAINING = ("train", "kernels", "memory", "data")
"""Commands that take the trainer's steps, whose matrix products are in tf32 on a GPU; chgnet's are not."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a user asked for."""

    frames: Path
    batches: tuple[int, ...] = ()  # empty for those of the run
    readouts: tuple[str, ...] = ("conservative", "direct")
    device: str = "cpu"
    threads: int | None = None  # None leaves torch's choice
    rounds: int = 5
    seed: int = 0
    label: str = ""
    chgnet: bool = True
    memory: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Describe them as JSON takes it; of the path only the name, since rows are published."""
        return {**dataclasses.asdict(self), "frames": self.frames.name}


class Session:
    """A run of the harness in this process."""

    def __init__(self, options: Options, say: Callable[[str], None] = lambda line: None) -> None:
        """Read the frames and set threads and device; `say` is told what comes next.

        Raises:
            InputError: no such device, no readable frames, or no chgnet although it is asked for.
        """
        self.device = pick_device(options.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # as training does
        if options.chgnet:
            require_chgnet()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.options, self.say = options, say
        self.pool = Pool(options.frames, options.seed)

    def with_options(self, **changes: Any) -> Session:
        """Return the same session with other options; frames and device stay."""
        other = copy.copy(self)
        other.options = dataclasses.replace(self.options, **changes)
        return other

    def cases(self) -> Iterator[tuple[Workload, str]]:
        """Yield the batches and readouts that are asked for."""
        for readout in self.options.readouts:
            for size in self.options.batches:
                yield self.pool.workload(size), readout

    def row(self, command: str, workload: Workload, readout: str | None, note: str) -> Row:
        """Begin a row: what is run, on what, where."""
        what = f"{command} {readout}" if readout else command
        self.say(f"{what}: {workload.composition.systems} systems on {self.device}")
        return {
            "command": command,
            "readout": readout,
            "label": self.options.label,
            "note": note,
            "options": self.options.as_dict(),
            "precision": "tf32" if self.device.type == "cuda" and command in TRAINING else "fp32",
            "environment": environment(self.device),
            "synthetic_labels": {"of": workload.synthetic, "seed": self.options.seed},
            "batch": workload.composition._asdict(),
        }

    def time(self, row: Row, arms: Mapping[str, timing.Work], warm: bool = True) -> dict[str, timing.Samples]:
        """Time arms against each other, as `timing.measure`, and describe them in the row, by name."""
        with timing.OtherWork() as others:
            ceiling = roofline.measure_ceiling(self.device)
            samples = timing.measure(arms, self.options.rounds, self.device, warm)
        row["other_work_cores"] = others.cores
        if others.cores is not None and others.cores > NOISE:
            self.say(f"warning: other processes used {others.cores:.2f} cores; do not trust these times")
        for name, taken in samples.items():
            row[name] = {
                **taken.percentiles(),
                "rounds": len(taken.wall),
                "calls_per_round": taken.calls,
                "systems_per_second": row["batch"]["systems"] / float(np.median(taken.wall)),
            }
        if "chgnet" in samples:
            row |= timing.ratios(samples["ours"], samples["chgnet"])
        case = (row["command"], row["readout"])
        if case in roofline.PASSES:
            n_operations = roofline.operations(*case, Composition(**row["batch"]))
            row |= {"operations": n_operations, "ceiling_per_second": ceiling}
            rate = n_operations / float(np.median(samples["ours"].wall))
            row["ours"]["roofline_fraction"] = rate / ceiling
        medians = (f"{name} {1e3 * np.median(taken.wall):,.2f} ms" for name, taken in samples.items())
        self.say(f"  {', '.join(medians)}")
        return samples
