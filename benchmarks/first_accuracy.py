"""Train the published chgnet and FastCHGNet from scratch on the same DFT frames and compare them.

Both see the same frames, reference energies, batch size, loss, learning-rate schedule and thread count.
Each arm writes its own entry of the result file, so that arms can be run one after another:

    python benchmarks/first_accuracy.py chgnet --data DIR --out first-accuracy.json
    python benchmarks/first_accuracy.py conservative --seed 0 --data DIR --out first-accuracy.json

DIR holds train.xyz and val.xyz (extended XYZ with energy, forces, stress and `config_type`). These frames
have no magnetic moments, so nobody's are trained and no error of theirs is reported. chgnet keeps the
graphs it builds in the first epoch; FastCHGNet builds them anew in every step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from ase import Atoms, units
from ase.io import iread, write
from vesin import NeighborList

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

N_TRAIN, BATCH_SIZE, LEARNING_RATE, FINAL_FRACTION = 500, 16, 1e-3, 1e-2
CUTOFF = 6.0
MAX_ATOMIC_NUMBER = 94


def has_isolated_atom(atoms: Atoms) -> bool:
    """Tell whether some atom has no neighbour within the cutoff."""
    (center,) = NeighborList(cutoff=CUTOFF, full_list=True).compute(
        points=atoms.positions, box=atoms.cell.array, periodic=True, quantities="i"
    )
    return len(np.unique(center)) < len(atoms)


def read_frames(path: Path, limit: int | None = None) -> list[Atoms]:
    """Read the mptrj_random frames without isolated atoms, in file order."""
    frames = []
    for atoms in iread(path):
        if atoms.info["config_type"] == "mptrj_random" and not has_isolated_atom(atoms):
            frames.append(atoms)
        if len(frames) == limit:
            break
    return frames


def fit_references(frames: list[Atoms]) -> np.ndarray:
    """Fit energy per atom as a linear function of composition, eV per atom, by least squares."""
    counts = np.stack([np.bincount(a.numbers - 1, minlength=MAX_ATOMIC_NUMBER) for a in frames])
    n_atoms = counts.sum(1)
    energies = np.array([a.get_potential_energy() for a in frames])
    return np.linalg.lstsq(counts / n_atoms[:, None], energies / n_atoms, rcond=None)[0]


def environment() -> dict[str, object]:
    """Describe the machine and the software a row was measured with."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    cpu = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "device": f"{cpu[0]} ({os.cpu_count()} cores)",
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("torch", "numpy", "ase", "vesin", "chgnet")},
    }


def chgnet_loader(frames: list[Atoms], shuffle: bool) -> DataLoader:
    """Hand frames to the published Trainer."""
    from chgnet.data.dataset import StructureData, collate_graphs
    from pymatgen.io.ase import AseAtomsAdaptor
    from torch.utils.data import DataLoader

    kbar = -10 / units.GPa  # VASP's sign and unit, which StructureData expects
    dataset = StructureData(
        [AseAtomsAdaptor.get_structure(a) for a in frames],
        [a.get_potential_energy() / len(a) for a in frames],
        [a.get_forces() for a in frames],
        stresses=[a.get_stress(voigt=False) * kbar for a in frames],
        shuffle=False,
    )
    return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=shuffle, collate_fn=collate_graphs)


def train_chgnet(train: list[Atoms], val: list[Atoms], epochs: int, seed: int) -> dict[str, object]:
    """Train the published model with its own Trainer."""
    from chgnet.model import CHGNet
    from chgnet.trainer import Trainer

    times: list[dict[str, float]] = []

    class TimedTrainer(Trainer):
        """The published Trainer; only the times of each training epoch are noted."""

        def _train(self, *args, **kwargs):
            wall, cpu = time.perf_counter(), time.process_time()
            result = super()._train(*args, **kwargs)
            times.append({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu})
            return result

    torch.manual_seed(seed)
    model = CHGNet()
    references = torch.tensor(fit_references(train), dtype=torch.float32)
    model.composition_model.fc.weight.data.copy_(references[None])
    trainer = TimedTrainer(
        model,
        targets="efs",
        criterion="Huber",
        epochs=epochs,
        learning_rate=LEARNING_RATE,
        scheduler_params={"decay_fraction": FINAL_FRACTION},
        use_device="cpu",
        print_freq=10,
    )

    train_loader, val_loader = chgnet_loader(train, True), chgnet_loader(val, False)
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(train_loader, val_loader, save_dir=folder)
    failed = train_loader.dataset.failed_idx + val_loader.dataset.failed_idx
    if failed:
        raise RuntimeError(f"chgnet replaced {len(failed)} frames by others")
    history = [
        {
            "energy_mev_per_atom": 1000 * trainer.training_history["e"]["val"][epoch],
            "forces_mev_per_angstrom": 1000 * trainer.training_history["f"]["val"][epoch],
            "stress_gpa": trainer.training_history["s"]["val"][epoch],
            **times[epoch],
        }
        for epoch in range(epochs)
    ]
    return {"n_parameters": model.n_params, "history": history}


def train_ours(
    train: list[Atoms], val: list[Atoms], epochs: int, seed: int, readout: str
) -> dict[str, object]:
    """Train FastCHGNet from scratch: no weight averaging and no clipping, as the published Trainer."""
    from fastchgnet.config import Provenance, RunConfig
    from fastchgnet.data.formats import read_frames as read_stored
    from fastchgnet.data.writer import write_store
    from fastchgnet.train import Watcher
    from fastchgnet.train import train as run
    from fastchgnet.train.log import read_metrics
    from fastchgnet.weights import load_potential

    class Clock(Watcher):
        """Note the CPU time of each training epoch, validation aside."""

        cpu_seconds: list[float] = []  # noqa: RUF012

        def start(self, epoch: int, n_epochs: int, n_frames: int) -> None:
            self.began = time.process_time()
            self.cpu_seconds.append(0.0)

        def advance(self, n_frames: int) -> None:
            self.cpu_seconds[-1] = time.process_time() - self.began

    clock = Clock()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, frames in (("train", train), ("val", val)):
            write(folder / f"{part}.xyz", frames)
            write_store(read_stored(folder / f"{part}.xyz"), folder / part, Provenance(name=part))
        config = RunConfig.model_validate(
            {
                "model": {"readout": readout},
                "loss": {"preset": "chgnet"},
                "optim": {
                    "learning_rate": LEARNING_RATE,
                    "final_fraction": FINAL_FRACTION,
                    "clip_norm": None,
                    "ema_decay": 0.0,
                },
                "data": {"train": folder / "train", "val": folder / "val", "batch_size": BATCH_SIZE},
                "train": {"out": folder / "run", "epochs": epochs, "seed": seed, "device": "cpu"},
            }
        )
        run(config, watcher=clock)
        rows = read_metrics(folder / "run")
        n_parameters = load_potential(folder / "run" / "last.safetensors").n_parameters()
    reported = ("energy_mev_per_atom", "forces_mev_per_angstrom", "stress_gpa")
    history = [
        {name: row["val"][name] for name in reported} | {"seconds": row["seconds"], "cpu_seconds": cpu}
        for row, cpu in zip(rows, clock.cpu_seconds, strict=True)
    ]
    return {"n_parameters": n_parameters, "history": history}


def write_row(out: Path, arm: str, row: dict[str, object]) -> None:
    """Add one arm to the result file; the other arms stay."""
    rows = json.loads(out.read_text()) if out.exists() else {}
    rows[arm] = row
    beside = out.with_suffix(".tmp")
    beside.write_text(json.dumps(rows, indent=1) + "\n")
    beside.replace(out)


def main() -> None:
    """Run one arm and write its row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=["chgnet", "conservative", "direct"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train = read_frames(args.data / "train.xyz", N_TRAIN)
    val = read_frames(args.data / "val.xyz")
    row = environment() | {"n_train": len(train), "n_val": len(val), "seed": args.seed}
    row |= {"batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "epochs": args.epochs}
    if args.arm == "chgnet":
        row |= train_chgnet(train, val, args.epochs, args.seed)
    else:
        row |= train_ours(train, val, args.epochs, args.seed, args.arm)
    row["validation"] = {k: v for k, v in row["history"][-1].items() if not k.endswith("seconds")}
    for time_kind in ("seconds", "cpu_seconds"):
        row[f"{time_kind}_per_epoch"] = float(np.median([epoch[time_kind] for epoch in row["history"]]))
    write_row(args.out, f"{args.arm}-seed{args.seed}", row)


if __name__ == "__main__":
    main()
