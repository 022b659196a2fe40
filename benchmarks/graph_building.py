"""Time graph building on one thread against the published converter, on the same crystals in one process.

python benchmarks/graph_building.py --structures FILE.xyz --out graph-building.json
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from chgnet.graph import CrystalGraphConverter
from first_accuracy import environment
from pymatgen.io.ase import AseAtomsAdaptor

from fastchgnet.neighbors import build_graph, systems_from_atoms

ROUNDS = 5


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call; on one thread they are wall seconds that other work cannot disturb."""
    start = time.process_time()
    work()
    return time.process_time() - start


def in_batches(atoms: Sequence[Atoms], size: int) -> None:
    """Build all graphs, `size` crystals at a time."""
    for start in range(0, len(atoms), size):
        build_graph(systems_from_atoms(atoms[start : start + size]), 6.0, 3.0)


def main() -> None:
    """Run the paired rounds and write a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--structures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    atoms = read(args.structures, index=":")
    structures = [AseAtomsAdaptor.get_structure(a) for a in atoms]
    converter = CrystalGraphConverter(atom_graph_cutoff=6, bond_graph_cutoff=3, on_isolated_atoms="ignore")
    parts = np.array_split(np.arange(len(atoms)), ROUNDS)
    in_batches(atoms[:64], 64)
    rounds = []
    for part in parts:
        chosen = [atoms[i] for i in part]
        rounds.append(
            {
                "n_structures": len(part),
                "chgnet_seconds": seconds(lambda part=part: [converter(structures[i]) for i in part]),
                "single_seconds": seconds(lambda chosen=chosen: in_batches(chosen, 1)),
                "batch64_seconds": seconds(lambda chosen=chosen: in_batches(chosen, 64)),
            }
        )
    ratios = {
        f"ratio_{kind}": float(np.median([r["chgnet_seconds"] / r[f"{kind}_seconds"] for r in rounds]))
        for kind in ("single", "batch64")
    }
    row = environment() | {"structures": args.structures.name, "rounds": rounds} | ratios
    args.out.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
