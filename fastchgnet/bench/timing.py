"""Paired timing: every round runs each arm once, so that whatever disturbs one disturbs the others."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Work = Callable[[], object]

SHORTEST = 0.1
"""Seconds that one sample takes at least; shorter work is repeated within it."""


class Samples(NamedTuple):
    """Seconds of one call, one entry per round."""

    wall: NDArray[np.float64]
    cpu: NDArray[np.float64]  # of all threads of the process
    calls: int  # in each sample

    def percentiles(self) -> dict[str, list[float]]:
        """Give the 20th, 50th and 80th percentile of both times."""
        return {
            f"{name}_seconds": [float(p) for p in np.percentile(values, (20, 50, 80))]
            for name, values in (("wall", self.wall), ("cpu", self.cpu))
        }


def measure(
    arms: Mapping[str, Work], n_rounds: int, device: torch.device, warm: bool = True
) -> dict[str, Samples]:
    """Warm every arm up, then run them in turn for a number of rounds, every other round backwards.

    Arms that are long are best not warmed up here, and are called once in every round.
    """
    calls = {name: warm_up(work, device) if warm else 1 for name, work in arms.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for round_number in range(n_rounds):
        names = list(arms) if round_number % 2 == 0 else list(arms)[::-1]
        for name in names:
            seconds[name].append(sample(arms[name], calls[name], device))
    both = {name: np.array(pairs).T for name, pairs in seconds.items()}
    return {name: Samples(wall, cpu, calls[name]) for name, (wall, cpu) in both.items()}


def sample(work: Work, n_calls: int, device: torch.device) -> tuple[float, float]:
    """Return wall and CPU seconds of one call, on average over `n_calls` of them."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(n_calls):
        work()
    synchronize(device)
    return (time.perf_counter() - wall) / n_calls, (time.process_time() - cpu) / n_calls


def ratios(ours: Samples, theirs: Samples) -> dict[str, float]:
    """Return the medians over the rounds of theirs / ours, by wall and by CPU seconds."""
    return {
        "ratio": float(np.median(theirs.wall / ours.wall)),
        "ratio_cpu": float(np.median(theirs.cpu / ours.cpu)),
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(work: Work, device: torch.device) -> int:
    """Run the work a few times and return how many calls make a sample."""
    # A GPU compiles kernels and captures graphs first; a CPU only has to touch its memory once.
    for _ in range(3 if device.type == "cuda" else 1):
        work()
    wall, _ = sample(work, 1, device)
    return min(100, math.ceil(SHORTEST / wall))


class OtherWork:
    """How many cores other processes used within the block; None where the system does not tell."""

    cores: float | None = None

    def __enter__(self) -> OtherWork:
        """Start to watch."""
        self._before = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        after = self._now()
        if self._before and after:
            elapsed, busy, own = (b - a for a, b in zip(self._before, after, strict=True))
            self.cores = max(0.0, (busy - own) / elapsed)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Wall seconds, busy seconds of all cores and CPU seconds of this process."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        user, nice, system, _, _, irq, soft, steal = (float(f) / os.sysconf("SC_CLK_TCK") for f in fields)
        busy = user + nice + system + irq + soft + steal
        return time.monotonic(), busy, time.process_time()
