"""Count the frames a second that one core plans and takes out of a store.

python benchmarks/store_reading.py --store runs/mptrj-like --out store-reading.json

Random batches, then epochs of global batches that are divided among ranks, as every process of a run divides
them: `one_rank` takes its own share, `all_shares` those of all ranks one after the other. `single` are small
batches of a single process. Figures are the 20, 50 and 80 percentiles of CPU time in one thread; the store's
files are in the system's cache. The row in results/ is of 64 copies of 2,487 geometries with MPtrj's sizes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from first_accuracy import environment
from numpy.typing import NDArray

from fastchgnet.data.store import Store
from fastchgnet.ops.cpu import native
from fastchgnet.train.batches import Batches
from fastchgnet.train.rooms import frame_sizes
from fastchgnet.train.sampler import share

ROUNDS, BATCHES = 7, 200
FRAMES, RANKS, SINGLE = 2048, 32, 64
PLANS = 100


def percentiles(values: list[float]) -> list[float]:
    return np.percentile(values, (20, 50, 80)).tolist()


def gathered(store: Store) -> dict[str, list[float]]:
    """Frames a second of random batches."""
    random, found = np.random.default_rng(0), {}
    for size in (16, 64, 256):
        rates = []
        for _ in range(ROUNDS):
            chosen = random.integers(len(store), size=(BATCHES, size))
            start = time.process_time()
            for indices in chosen:
                store.gather(indices)
            rates.append(BATCHES * size / (time.process_time() - start))
        found[f"frames_per_second_batch{size}"] = percentiles(rates)
    return found


def planned(sizes: NDArray[np.int64]) -> dict[str, Any]:
    """Milliseconds of dividing a global batch among ranks, by both bodies."""
    random = np.random.default_rng(0)
    found: dict[str, Any] = {"frames": FRAMES, "ranks": RANKS}
    for name, bodies in (("compiled", nullcontext), ("python", native.disabled)):
        milliseconds = []
        with bodies():
            for _ in range(PLANS):
                batch = sizes[random.integers(len(sizes), size=FRAMES)]
                start = time.process_time()
                share(batch, RANKS)
                milliseconds.append(1e3 * (time.process_time() - start))
        found[f"{name}_milliseconds"] = percentiles(milliseconds)
    return found


def delivered(store: Store, sizes: NDArray[np.int64]) -> dict[str, Any]:
    """Frames a second of epochs; those that other ranks take count, too."""

    def one_rank(batch: NDArray[np.int64]) -> None:
        store.gather(batch[share(sizes[batch], RANKS)[0]])

    def all_shares(batch: NDArray[np.int64]) -> None:
        for places in share(sizes[batch], RANKS):
            store.gather(batch[places])

    cases: tuple[tuple[str, int, Callable[[NDArray[np.int64]], object]], ...] = (
        ("one_rank", FRAMES, one_rank),
        ("all_shares", FRAMES, all_shares),
        ("single", SINGLE, store.gather),
    )
    found: dict[str, Any] = {"frames": FRAMES, "ranks": RANKS, "single_frames": SINGLE}
    for name, size, take in cases:
        batches, rates = Batches(sizes, size, seed=0), []
        for number in range(ROUNDS):
            start = time.process_time()
            for batch in batches.epoch(number):
                take(batch)
            rates.append(len(sizes) / (time.process_time() - start))
        found[f"{name}_frames_per_second"] = percentiles(rates)
    return found


def main() -> None:
    """Time all three and write a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if native.library() is None:
        parser.error("the compiled body needs a C++ compiler")
    store = Store.verified(args.store)
    cutoffs = store.header.plan.atom_cutoff, store.header.plan.bond_cutoff
    sizes = frame_sizes(store, np.arange(len(store)), *cutoffs)
    measured = gathered(store) | {"planned": planned(sizes), "delivered": delivered(store, sizes)}
    size = {"n_frames": len(store), "atoms_per_frame": store.header.counts.n_atoms / len(store)}
    args.out.write_text(json.dumps(environment() | size | measured, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
