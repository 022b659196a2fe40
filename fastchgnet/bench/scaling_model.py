"""A model of data-parallel training: how long a step takes on many GPUs, and where the time is lost.

    t(p) = largest share of the batch + what a step takes in any case + all-reduce + planning that shows

Shares are those of the sampler, at the cost of their frames on one device. The all-reduce of n bytes among p
processes, over links of latency alpha and bandwidth beta, takes the shorter of

    ring  2 (p - 1) (alpha + n / (p beta))
    tree  2 ceil(log2 p) (alpha + n / beta)

(Thakur, Rabenseifner and Gropp, Int. J. High Perform. Comput. Appl. 19, 49 (2005), in Hockney's model of a
message). On several nodes every step of the ring waits for the links between nodes; the tree is one within
nodes, followed by one between them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastchgnet.train.sampler import DEFAULT_COST, Cost, Strategy, share

Mode = Literal["strong", "weak"]
"""The same global batch on more GPUs, or as many frames more as GPUs."""

REFERENCES = (1, 4)
"""Numbers of GPUs that efficiencies are relative to; the paper's are relative to 4."""


@dataclass(frozen=True, slots=True)
class Network:
    """Links between GPUs: seconds before a message moves, and bytes per second that it then moves at.

    The defaults are what messages of about a megabyte see, not what links reach at best. Latencies are near
    those of a hop in the tables by which NCCL chooses its algorithm (src/graph/tuning.cc: 3.4 us over NVLink,
    9.6 us between nodes), which also cap trees within a node of A100 at about 100 GB/s. 25 GB/s is a port of
    200 Gb/s for each GPU. Two GPUs of two nodes then take 104 us for 2 MiB; issue 232 of NVIDIA/nccl-tests
    reports 93 and 113 us. Four GPUs in a node are the paper's.
    """

    gpus_per_node: int = 4
    latency: float = 10e-6
    bandwidth: float = 25e9
    inner_latency: float = 3.4e-6
    inner_bandwidth: float = 100e9

    def ring(self, n_bytes: float, n_ranks: int) -> float:
        """Return the seconds of an all-reduce around a ring."""
        latency, bandwidth = self._slowest(n_ranks)
        return 2 * (n_ranks - 1) * (latency + n_bytes / (n_ranks * bandwidth))

    def tree(self, n_bytes: float, n_ranks: int) -> float:
        """Return the seconds of an all-reduce up and down a tree."""
        n_nodes = math.ceil(n_ranks / self.gpus_per_node)
        within = math.ceil(math.log2(min(n_ranks, self.gpus_per_node)))
        between = math.ceil(math.log2(n_nodes))
        inner = self.inner_latency + n_bytes / self.inner_bandwidth
        return 2 * (within * inner + between * (self.latency + n_bytes / self.bandwidth))

    def allreduce(self, n_bytes: float, n_ranks: int) -> float:
        """Return the seconds of the faster of the two."""
        return min(self.ring(n_bytes, n_ranks), self.tree(n_bytes, n_ranks))

    def _slowest(self, n_ranks: int) -> tuple[float, float]:
        inside = n_ranks <= self.gpus_per_node
        return (self.inner_latency, self.inner_bandwidth) if inside else (self.latency, self.bandwidth)


class Gradient(NamedTuple):
    """What is added up over the GPUs in every step, in messages that follow each other."""

    n_bytes: int
    n_messages: int

    def seconds(self, n_ranks: int, network: Network) -> float:
        """Return how long all messages take one after the other."""
        return self.n_messages * network.allreduce(self.n_bytes / self.n_messages, n_ranks)


class Spent(NamedTuple):
    """Seconds of a step by what they are spent on, means over batches."""

    work: float  # mean over the ranks
    waiting: float  # for the rank with the largest share
    fixed: float  # what a step takes in any case
    allreduce: float  # nothing of it hidden behind the backward pass
    planning: float  # by which dividing a batch exceeds all the above, during which it happens

    @property
    def seconds(self) -> float:
        """Return the length of the step."""
        return sum(self)


def assumed_cost(sizes: NDArray[np.int64], frame: float, fixed: float) -> Cost:
    """Return a cost by which a mean frame takes `frame` and a step `fixed` on top, both in seconds.

    Frames differ as the operations of the network do.
    """
    scale = frame / float(DEFAULT_COST.of(sizes).mean())
    return Cost(*(scale * one for one in DEFAULT_COST))._replace(step=fixed)


def divide(
    sizes: NDArray[np.int64],
    batches: Iterable[NDArray[np.int64]],
    n_ranks: int,
    strategy: Strategy,
    cost: Cost,
) -> tuple[NDArray[np.float64], float]:
    """Divide global batches as training does, which knows no measured cost.

    Returns:
        The cost of each share, [b, n_ranks], without what a step takes in any case; and the median of the
        seconds that dividing a batch took.
    """
    loads, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        shares = share(sizes[batch], n_ranks, strategy)
        seconds.append(time.perf_counter() - start)
        of_frames = cost.of(sizes[batch])
        loads.append([of_frames[one].sum() for one in shares])
    return np.array(loads), float(np.median(seconds)) if n_ranks > 1 else 0.0


def spend(loads: NDArray[np.float64], fixed: float, allreduce: float, planning: float) -> Spent:
    """Account for a step with these shares, [b, n_ranks], from the seconds of everything else."""
    work, largest = float(loads.mean()), float(loads.max(1).mean())
    before = largest + fixed + allreduce
    return Spent(work, largest - work, fixed, allreduce, max(0.0, planning - before))


class Model(NamedTuple):
    """All that decides the length of a step, but for its shares."""

    cost: Cost  # seconds
    gradient: Gradient
    network: Network

    def point(self, loads: NDArray[np.float64], planning: float) -> dict[str, Any]:
        """Describe a step: its length if nothing is hidden, on what, and if all messages but the last are.

        A message is sent while the backward pass goes on with other layers, but for the last; how much of the
        others shows depends on both, so that the truth lies between.

        Args:
            loads: cost of each share, [b, n_ranks], as from `divide`.
            planning: seconds in which a batch is divided.
        """
        n_ranks = loads.shape[1]
        allreduce = self.gradient.seconds(n_ranks, self.network) if n_ranks > 1 else 0.0
        spent = spend(loads, self.cost.step, allreduce, planning)
        hidden = spend(loads, self.cost.step, allreduce / self.gradient.n_messages, planning)
        return {
            "ranks": n_ranks,
            "seconds": spent.seconds,
            "seconds_hidden": hidden.seconds,
            "spent": spent._asdict(),
        }


class Case(NamedTuple):
    """A kind of scaling, and the frames of a global batch (strong) or of each GPU (weak)."""

    mode: Mode
    size: int

    def frames(self, n_ranks: int) -> int:
        """Return the frames of a global batch."""
        return self.size if self.mode == "strong" else self.size * n_ranks


def add_efficiencies(points: Sequence[dict[str, Any]]) -> None:
    """Give each point its frames per second and GPU relative to those with 1 and with 4 GPUs, where known."""
    by_ranks = {one["ranks"]: one for one in points}
    for reference in sorted(set(REFERENCES) & set(by_ranks)):
        base = by_ranks[reference]
        for one in points:
            per_frame = base["ranks"] * one["frames"] / (base["frames"] * one["ranks"])
            for suffix in ("", "_hidden") if "seconds_hidden" in one else ("",):
                times = base[f"seconds{suffix}"], one[f"seconds{suffix}"]
                one[f"efficiency_{reference}{suffix}"] = per_frame * times[0] / times[1]
