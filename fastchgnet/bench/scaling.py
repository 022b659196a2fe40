"""Strong and weak scaling: measured with a process for each device, and beyond them simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fastchgnet.bench import scaling_launch
from fastchgnet.bench.ours import untrained
from fastchgnet.bench.rows import Row, environment
from fastchgnet.bench.scaling_model import (
    REFERENCES,
    Case,
    Gradient,
    Mode,
    Model,
    Network,
    add_efficiencies,
    assumed_cost,
    divide,
)
from fastchgnet.bench.session import Session
from fastchgnet.bench.steps import Fit, file_sizes, fit_steps, global_batches, sizes_of, trainer_on
from fastchgnet.config import ModelConfig
from fastchgnet.train.gradient import N_MESSAGES
from fastchgnet.train.sampler import Strategy, pack

RANKS = (1, 2, 4, 8, 16, 32)
"""Numbers of processes unless others are asked for."""

STRONG, WEAK = (2048,), (512,)
"""Frames of a global batch, and of each GPU, unless others are asked for: the paper's."""

TIMED = {"cpu": 32, "cuda": 128}
"""Frames of a process in the steps that are timed, unless another number is asked for."""

N_FITTED = 8
"""Shares of so many frames to whose steps the cost is fitted."""

N_BATCHES = 50
"""Global batches that are divided in each case."""

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

NOTES = {
    "measured": (
        "Measured: medians of steps of that many processes on one machine, a device each (one thread on a "
        "CPU), on one global batch that lpt divides; in weak scaling the batches are one, two, ... of even "
        "shares of the largest. `modelled_seconds` is what the cost in `step`, fitted to one process, gives "
        "for the largest share, without an all-reduce; `cpu_seconds` are those of each process."
    ),
    "simulated": (
        "Simulated: these GPUs were not used. A step takes the largest share at the cost in `step`, which "
        "is measured on one device or assumed, what any step takes, and an all-reduce by the latencies and "
        "bandwidths in `network`; `seconds` hides nothing of it behind the backward pass, `seconds_hidden` "
        "all but the last message. Planning is timed on this machine. Means over global batches from epochs "
        "in random order."
    ),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user asked for, beside the options of a session."""

    ranks: tuple[int, ...] = RANKS
    strong: tuple[int, ...] = STRONG
    weak: tuple[int, ...] = WEAK
    timed: int | None = None  # frames of a process in timed steps; None for those of TIMED
    assumed: tuple[float, float] | None = None  # seconds of a frame, and of any step; None to measure
    network: Network = dataclasses.field(default_factory=Network)

    def cases(self) -> list[Case]:
        """List the cases to simulate."""
        return [*(Case("strong", size) for size in self.strong), *(Case("weak", size) for size in self.weak)]


def run(session: Session, asked: Asked) -> list[Row]:
    """Time steps, and scaling where there are devices; simulate beyond; return a row for each case.

    Raises:
        InputError: too few frames, or a process that failed.
    """
    with _one_thread(session.device):
        options = session.options
        base = {
            "command": "scaling",
            "readout": options.readouts[0],
            "label": options.label,
            "options": options.as_dict() | dataclasses.asdict(asked),
            "environment": environment(session.device),
        }
        sizes = file_sizes(options.frames)
        measured: list[Row] = []
        if asked.assumed is not None:
            found, cost = {"of": "assumption"}, assumed_cost(sizes, *asked.assumed)
        else:
            fit, measured = _measure(session, asked)
            found, cost = {"of": "measurement", **fit.as_dict()}, fit.cost
    step = found | {"cost": cost._asdict(), "mean_frame_seconds": float(cost.of(sizes).mean())}
    rows = [{**base, **one, "step": step} for one in measured]
    model = Model(cost, Gradient(_gradient_bytes(options.readouts[0]), N_MESSAGES), asked.network)
    for case in asked.cases():
        session.say(f"scaling: simulating {case.mode} scaling, {case.size} frames")
        row = {**base, "kind": "simulated", "note": NOTES["simulated"], **case._asdict(), "step": step}
        row |= {"network": dataclasses.asdict(model.network), "gradient": model.gradient._asdict()}
        rows.append({**row, "strategies": simulate(sizes, case, asked.ranks, model, options.seed)})
    return rows


def simulate(
    sizes: NDArray[np.int64], case: Case, ranks: Sequence[int], model: Model, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Return what a step takes with each number of ranks, by strategy; those of reference are included."""
    points: dict[str, list[dict[str, Any]]] = {strategy: [] for strategy in STRATEGIES}
    for n_ranks in sorted({*ranks, *REFERENCES}):
        n_frames = case.frames(n_ranks)
        batches = list(global_batches(len(sizes), n_frames, seed, N_BATCHES))
        for strategy in STRATEGIES:
            loads, planning = divide(sizes, batches, n_ranks, strategy, model.cost)
            found = {"frames": n_frames, **model.point(loads, planning), "planning_seconds": planning}
            points[strategy].append(found)
    for of_strategy in points.values():
        add_efficiencies(of_strategy)
    return points


def _measure(session: Session, asked: Asked) -> tuple[Fit, list[Row]]:
    """Time steps of as many processes as there are devices, and fit the cost to those of this process."""
    options = session.options
    timed = asked.timed or TIMED[session.device.type]
    ranks = [n for n in sorted({1, *asked.ranks}) if n <= scaling_launch.n_devices(session.device)]
    n_fitted = max(N_FITTED, ranks[-1])
    frames = session.pool.workload(n_fitted * timed).frames
    sizes = sizes_of(frames)
    batches = _batches(sizes[: timed * ranks[-1]], ranks)
    # before this process takes memory of a GPU that it shares with one of them
    timings: dict[tuple[int, int], dict[str, Any]] = {}
    for (_, n_ranks), batch in batches.items():
        if (n_ranks, len(batch)) not in timings:
            chosen = [frames[place] for place in batch]
            timings[n_ranks, len(batch)] = scaling_launch.measure(session, n_ranks, chosen)
    session.say(f"scaling: fitting the cost to {2 * n_fitted} steps of {options.readouts[0]} training")
    with trainer_on(session, n_fitted * timed, options.readouts[0]) as trainer:
        fit = fit_steps(trainer, n_fitted, options.rounds)
    rows: list[Row] = []
    for case in (Case("strong", timed * ranks[-1]), Case("weak", timed)):
        points = []
        for batch, n_ranks in ((batches[case.mode, n], n) for n in ranks):
            loads, _ = divide(sizes, [batch], n_ranks, "lpt", fit.cost)
            modelled = {"modelled_seconds": float(loads.max()) + fit.cost.step}
            points.append(timings[n_ranks, len(batch)] | modelled)
        add_efficiencies(points)
        described = {"kind": "measured", "note": NOTES["measured"], **case._asdict(), "strategy": "lpt"}
        rows.append({**described, "points": points})
    return fit, rows


def _batches(sizes: NDArray[np.int64], ranks: Sequence[int]) -> dict[tuple[Mode, int], NDArray[np.int64]]:
    """Choose a batch for each kind of scaling and number of ranks: all frames, or even shares of them."""
    shares = pack(sizes, ranks[-1])
    strong: dict[tuple[Mode, int], NDArray[np.int64]] = {("strong", n): np.arange(len(sizes)) for n in ranks}
    return strong | {("weak", n): np.sort(np.concatenate(shares[:n])) for n in ranks}


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Give this process, on a CPU, as many threads as each of several has."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _gradient_bytes(readout: str) -> int:
    """Count the bytes of the gradient of the default model."""
    potential = untrained(ModelConfig.model_validate({"readout": readout}))
    return sum(p.numel() * p.element_size() for p in potential.parameters())
