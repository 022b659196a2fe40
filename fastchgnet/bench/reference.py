"""The published chgnet as the other arm: its own converter, its own trainer, its own predict_structure."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from fastchgnet.bench.frames import ATOM_CUTOFF, BOND_CUTOFF, Answer, Workload
from fastchgnet.bench.timing import Work
from fastchgnet.errors import InputError
from fastchgnet.published import CHGNET_VERSION
from fastchgnet.units import GPA


def require_chgnet() -> None:
    """Raise InputError where the published package is not installed."""
    if importlib.util.find_spec("chgnet") is None:
        raise InputError(
            f"bench compares with chgnet, which is not installed: pip install chgnet=={CHGNET_VERSION}, "
            "or leave it out with --no-chgnet"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what chgnet prints and warns of out of the way."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _module(name: str) -> Any:
    with _quiet():
        return import_module(name)


def structures_of(workload: Workload) -> list[Any]:
    """Give the workload as pymatgen Structures, chgnet's input."""
    make = _module("pymatgen.core").Structure
    return [make(f.cell, f.numbers, f.positions, coords_are_cartesian=True) for f in workload.frames]


def _converter() -> Any:
    return _module("chgnet.graph").CrystalGraphConverter(
        atom_graph_cutoff=ATOM_CUTOFF, bond_graph_cutoff=BOND_CUTOFF, on_isolated_atoms="ignore"
    )


def conversion(workload: Workload) -> Work:
    """Return the work of converting structures to graphs, one after the other, as chgnet always does."""
    convert, structures = _converter(), structures_of(workload)

    def work() -> None:
        with _quiet():
            for structure in structures:
                convert(structure)

    return work


def training(workload: Workload, device: torch.device) -> Work:
    """Return one step of chgnet's own Trainer on one batch: efsm, Huber, Adam; graphs made beforehand."""
    dataset, frames = _module("chgnet.data.dataset"), workload.frames
    with _quiet():
        data = dataset.StructureData(
            structures_of(workload),
            [f.energy / len(f.numbers) for f in frames],
            [f.forces for f in frames],
            # VASP's sign and unit, kbar
            stresses=[np.asarray(f.stress) * (-10 / GPA) for f in frames],
            magmoms=[f.magmoms for f in frames],
            graph_converter=_converter(),
            shuffle=False,
        )
        batch = dataset.collate_graphs([data[position] for position in range(len(frames))])
        if data.failed_idx:
            raise InputError(f"chgnet cannot convert {len(data.failed_idx)} of the frames")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _module("chgnet.model").CHGNet().to(device)
        model.composition_model.requires_grad_(False)  # as Trainer.train does
        trainer = _module("chgnet.trainer").Trainer(
            model, targets="efsm", criterion="Huber", epochs=1000, use_device=device.type, print_freq=10**9
        )

    def work() -> None:
        with _quiet():
            trainer._train([batch], 0)

    return work


class Inference:
    """chgnet-0.3.0's predict_structure, graphs included."""

    def __init__(self, device: torch.device) -> None:
        load = _module("chgnet.model").CHGNet.load
        with _quiet():
            self.model = load(model_name="0.3.0", use_device=device.type, verbose=False)
            self.model.graph_converter.set_isolated_atom_response("ignore")

    def predict(self, structures: Sequence[Any], batch_size: int) -> list[Answer]:
        """Predict all four quantities."""
        with _quiet():
            done = self.model.predict_structure(structures, task="efsm", batch_size=batch_size)
        # Of a single structure it returns no list.
        return [(float(one["e"]), one["f"]) for one in ([done] if isinstance(done, dict) else done)]


def quiet(work: Work) -> Work:
    """Make work that keeps what it prints and warns of to itself."""

    def quietly() -> None:
        with _quiet():
            work()

    return quietly


def calculator(device: torch.device) -> Any:
    """Return chgnet's ASE calculator."""
    with _quiet():
        return _module("chgnet.model.dynamics").CHGNetCalculator(
            use_device=device.type, on_isolated_atoms="ignore"
        )


class Relaxation:
    """chgnet's StructOptimizer with its defaults: FIRE, ASE's FrechetCellFilter."""

    def __init__(self, device: torch.device, fmax: float) -> None:
        self.fmax = fmax
        with _quiet():
            self.optimizer = _module("chgnet.model.dynamics").StructOptimizer(
                use_device=device.type, on_isolated_atoms="ignore"
            )

    def relax(self, structures: Sequence[Any], max_steps: int) -> list[tuple[float, int]]:
        """Return the energy per atom, eV, and the number of steps of each."""
        done = []
        for structure in structures:
            with _quiet():
                found = self.optimizer.relax(structure, fmax=self.fmax, steps=max_steps, verbose=False)
            trajectory = found["trajectory"]
            # it notes the start and, a second time, the end
            done.append((float(trajectory.energies[-1]) / len(structure), len(trajectory) - 2))
        return done
