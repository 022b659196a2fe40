"""Simulations against chgnet's: a step of molecular dynamics, and relaxations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ase.io
import numpy as np
from ase import Atoms, units
from ase.formula import Formula
from ase.md.verlet import VelocityVerlet

from fastchgnet.bench import ours, reference
from fastchgnet.bench.rows import Row, append, check_out
from fastchgnet.bench.session import Options, Session
from fastchgnet.bench.timing import Work
from fastchgnet.data.formats import read_frames
from fastchgnet.errors import InputError
from fastchgnet.prediction import GEOMETRY
from fastchgnet.sim import md
from fastchgnet.sim.calculator import FastCHGNetCalculator
from fastchgnet.sim.md import MolecularDynamics
from fastchgnet.sim.relax import Settings, relax

STEPS = 10
"""Steps of molecular dynamics in each call."""

KELVIN = 300.0


MD_NOTE = (
    f"{STEPS} steps of 1 fs in each call, at constant energy from the same positions and velocities of "
    f"{KELVIN:g} K, neighbours included: `ours` is fastchgnet.sim.md, `ours_ase` and `chgnet` are ASE's "
    "VelocityVerlet with either calculator. Weights of chgnet-0.3.0."
)
RELAX_NOTE = (
    "All frames once, atoms and cells, with FIRE until no force is above `fmax`: in batches by ours, one "
    "after the other by chgnet's StructOptimizer. Both are warmed up with one step of the first frame alone."
)


def run_md(
    files: Sequence[Path], repeat: str, options: dict[str, Any], out: Path | None, say: Callable[[str], None]
) -> list[Row]:
    """Time steps of the first crystal of each file, repeated as `2x2x1` says; append rows to `out`.

    Raises:
        InputError: an unreadable file or repetition, no chgnet, or no such device.
    """
    cells = tuple(int(n) for n in repeat.split("x") if n.isdecimal())
    if len(cells) != 3 or min(cells) < 1:
        raise InputError(f"--repeat {repeat}: expected three numbers, such as 4x4x2")
    check_out(out)
    done = []
    with TemporaryDirectory() as folder:
        for path in files:
            made = supercell(path, cells, Path(folder))
            done.append(md_row(Session(Options(frames=made, **options), say)))
            if out is not None:
                append(out, done[-1:])
    return done


def run_relax(
    options: dict[str, Any],
    n_frames: int,
    fmax: float,
    max_steps: int,
    out: Path | None,
    say: Callable[[str], None],
) -> list[Row]:
    """Time relaxations of frames of a file; append the row to `out`.

    Raises:
        InputError: unreadable or too few frames, no chgnet, or no such device.
    """
    check_out(out)
    done = [relax_row(Session(Options(**options), say), n_frames, fmax, max_steps)]
    if out is not None:
        append(out, done)
    return done


def md_row(session: Session) -> Row:
    """Time steps of molecular dynamics of the crystal in the session's file."""
    workload = session.pool.workload(1)
    (atoms,) = ours.atoms_of(workload)
    row = session.row("md", workload, "conservative", MD_NOTE) | {"steps": STEPS}
    row["crystal"] = Formula(atoms.get_chemical_formula()).reduce()[0].format("hill")
    widths = np.sqrt(units.kB * KELVIN * atoms.get_masses())[:, None]
    atoms.set_momenta(widths * np.random.default_rng(session.options.seed).normal(size=(len(atoms), 3)))
    model = ours.Inference("conservative", session.device).potential
    dynamics = MolecularDynamics(model, [atoms], settings=md.Settings(velocities="given"))
    arms: dict[str, Work] = {
        "ours": lambda: dynamics.run(STEPS, STEPS),
        "ours_ase": _with_ase(atoms, FastCHGNetCalculator(model)),
    }
    if session.options.chgnet:
        arms["chgnet"] = _with_ase(atoms, reference.calculator(session.device))
    samples = session.time(row, arms)
    if "chgnet" in samples:
        row["ratio_ase"] = float(np.median(samples["chgnet"].wall / samples["ours_ase"].wall))
    return row


def _with_ase(atoms: Atoms, calculator: Any) -> Work:
    atoms = atoms.copy()
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, timestep=units.fs)
    return reference.quiet(partial(dynamics.run, STEPS))


def relax_row(session: Session, n_frames: int, fmax: float, max_steps: int) -> Row:
    """Time relaxations of the first frames."""
    workload = session.pool.workload(n_frames)
    row = session.row("relax", workload, "conservative", RELAX_NOTE) | {"fmax": fmax, "max_steps": max_steps}
    crystals = ours.atoms_of(workload)
    model = ours.Inference("conservative", session.device).potential
    energies: dict[str, list[float]] = {}
    steps: dict[str, list[int]] = {}

    def run(arm: str, relax_all: Callable[[], list[tuple[float, int]]]) -> None:
        found = relax_all()
        energies[arm], steps[arm] = [e for e, _ in found], [n for _, n in found]

    def batched(chosen: Sequence[Atoms], most: int) -> list[tuple[float, int]]:
        done = relax(model, chosen, Settings(fmax=fmax, max_steps=most))
        return [(one.energy / len(one.positions), one.n_steps) for one in done]

    batched(crystals[:1], 1)
    arms: dict[str, Work] = {"ours": lambda: run("ours", lambda: batched(crystals, max_steps))}
    if session.options.chgnet:
        published = reference.Relaxation(session.device, fmax)
        structures = reference.structures_of(workload)
        published.relax(structures[:1], 1)
        arms["chgnet"] = lambda: run("chgnet", lambda: published.relax(structures, max_steps))
    session.time(row, arms, warm=False)
    for arm in arms:
        row[arm] |= {"steps": sum(steps[arm]), "unfinished": sum(n >= max_steps for n in steps[arm])}
    if "chgnet" in arms:
        apart = np.abs(np.subtract(energies["ours"], energies["chgnet"]))
        row["energy_difference_ev_per_atom"] = [float(p) for p in np.percentile(apart, (50, 90, 100))]
    return row


def supercell(path: Path, repeat: tuple[int, ...], folder: Path) -> Path:
    """Write the first crystal of a file, repeated, and return where."""
    frame = next(read_frames(path, GEOMETRY))
    atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc) * repeat
    made = folder / f"{path.stem}.xyz"
    ase.io.write(made, atoms, format="extxyz")
    return made
