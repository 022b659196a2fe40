"""How many crystals fit into a batch: what an evaluation needs, and what is free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastchgnet.potential import Potential

BYTES = {torch.float32: (33_000, 2_900, 2_300), torch.float64: (102_000, 4_700, 4_600)}
"""Memory that an evaluation with derivatives takes for each atom, edge and angle, as measured on CPUs.

From the peaks of single processes; the sum is right within a fifth. docs/relaxation.md says more.
"""

CPU_BYTES = 128 * 2**20
"""Where larger batches no longer gain on a CPU, and begin to lose what its caches hold."""

GROWTH = 1.5
"""How much larger graphs may become while crystals are being relaxed."""

SHARE = 0.5
"""Of the free memory; the rest is for others, what allocators lose, and the search for neighbours."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a batch holds at most; a crystal that is too large for it runs alone."""

    n_bytes: float
    n_systems: int | None = None

    @classmethod
    def of(cls, potential: Potential, batch_size: int | None = None) -> Room:
        """Look at what is free now, for at most `batch_size` crystals."""
        free = SHARE * free_memory(potential.device) / GROWTH
        if potential.device.type == "cpu" and batch_size is None:
            free = min(free, CPU_BYTES)
        return cls(free, batch_size)

    def fits(self, n_systems: int, n_bytes: float) -> bool:
        """Tell whether a batch of this size is not too large."""
        enough = self.n_systems is None or n_systems <= self.n_systems
        return n_systems <= 1 or (enough and n_bytes <= self.n_bytes)


def needed_bytes(sizes: NDArray[np.int64], dtype: torch.dtype) -> NDArray[np.float64]:
    """Estimate the memory of crystals [S] from their atoms, edges, short bonds and angles [S, 4]."""
    return sizes[:, [0, 1, 3]].astype(np.float64) @ np.array(BYTES[dtype], dtype=np.float64)


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free on a device now: on a host, those a process can get without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what PyTorch has taken from the driver and does not use
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_free_on_host(), _free_in_group())


def _free_on_host() -> float:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4.0 * 2**30


def _free_in_group() -> float:
    """Return what the limit of this process's container or job leaves, infinity where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = float((group / "memory.max").read_text())
        used = float((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit: the file is absent or says max
        return float("inf")
    return max(limit - used, 0.0)
