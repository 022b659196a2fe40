"""How evenly the sampler divides global batches among ranks: by the cost, and by steps that were timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fastchgnet.bench.rows import Row, environment
from fastchgnet.bench.session import Session
from fastchgnet.bench.steps import file_sizes, fit_steps, global_batches, time_steps, trainer_on
from fastchgnet.report import Table
from fastchgnet.train.batches import Batches
from fastchgnet.train.rooms import Rooms
from fastchgnet.train.sampler import DEFAULT_COST, Cost, Strategy, share

RANKS, PER_RANK = (4, 8, 16, 32), (32, 64, 128)
"""Cases unless others are asked for."""

N_BATCHES = 50
"""Global batches that are divided in each case."""

N_EPOCHS = 8
"""Epochs whose batches are padded."""

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

NOTE = (
    "Simulated: global batches from epochs in random order, one after the other, are divided among ranks by "
    "each strategy. `cv` is the standard deviation over the mean of the ranks' loads, `efficiency` mean over "
    "largest load, means over the batches; `features` are atoms + directed edges + angles, `cost` is the sum "
    "that the row gives. `fillers`, once for each number of frames, are the padded rows without content, as "
    "shares, where one GPU trains on batches of so many frames. `measured`, where it was asked for, are "
    "training steps on the shares of one global batch, run in turn on one device: CPU seconds on a CPU, wall "
    "seconds on a GPU."
)


def run(session: Session, ranks: Sequence[int], measure: bool) -> list[Row]:
    """Simulate every case; with `measure`, fit the cost to timed steps and time the shares of the first case.

    Raises:
        InputError: fewer frames than the shares to be timed take.
    """
    options = session.options
    cases = [(n, size) for n in ranks for size in options.batches or PER_RANK]
    measured = measure_steps(session, *cases[0]) if measure else None
    cost = DEFAULT_COST if measured is None else Cost(**measured["cost"])
    sizes = file_sizes(options.frames)
    found: list[Row] = []
    for n_ranks, size in cases:
        session.say(f"balance: {n_ranks} ranks with {size} frames each")
        row: Row = {
            "command": "balance",
            "readout": options.readouts[0] if measure else None,
            "label": options.label,
            "note": NOTE,
            "options": options.as_dict(),
            "environment": environment(session.device),
            "case": {"ranks": n_ranks, "frames_per_rank": size, "global_batches": N_BATCHES},
            "cost": {**cost._asdict(), "of": "operations" if measured is None else "measured steps"},
            "strategies": simulate(sizes[:, :4], n_ranks, size, cost, options.seed),
        }
        if found:
            for plan in row["strategies"].values():
                del plan["features"]  # drawn for the first case only
        if n_ranks == cases[0][0]:
            row["fillers"] = fillers(sizes, size, options.seed)
        found.append(row)
    if measured is not None:
        found[0]["measured"] = measured
    return found


def simulate(
    sizes: NDArray[np.int64], n_ranks: int, per_rank: int, cost: Cost, seed: int
) -> dict[str, dict[str, Any]]:
    """Divide global batches by every strategy and describe how even the shares are."""
    plans: dict[str, list[dict[str, Any]]] = {strategy: [] for strategy in STRATEGIES}
    for batch in global_batches(len(sizes), n_ranks * per_rank, seed, N_BATCHES):
        loads = {"features": sizes[batch][:, [0, 1, 3]].sum(1), "cost": cost.of(sizes[batch])}
        for strategy in STRATEGIES:
            start = time.process_time()
            shares = share(sizes[batch], n_ranks, strategy, cost)
            plan: dict[str, Any] = {"milliseconds": 1e3 * (time.process_time() - start)}
            for name, load in loads.items():
                of_ranks = np.array([load[one].sum() for one in shares])
                plan |= {f"{key}_{name}": value for key, value in evenness(of_ranks).items()}
                plan |= {f"lowest_{name}": of_ranks.min(), f"highest_{name}": of_ranks.max()}
            plans[strategy].append(plan)
    return {strategy: _summary(done) for strategy, done in plans.items()}


def fillers(sizes: NDArray[np.int64], batch_size: int, seed: int) -> dict[str, dict[str, float]]:
    """Share of fillers among the rows of padded batches, by strategy and kind, and the number of shapes."""
    found: dict[str, dict[str, float]] = {}
    for strategy in STRATEGIES:
        batches = Batches(sizes, batch_size, seed, strategy)
        made = [batch for epoch in range(N_EPOCHS) for batch in batches.epoch(epoch)]
        rooms = Rooms(sizes, [[batch] for batch in made])
        capacities = [room.capacity for room in (rooms([batch]) for batch in made) if room is not None]
        atoms, edges, short, angles, _ = sum(sizes[batch].sum(0) for batch in made)
        real = {"atoms": atoms, "short_bonds": short, "long_bonds": edges // 2 - short, "angles": angles}
        found[strategy] = {
            name: 1 - int(count) / sum(getattr(capacity, name) for capacity in capacities)
            for name, count in real.items()
        } | {"shapes": len(rooms.rooms)}
    return found


def evenness(loads: NDArray) -> dict[str, float]:
    """Describe the loads of ranks."""
    return {"cv": float(loads.std() / loads.mean()), "efficiency": float(loads.mean() / loads.max())}


def _summary(plans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the batches, the median time of planning, and the range of features batch by batch."""
    names = [f"{key}_{load}" for load in ("features", "cost") for key in ("cv", "efficiency")]
    return {
        **{name: float(np.mean([plan[name] for plan in plans])) for name in names},
        "planning_milliseconds": float(np.median([plan["milliseconds"] for plan in plans])),
        "features": [[int(plan[f"{end}_features"]) for plan in plans] for end in ("lowest", "highest")],
    }


def measure_steps(session: Session, n_ranks: int, per_rank: int) -> Row:
    """Fit the cost to steps, divide a global batch by it, and time the step of every rank in turn.

    Raises:
        InputError: there are fewer frames than that.
    """
    readout, rounds = session.options.readouts[0], session.options.rounds
    with trainer_on(session, n_ranks * per_rank, readout) as trainer:
        session.say(f"balance: fitting the cost to {2 * n_ranks} steps of {readout} training")
        fit = fit_steps(trainer, n_ranks, rounds)
        sizes = trainer.train.store.sizes.astype(np.int64)
        shares = {strategy: share(sizes, n_ranks, strategy, fit.cost) for strategy in STRATEGIES}
        session.say(f"balance: {len(STRATEGIES) * n_ranks} steps of ranks in turn")
        times = time_steps(trainer, [one for each in shares.values() for one in each], rounds)
    by_strategy = dict(zip(STRATEGIES, times.reshape(len(STRATEGIES), n_ranks), strict=True))
    return {
        **fit.as_dict(),
        "strategies": {
            strategy: {
                **evenness(of_ranks),
                "seconds": of_ranks.tolist(),
                "efficiency_cost": evenness(
                    np.array([fit.cost.of(sizes[one]).sum() for one in shares[strategy]])
                )["efficiency"],
            }
            for strategy, of_ranks in by_strategy.items()
        },
    }


def tables(rows: Sequence[Row]) -> list[Table]:
    """Show the rows to a reader."""
    header = ("ranks x frames", "strategy", "CV features", "CV cost", "efficiency", "plan ms", "measured")
    cells = []
    for row in rows:
        case, measured = row["case"], row.get("measured", {}).get("strategies", {})
        for strategy, found in row["strategies"].items():
            cells.append(
                (
                    f"{case['ranks']} x {case['frames_per_rank']}",
                    strategy,
                    f"{found['cv_features']:.3f}",
                    f"{found['cv_cost']:.3f}",
                    f"{found['efficiency_cost']:.3f}",
                    f"{found['planning_milliseconds']:.2f}",
                    f"{measured[strategy]['efficiency']:.3f}" if measured else "—",
                )
            )
    kinds = ("atoms", "short_bonds", "long_bonds", "angles")
    padded = [
        (f"{row['case']['frames_per_rank']}", strategy, *(f"{100 * found[kind]:.1f}%" for kind in kinds))
        for row in rows
        for strategy, found in row.get("fillers", {}).items()
    ]
    of_padding = ("frames", "strategy", *(kind.replace("_", " ") for kind in kinds))
    return [
        Table(f"simulated, cost of {rows[0]['cost']['of']}", header, cells),
        Table("fillers among the rows of padded batches, on one GPU", of_padding, padded),
    ]
