"""What `fastchgnet md` does: crystals of files at their temperatures, in one simulation and its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.constraints import FixAtoms
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastchgnet.errors import InputError
from fastchgnet.files import check_folder, only_process, refuse_existing
from fastchgnet.potential import Potential
from fastchgnet.prediction import Crystal, read_crystals
from fastchgnet.published import load
from fastchgnet.sim.charges import DEFAULT_CHARGES, ChargeTable, read_charge_table
from fastchgnet.sim.constraints import fixed_atoms, fixed_in_files
from fastchgnet.sim.md.ensemble import Settings, held_atoms, temperature_of
from fastchgnet.sim.md.files import RESTART, Member, RunFolder, file_name
from fastchgnet.sim.md.integrators import kinetic_energy
from fastchgnet.sim.md.loop import MolecularDynamics
from fastchgnet.sim.md.report import write_report
from fastchgnet.sim.outputs import check_report, number_or_none, remove_parts
from fastchgnet.sim.page import require_libraries
from fastchgnet.train.signals import stop_request
from fastchgnet.weights import fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run, and where to put it.

    Raises:
        InputError: numbers that make no sense.
    """

    files: Sequence[Path]
    out: Path
    settings: Settings
    temperatures: Sequence[float] = (300.0,)  # K; each crystal runs at each
    replicas: int = 1  # of each crystal at each temperature
    steps: int = 10_000  # in all, those before a restart included
    interval: int = 10  # of frames and rows of the logs, steps
    charges: ChargeTable | None = None
    report: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("replicas", "steps", "interval"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1: {getattr(self, name)}")
        for kelvin in self.temperatures:
            if not 0 < kelvin < math.inf:
                raise InputError(f"the temperature must be above zero: {kelvin:g} K")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    rows: list[dict[str, Any]]  # of each crystal, as --json prints it
    errors: list[str]
    was_stopped: bool

    @property
    def status(self) -> int:
        """Exit status: 130 where somebody stopped it, 2 where nothing ran, 1 where something did not."""
        if self.was_stopped:
            return 130
        if all(row["reason"] for row in self.rows):
            return 2
        return 1 if self.errors else 0


def charge_table_of(wanted: bool, path: Path | None) -> ChargeTable | None:
    """Return the table that a user asks for, if any."""
    if path is not None:
        return read_charge_table(path)
    return DEFAULT_CHARGES if wanted else None


def run_files(
    plan: Plan, model: str, device: str = "auto", dtype: Literal["float32", "float64"] = "float32"
) -> Outcome:
    """Read crystals, move them, and write all that is asked for.

    Raises:
        InputError: nothing can be run.
    """
    if plan.report is not None:
        require_libraries()
    goes_on = plan.resume and (plan.out / RESTART).exists()
    check_report(plan.report, goes_on)
    crystals, found = read_crystals(plan.files)
    errors = [str(error) for error in found]
    starts = _starts(crystals, plan, errors)
    if not starts:
        return Outcome([], errors, False)
    atoms, members = _expand(starts, plan)
    _check_out(plan, members)
    potential = load(model, device, dtype)
    dynamics = MolecularDynamics(potential, atoms, [one.temperature for one in members], plan.settings)
    folder = RunFolder(
        plan.out, members, _options(plan, potential, [atoms for _, atoms in starts]), plan.charges
    )
    with only_process(plan.out), stop_request() as request:
        remove_parts(plan.out / RESTART)
        _check_out(plan, members)  # another process may have run there in the meantime
        if (plan.out / RESTART).exists():
            folder.resume(dynamics)
        else:
            folder.begin(dynamics)
        with _bar(plan.steps) as show:
            _run(dynamics, folder, plan, show, request.is_set)
    rows = _rows(dynamics, folder)
    errors += [
        f"{row['name']}: stopped after {row['steps']} steps: {row['reason']}" for row in rows if row["reason"]
    ]
    if plan.report is not None:
        write_report(plan.report, folder, dynamics, rows)
    return Outcome(rows, errors, bool(dynamics.members) and dynamics.n_steps < plan.steps)


def _check_out(plan: Plan, members: Sequence[Member]) -> None:
    """Refuse a folder that takes no files, or holds what this run did not write."""
    check_folder(plan.out)
    if not (plan.out / RESTART).exists():
        paths = (path for one in members for path in (one.trajectory(plan.out), one.log(plan.out)))
        # a process that was killed before it had saved its first state leaves empty files
        refuse_existing(path for path in paths if not (path.is_file() and path.stat().st_size == 0))
    elif not plan.resume:
        raise InputError(f"{plan.out}: holds a run already; --resume goes on with it")


def _run(
    dynamics: MolecularDynamics,
    folder: RunFolder,
    plan: Plan,
    show: Callable[[MolecularDynamics, float], None],
    stop: Callable[[], bool],
) -> None:
    """Take the steps that are left, and save the last.

    Raises:
        InputError: the disk or the memory is full; the run can go on from what was saved last.
    """
    began, step = time.perf_counter(), dynamics.n_steps

    def observe(dynamics: MolecularDynamics) -> None:
        nonlocal began, step
        ms_per_step = 1000 * (time.perf_counter() - began) / (dynamics.n_steps - step)
        folder.record(dynamics, ms_per_step)
        folder.save_if_due(dynamics)
        show(dynamics, ms_per_step)
        began, step = time.perf_counter(), dynamics.n_steps

    try:
        dynamics.run(plan.steps - dynamics.n_steps, plan.interval, observe, stop)
    except torch.OutOfMemoryError as error:
        raise InputError("out of memory; run fewer or smaller crystals at a time") from error
    folder.record_lost(dynamics)
    folder.save(dynamics)


def _starts(crystals: Sequence[Crystal], plan: Plan, errors: list[str]) -> list[tuple[Crystal, Atoms]]:
    """Give crystals as they start; of those that cannot, append the reason to `errors`."""
    held, starts = dict(fixed_in_files(plan.files)), []
    moving = _as_ase_reads(crystals) if plan.settings.velocities == "given" else {}
    for crystal in crystals:
        key = (crystal.file, crystal.index)
        try:
            atoms = _start(crystal, held.get(key), plan)
            if plan.settings.velocities == "given":
                atoms.set_velocities(_velocities(crystal, moving[key]))
        except InputError as error:
            errors.append(str(error))
        else:
            starts.append((crystal, atoms))
    return starts


def _as_ase_reads(crystals: Sequence[Crystal]) -> dict[tuple[str, int], Atoms | None]:
    """Read the frames of files once more, as ASE does; None where it cannot."""
    found: dict[tuple[str, int], Atoms | None] = {}
    for file, group in groupby(crystals, key=lambda crystal: crystal.file):
        indices = [crystal.index for crystal in group]
        try:
            frames: Any = ase.io.read(file, ":", do_not_split_by_at_sign=True)
            found.update({(file, index): frames[index] for index in indices})
        except Exception:  # of any kind, from ASE's parsers; the other frames may be good
            found.update({(file, index): _frame(file, index) for index in indices})
    return found


def _frame(file: str, index: int) -> Atoms | None:
    try:
        found: Any = ase.io.read(file, index, do_not_split_by_at_sign=True)
    except Exception:  # as above
        return None
    return found


def _velocities(crystal: Crystal, read: Atoms | None) -> NDArray[np.float64]:
    """Return the velocities that ASE has found in a file, [n, 3]."""
    source = f"{crystal.file}:{crystal.index}"
    if read is None or len(read) != len(crystal.frame.numbers):
        raise InputError(f"{source}: ASE cannot read its velocities")
    if not read.has("momenta"):
        raise InputError(f"{source}: has no velocities to start with")
    velocities: NDArray[np.float64] = read.get_velocities()
    if not np.isfinite(velocities).all():
        raise InputError(f"{source}: velocities contain NaN or infinity")
    return velocities


def _start(crystal: Crystal, held: NDArray[np.bool_] | InputError | None, plan: Plan) -> Atoms:
    """Give a crystal as it starts, with the atoms that are held."""
    atoms = crystal.as_atoms()
    if isinstance(held, InputError):
        raise held
    if held is not None and held.any():
        atoms.set_constraint(FixAtoms(mask=held))
    held_atoms(atoms, plan.settings, f"{crystal.file}:{crystal.index}")
    if plan.charges is not None:
        try:
            plan.charges.check(atoms.numbers)
        except InputError as error:
            raise InputError(f"{crystal.file}:{crystal.index}: {error}") from None
    return atoms


def _expand(starts: Sequence[tuple[Crystal, Atoms]], plan: Plan) -> tuple[list[Atoms], list[Member]]:
    """Make every replica at every temperature of every crystal."""
    atoms: list[Atoms] = []
    members: list[Member] = []
    for crystal, start in starts:
        for kelvin in plan.temperatures:
            for replica in range(plan.replicas):
                atoms.append(start)
                members.append(
                    Member(
                        name=file_name(len(members), crystal.file, kelvin),
                        file=crystal.file,
                        index=crystal.index,
                        formula=start.get_chemical_formula(),
                        n_atoms=len(start),
                        temperature=kelvin,
                        replica=replica,
                    )
                )
    return atoms, members


def _options(plan: Plan, potential: Potential, starts: Sequence[Atoms]) -> dict[str, Any]:
    """All that trajectories depend on; a run may go on only with the same."""
    digest = hashlib.sha256()
    for atoms in starts:
        held = fixed_atoms(atoms, "")
        for array in (
            atoms.numbers,
            atoms.positions,
            atoms.cell.array,
            atoms.pbc,
            atoms.get_velocities(),
            held,
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
    return {
        **dataclasses.asdict(plan.settings),
        "temperatures": list(plan.temperatures),
        "replicas": plan.replicas,
        "interval": plan.interval,
        "charges": None if plan.charges is None else plan.charges.model_dump(),
        "dtype": str(potential.dtype),
        "model": fingerprint(potential),
        "crystals": digest.hexdigest()[:16],
    }


def _rows(dynamics: MolecularDynamics, folder: RunFolder) -> list[dict[str, Any]]:
    """Sum up the run of each crystal."""
    lost = {one.number: one for one in dynamics.lost}
    rows = []
    for number, member in enumerate(folder.members):
        steps = lost[number].step if number in lost else dynamics.n_steps
        kelvin, pressure = folder.sums.means(number)
        n_frames, n_charged = folder.sums.counts(number)
        row = dataclasses.asdict(member) | {
            "steps": steps,
            "time_ps": steps * dynamics.settings.timestep / 1000,
            "reason": lost[number].reason if number in lost else None,
            "mean_temperature_k": number_or_none(kelvin),
            "mean_pressure_gpa": number_or_none(pressure),
            "drift_mev_per_atom_per_ps": number_or_none(folder.sums.drift(number, member.n_atoms)),
            "frames": n_frames,
            "trajectory": str(folder.trajectory(number)),
            "log": str(folder.log(number)),
        }
        rows.append(row | ({} if folder.charges is None else {"frames_with_charges": n_charged}))
    return rows


@contextmanager
def _bar(n_steps: int) -> Iterator[Callable[[MolecularDynamics, float], None]]:
    """Show a bar on stderr, where that is a terminal; yield the function that moves it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("md"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=n_steps)

        def show(dynamics: MolecularDynamics, ms_per_step: float) -> None:
            if progress.disable or not dynamics.members:
                return
            state, bath = dynamics.state, dynamics.bath
            kelvin = temperature_of(kinetic_energy(state.velocity, bath), bath).mean().item()
            energy = state.energy.sum().item() / len(state.position)
            text = f"{ms_per_step:.2f} ms/step  T {kelvin:.0f} K  E {energy:.4f} eV/atom"
            progress.update(task, completed=dynamics.n_steps, description=text)

        yield show
