"""Relax the crystals of files, and write down what comes of each as soon as it is done."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from numpy.typing import NDArray

from fastchgnet.errors import InputError
from fastchgnet.files import check_folder, check_writable, refuse_existing, write_atomically
from fastchgnet.potential import Potential
from fastchgnet.prediction import Crystal, read_crystals, systems_from_frames
from fastchgnet.sim.constraints import fixed_in_files
from fastchgnet.sim.outputs import number_or_none, one_line, plain_name
from fastchgnet.sim.relax.loop import Relaxation
from fastchgnet.sim.relax.record import Key, Record, Row, lines_path, to_extxyz
from fastchgnet.sim.relax.result import Relaxed, Settings
from fastchgnet.sim.relax.room import Room
from fastchgnet.units import GPA
from fastchgnet.weights import fingerprint


class Watcher(Protocol):
    """What hears of the progress of a command."""

    def begin(self, n_crystals: int, n_done: int) -> None:
        """Hear how many crystals there are, and how many were done before."""

    def show(self, n_done: int, n_crystal_steps: int) -> None:
        """Hear how many crystals are done, and how many steps all have taken in this process."""

    def stops(self) -> bool:
        """Tell whether to stop before the next step."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The crystals of files, and why others cannot be relaxed."""

    crystals: list[Crystal]
    held: list[NDArray[np.bool_]]  # which atoms of each stay where they are in its cell, [n]
    errors: list[InputError]

    @property
    def keys(self) -> list[Key]:
        """File and number of each frame."""
        return [(crystal.file, crystal.index) for crystal in self.crystals]


@dataclass(frozen=True, slots=True)
class Task:
    """What to do with crystals, and where to write it."""

    out: Path
    settings: Settings
    batch_size: int | None = None
    trajectory: Path | None = None  # folder for all steps of each crystal

    @property
    def lines(self) -> Path:
        """What came of each crystal."""
        return lines_path(self.out)

    def check(self, files: Sequence[Path]) -> None:
        """Raise InputError where results cannot be written under this name."""
        if self.out.suffix != ".extxyz":
            raise InputError(f"{self.out}: relaxed crystals are written as .extxyz")
        if self.out.resolve() in [path.resolve() for path in files]:
            raise InputError(f"{self.out}: is one of the files to relax; name another --out")
        check_writable(self.out)
        if not self.lines.exists():
            refuse_existing([self.out])
        if self.trajectory is not None:
            check_folder(self.trajectory)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command has done."""

    inputs: Inputs
    record: Record
    finished: bool  # whether every crystal is done

    @property
    def rows(self) -> list[Row]:
        """The finished relaxations of these inputs, in their order."""
        return [self.record.rows[key] for key in self.inputs.keys if key in self.record.rows]


def read_inputs(files: Sequence[Path]) -> Inputs:
    """Read the crystals of files and which of their atoms are held."""
    files = list(dict.fromkeys(files))
    crystals, errors = read_crystals(files)
    constraints = dict(fixed_in_files(files))
    inputs = Inputs([], [], errors)
    for crystal in crystals:
        held = constraints.get((crystal.file, crystal.index), np.zeros(len(crystal.frame.numbers), bool))
        if isinstance(held, InputError):
            errors.append(held)
        else:
            inputs.crystals.append(crystal)
            inputs.held.append(held)
    return inputs


def relax_files(potential: Potential, inputs: Inputs, task: Task, watcher: Watcher) -> Outcome:
    """Relax the crystals of files that the record of an earlier command does not hold already.

    Raises:
        InputError: as `Record`, or a result cannot be written.
    """
    keys = inputs.keys
    starts = {key: _fingerprint(inputs, place) for place, key in enumerate(keys)}
    dependencies = _dependencies(potential, task.settings)
    paths = _paths(task.trajectory, starts, dependencies)
    with Record(task.out, dependencies, starts) as record:
        todo = [place for place, key in enumerate(keys) if key not in record.rows]
        _say_which_cells_stay(inputs, todo, task.settings)
        relaxation = Relaxation(
            potential,
            systems_from_frames(inputs.crystals[place].frame for place in todo),
            [inputs.held[place] for place in todo],
            task.settings,
            Room.of(potential, task.batch_size),
            keep_paths=bool(paths),
        )
        n_done = len(inputs.crystals) - len(todo)
        watcher.begin(len(inputs.crystals), n_done)
        while not relaxation.finished and not watcher.stops():
            for relaxed in relaxation.step():
                place = todo[relaxed.index]
                key = keys[place]
                if paths and relaxed.path:
                    _write_path(paths[key], key, relaxed)
                row = _row(inputs.crystals[place], relaxed) | {"start": starts[key]}
                record.add(key, row, _described(relaxed, inputs.held[place]))
                n_done += 1
            watcher.show(n_done, relaxation.n_crystal_steps)
        record.finish(keys)
    return Outcome(inputs, record, relaxation.finished)


def trajectory_path(folder: Path, key: Key) -> Path:
    """Return where the steps of a crystal are written."""
    file, index = key
    name = plain_name(file).lstrip("_.")
    if name != file:  # another file may have the same
        name += f"-{hashlib.sha256(file.encode()).hexdigest()[:8]}"
    return folder / f"{name}-{index}.extxyz"


def _dependencies(potential: Potential, settings: Settings) -> dict[str, Any]:
    """Say what a relaxation depends on, but for the crystal."""
    return {
        "model": potential.provenance.name,
        "weights": fingerprint(potential),
        "dtype": str(potential.dtype).removeprefix("torch."),
        "fmax": settings.fmax,
        "steps": settings.max_steps,
        "cell": settings.cell,
        "pressure": settings.pressure / GPA,
    }


def _fingerprint(inputs: Inputs, place: int) -> str:
    """Tell crystals at the start apart."""
    frame = inputs.crystals[place].frame
    digest = hashlib.sha256()
    for values in (frame.numbers, frame.positions, frame.cell, frame.pbc, inputs.held[place]):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


def _say_which_cells_stay(inputs: Inputs, todo: Sequence[int], settings: Settings) -> None:
    if settings.cell == "fixed":
        return
    staying = [inputs.crystals[place] for place in todo if not inputs.crystals[place].frame.pbc.all()]
    if staying:
        first = f"{staying[0].file}:{staying[0].index}"
        others = f" and {len(staying) - 1} more" if len(staying) > 1 else ""
        warnings.warn(
            f"{first}{others}: not periodic in three directions, so that the cell stays as it is",
            stacklevel=3,
        )


def _row(crystal: Crystal, relaxed: Relaxed) -> Row:
    """Say what came of a relaxation; docs/relaxation.md explains the keys."""
    final = relaxed.final
    return {
        "file": crystal.file,
        "index": crystal.index,
        "formula": crystal.as_atoms().get_chemical_formula(),
        "n_atoms": len(final.numbers),
        "converged": relaxed.converged,
        "failed": relaxed.failed,
        "reason": relaxed.reason,
        "steps": relaxed.n_steps,
        "fmax": number_or_none(relaxed.fmax),
        "energy": number_or_none(relaxed.energy),
        "energy_per_atom": number_or_none(relaxed.energy / len(final.numbers)),
        "volume": number_or_none(final.volume),
        "volume_change": number_or_none(relaxed.volume_change),
        "pressure": number_or_none(-float(np.trace(final.stress)) / 3 / GPA),
        "functional": relaxed.functional,
        "energy_correction": relaxed.energy_correction,
        "energies": relaxed.energies.tolist(),
        "fmaxs": relaxed.fmaxs.tolist(),
    }


def _described(relaxed: Relaxed, held: NDArray[np.bool_]) -> Atoms:
    """Give the final crystal as ASE takes it, and what it is."""
    atoms = relaxed.as_atoms()
    if held.any():
        atoms.set_constraint(FixAtoms(mask=held))
    atoms.info = {
        "converged": relaxed.converged,
        "reason": relaxed.reason,
        "steps": relaxed.n_steps,
        "functional": relaxed.functional,
        "energy_correction": relaxed.energy_correction,
    }
    return atoms


class _Path(NamedTuple):
    """Where the steps of a crystal are written, and what they depend on."""

    file: Path
    run: str


def _paths(
    folder: Path | None, starts: Mapping[Key, str], dependencies: Mapping[str, Any]
) -> dict[Key, _Path]:
    """Name the files of steps; raise InputError where one has the steps of something else."""
    paths: dict[Key, _Path] = {}
    if folder is not None:
        for key, start in starts.items():
            digest = hashlib.sha256(json.dumps([start, dependencies]).encode()).hexdigest()
            path = paths[key] = _Path(trajectory_path(folder, key), f"sha256:{digest[:16]}")
            if not path.file.is_file() or path.run not in _first_lines(path.file):
                refuse_existing([path.file])
    return paths


def _first_lines(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline() + file.readline()


def _write_path(path: _Path, key: Key, relaxed: Relaxed) -> None:
    """Write every step of a crystal."""
    frames = [step.as_atoms() for step in relaxed.path]
    for number_of_step, (atoms, fmax) in enumerate(zip(frames, relaxed.fmaxs.tolist(), strict=True)):
        atoms.info = {"file": one_line(key[0]), "index": key[1], "step": number_of_step, "fmax": fmax}
    frames[0].info["run"] = path.run
    write_atomically(path.file, to_extxyz(frames))
