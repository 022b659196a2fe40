"""Count the random frames a second that a store gives in batches on one core.

python benchmarks/store_reading.py --store runs/dft-train --out store-reading.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from first_accuracy import environment

from fastchgnet.data.store import Store

ROUNDS, BATCHES = 7, 200


def main() -> None:
    """Gather random batches and write a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    store, random = Store(args.store), np.random.default_rng(0)
    row = environment() | {
        "n_frames": len(store),
        "atoms_per_frame": store.header.counts.n_atoms / len(store),
    }
    for size in (16, 64, 256):
        rates = []
        for _ in range(ROUNDS):
            chosen = random.integers(len(store), size=(BATCHES, size))
            start = time.process_time()
            for indices in chosen:
                store.gather(indices)
            rates.append(BATCHES * size / (time.process_time() - start))
        row[f"frames_per_second_batch{size}"] = [float(r) for r in np.percentile(rates, (20, 50, 80))]
    args.out.write_text(json.dumps(row, indent=1) + "\n")
    print({key: value for key, value in row.items() if key.startswith("frames_per")})


if __name__ == "__main__":
    main()
