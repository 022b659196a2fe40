"""Total energy over time at constant energy: chgnet 0.4.2 and FastCHGNet on the same crystals.

Both take the weights of chgnet-0.3.0 in float32, the same relaxed crystal and the same velocities, of twice
the temperature, half of which goes into the potential energy. chgnet runs through ASE's VelocityVerlet and
FastCHGNet through its own loop. Drift is the slope of the total energy by least squares, scatter the standard
deviation about that line.

    python benchmarks/nve_drift.py LiMnO2.cif SrTiO3 --out nve-drift.json

A crystal is a file that ASE reads, or SrTiO3 for the perovskite.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet

import fastchgnet
from fastchgnet.bench.rows import environment
from fastchgnet.sim.md.ensemble import Settings

KELVIN, INTERVAL = 300.0, 10


def crystal(name: str) -> Atoms:
    """Read a crystal, or build the perovskite."""
    if name != "SrTiO3":
        return ase.io.read(name)
    places = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
    return Atoms("SrTiO3", scaled_positions=places, cell=[3.95] * 3, pbc=True)


def set_in_motion(atoms: Atoms) -> Atoms:
    """Draw velocities of twice the temperature; the centre of mass stays."""
    rng = np.random.default_rng(0)
    momenta = rng.normal(size=(len(atoms), 3)) * np.sqrt(2 * KELVIN * units.kB * atoms.get_masses())[:, None]
    masses = atoms.get_masses()[:, None]
    atoms.set_momenta(momenta - masses * momenta.sum(0) / masses.sum())
    return atoms


def run_ours(atoms: Atoms, potential: Any, n_steps: int) -> tuple[list[float], list[float]]:
    """Return total energies, eV, and temperatures, K, every INTERVAL steps."""
    dynamics = fastchgnet.MolecularDynamics(potential, [atoms], settings=Settings(velocities="given"))
    energies, kelvins = [], []

    def observe(now: fastchgnet.MolecularDynamics) -> None:
        (snapshot,) = now.snapshots()
        energies.append(snapshot.energy + snapshot.kinetic)
        kelvins.append(snapshot.temperature)

    observe(dynamics)
    dynamics.run(n_steps, INTERVAL, observe)
    return energies, kelvins


def run_chgnet(atoms: Atoms, n_steps: int) -> tuple[list[float], list[float]]:
    """Return the same for chgnet's calculator."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from chgnet.model.dynamics import CHGNetCalculator

        atoms = atoms.copy()
        atoms.calc = CHGNetCalculator(use_device="cpu")
        dynamics = VelocityVerlet(atoms, timestep=units.fs)
        energies, kelvins = [], []

        def observe() -> None:
            energies.append(float(atoms.get_total_energy()))
            # ASE counts the motion of the centre of mass, which is at rest
            kelvins.append(float(atoms.get_temperature()) * len(atoms) / (len(atoms) - 1))

        dynamics.attach(observe, interval=INTERVAL)
        dynamics.run(n_steps)
    return energies, kelvins


def described(energies: list[float], kelvins: list[float], n_atoms: int) -> dict[str, float]:
    """Fit a line to the energies, meV/atom over ps."""
    mev = 1e3 * np.array(energies) / n_atoms
    ps = np.arange(len(mev)) * INTERVAL * 1e-3
    slope, offset = np.polyfit(ps, mev, 1)
    return {
        "drift_mev_per_atom_per_ps": float(slope),
        "scatter_mev_per_atom": float((mev - slope * ps - offset).std()),
        "mean_temperature_k": float(np.mean(kelvins)),
    }


def main() -> None:
    """Run every crystal with both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("crystals", nargs="+")
    parser.add_argument("--steps", type=int, default=10_000, help="of 1 fs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    potential = fastchgnet.load("chgnet-0.3.0", device="cpu")
    rows = []
    for name in options.crystals:
        (relaxed,) = fastchgnet.relax(potential, [crystal(name)])
        atoms = set_in_motion(relaxed.as_atoms())
        row = {
            "crystal": atoms.get_chemical_formula(),
            "n_atoms": len(atoms),
            "steps": options.steps,
            "environment": environment(torch.device("cpu")),
            "chgnet_version": version("chgnet"),
        }
        for arm, run in (("ours", lambda a=atoms: run_ours(a, potential, options.steps)),
                         ("chgnet", lambda a=atoms: run_chgnet(a, options.steps))):  # fmt: skip
            start = time.process_time()
            energies, kelvins = run()
            row[arm] = described(energies, kelvins, len(atoms))
            row[arm]["cpu_seconds"] = time.process_time() - start
            print(row["crystal"], arm, row[arm], flush=True)
        rows.append(row)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
