"""The folder of a simulation: a trajectory and a log for each crystal, and the state to go on from.

`restart.safetensors` is written now and then, atomically, and says how long each of the other files was.
Going on cuts them back to that length, so that whenever a run is killed, no frame is there twice and none is
missing.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from fastchgnet.config import Config
from fastchgnet.data.layout import one_line
from fastchgnet.errors import InputError
from fastchgnet.files import write_atomically
from fastchgnet.sim.charges import ChargeTable
from fastchgnet.sim.md.integrators import PER_ATOM, State
from fastchgnet.sim.md.loop import Lost, MolecularDynamics, Snapshot
from fastchgnet.sim.outputs import plain_name
from fastchgnet.units import GPA
from fastchgnet.weights import CHECKSUM, check, checksum

RESTART = "restart.safetensors"

COLUMNS = (
    "step",
    "time_ps",
    "potential_ev",
    "kinetic_ev",
    "total_ev",
    "conserved_ev",
    "temperature_k",
    "pressure_gpa",
    "volume_a3",
    "drift_mev_per_atom_per_ps",
    "ms_per_step",
)
"""Of a log. The drift is the slope of the conserved energy until then, the time that of all crystals."""

_SAVE_SECONDS = 30.0
_SAVE_SHARE = 0.05
"""A state is saved after this time, or so much that saving takes no larger share of it."""


@dataclass(frozen=True, slots=True)
class Member:
    """What is known of a crystal of a run before it runs."""

    name: str  # of its files
    file: str
    index: int  # of the frame in its file
    formula: str
    n_atoms: int
    temperature: float  # K
    replica: int

    def trajectory(self, folder: Path) -> Path:
        """The trajectory of this crystal in the folder of its run."""
        return folder / f"{self.name}.extxyz"

    def log(self, folder: Path) -> Path:
        """The log of this crystal in the folder of its run."""
        return folder / f"{self.name}.csv"


class Sums:
    """Sums over the rows of each log, of which means and drifts are made without the rows."""

    _FIELDS = ("n", "t", "tt", "e", "te", "kelvin", "pressure", "start", "charged")

    def __init__(self, table: NDArray[np.float64]) -> None:
        self.table = table  # [members, 9]

    @classmethod
    def empty(cls, n_members: int) -> Sums:
        """No rows yet."""
        return cls(np.zeros((n_members, len(cls._FIELDS))))

    def add(self, snapshot: Snapshot, picoseconds: float, is_charged: bool) -> None:
        """Add a row; energies count from that of the first one, as a slope does not care."""
        row = self.table[snapshot.number]
        if row[0] == 0:
            row[7] = snapshot.conserved
        energy = snapshot.conserved - row[7]
        t = picoseconds
        row[:7] += (1, t, t * t, energy, t * energy, snapshot.temperature, snapshot.pressure / GPA)
        row[8] += is_charged

    def drift(self, number: int, n_atoms: int) -> float:
        """Slope of the conserved energy by least squares, meV/atom/ps; NaN of fewer than two rows."""
        n, t, tt, e, te = self.table[number, :5]
        spread = n * tt - t * t
        return 1000 * (n * te - t * e) / spread / n_atoms if spread > 0 else math.nan

    def means(self, number: int) -> tuple[float, float]:
        """Mean temperature, K, and pressure, GPa; NaN without rows."""
        n, kelvin, pressure = self.table[number, [0, 5, 6]]
        return (kelvin / n, pressure / n) if n else (math.nan, math.nan)

    def counts(self, number: int) -> tuple[int, int]:
        """Rows, and how many of their crystals have charges."""
        return int(self.table[number, 0]), int(self.table[number, 8])


class _Header(Config):
    """What a saved state has beside tensors."""

    options: dict[str, Any]
    sizes: dict[str, NonNegativeInt]  # of files, bytes
    members: list[int]
    lost: list[tuple[int, int, str]]


class RunFolder:
    """Write the files of a run.

    Args:
        folder: where they are.
        members: the crystals, by number.
        options: all that the trajectories depend on, as JSON takes it.
        charges: how charges are assigned, if they are.
    """

    def __init__(
        self,
        folder: Path,
        members: Sequence[Member],
        options: Mapping[str, Any],
        charges: ChargeTable | None = None,
    ) -> None:
        self.folder, self.members, self.charges = folder, members, charges
        self.options = json.loads(json.dumps(options))
        self.sums = Sums.empty(len(members))
        self._sizes: dict[str, int] = {}
        self._n_lost = 0  # whose last frames are written
        self._saved_at, self._save_seconds = time.monotonic(), 0.0

    def trajectory(self, number: int) -> Path:
        """The trajectory of a crystal."""
        return self.members[number].trajectory(self.folder)

    def log(self, number: int) -> Path:
        """The log of a crystal."""
        return self.members[number].log(self.folder)

    def begin(self, dynamics: MolecularDynamics) -> None:
        """Start files, which must not exist, with the frames before the first step.

        Raises:
            InputError: the folder or the disk does not take them.
        """
        self._sizes = {
            file(n).name: 0 for n in range(len(self.members)) for file in (self.log, self.trajectory)
        }
        self.save(dynamics)  # from now on they are this run's, wherever it is killed
        self._start(dynamics)

    def _start(self, dynamics: MolecularDynamics) -> None:
        for number in range(len(self.members)):
            self._write(self.log(number), ",".join(COLUMNS) + "\n")
        self.record(dynamics, math.nan)
        self.save(dynamics)

    def record(self, dynamics: MolecularDynamics, ms_per_step: float) -> None:
        """Append the frames of this step, and the last ones of those that have left since.

        Raises:
            InputError: the disk does not take them.
        """
        self.record_lost(dynamics)
        for snapshot in dynamics.snapshots():
            self._append(snapshot, dynamics, ms_per_step)

    def record_lost(self, dynamics: MolecularDynamics) -> None:
        """Append the last good frames of those that have left since, unless they are there."""
        for lost in dynamics.lost[self._n_lost :]:
            if lost.last is not None and lost.step % self.options["interval"]:
                self._append(lost.last, dynamics, math.nan)
        self._n_lost = len(dynamics.lost)

    def save_if_due(self, dynamics: MolecularDynamics) -> None:
        """Save the state if the last time is some while ago."""
        if time.monotonic() - self._saved_at > max(_SAVE_SECONDS, self._save_seconds / _SAVE_SHARE):
            self.save(dynamics)

    def save(self, dynamics: MolecularDynamics) -> None:
        """Save the state from which the run can go on, with all frames so far.

        Raises:
            InputError: the disk does not take it; the state before it is still there.
        """
        start = time.monotonic()
        for name in self._sizes:
            with (self.folder / name).open("ab") as file:
                os.fsync(file.fileno())
        # copies, as fields of a first state may share their zeros
        tensors = {name: t.cpu().contiguous().clone() for name, t in dynamics.state._asdict().items()}
        tensors["sums"] = torch.from_numpy(self.sums.table)
        header = {
            "options": self.options,
            "sizes": self._sizes,
            "members": dynamics.members,
            "lost": [lost[:3] for lost in dynamics.lost],
        }
        metadata = {"run": json.dumps(header)}
        metadata[CHECKSUM] = checksum(tensors, metadata)
        write_atomically(self.folder / RESTART, to_safetensors(tensors, metadata))
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - start

    def resume(self, dynamics: MolecularDynamics) -> None:
        """Put the saved state into `dynamics`, and cut files back to it.

        Raises:
            InputError: there is none, it belongs to other options, or a file has lost frames.
        """
        path = self.folder / RESTART
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in (*State._fields, "sums")}
            check(tensors, metadata)
            header = _Header.model_validate_json(metadata["run"])
            state = State(*(tensors[name] for name in State._fields))
            table = tensors["sums"].numpy().copy()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: damaged, or not the state of a run ({one_line(error)})") from error
        if differing := _difference(header.options, self.options):
            raise InputError(f"{self.folder}: cannot go on with other options: {differing}")
        numbers = range(len(self.members))
        if set(header.sizes) != {file(n).name for n in numbers for file in (self.log, self.trajectory)}:
            raise InputError(f"{self.folder}: cannot go on with crystals of other names")
        n_atoms = sum(member.n_atoms for n, member in enumerate(self.members) if n in header.members)
        if (
            sorted([*header.members, *(lost[0] for lost in header.lost)]) != list(numbers)
            or not _fits(state, dynamics.state, len(header.members), n_atoms)
            or table.shape != self.sums.table.shape
        ):
            raise InputError(f"{path}: damaged, or not the state of this run")
        for name, size in header.sizes.items():
            self._cut(self.folder / name, size)
        self._sizes, self.sums = dict(header.sizes), Sums(table)
        self._n_lost = len(header.lost)
        lost = [Lost(number, step, reason, None) for number, step, reason in header.lost]
        dynamics.restore(state, header.members, lost)
        if not any(self._sizes.values()):
            self._start(dynamics)

    @staticmethod
    def _cut(path: Path, size: int) -> None:
        try:
            with path.open("r+b") as file:
                if file.seek(0, os.SEEK_END) < size:
                    raise InputError(f"{path}: shorter than when the state was saved; start anew elsewhere")
                file.truncate(size)
        except OSError as error:
            raise InputError(f"{path}: cannot go on with it ({error.strerror or error})") from error

    def _append(self, snapshot: Snapshot, dynamics: MolecularDynamics, ms_per_step: float) -> None:
        atoms, provenance = snapshot.as_atoms(), dynamics.potential.provenance
        picoseconds = snapshot.step * dynamics.settings.timestep / 1000
        atoms.info = {
            "step": snapshot.step,
            "time_ps": round(picoseconds, 9),
            "functional": provenance.functional,
            "energy_correction": provenance.energy_correction,
        }
        states = None
        if self.charges is not None:
            states = self.charges.assign(atoms.numbers, snapshot.magmoms)
        if states is not None:
            atoms.set_initial_charges(states)
            atoms.info["total_charge"] = float(states.sum())
        self.sums.add(snapshot, picoseconds, states is not None)
        row = (
            picoseconds,
            snapshot.energy,
            snapshot.kinetic,
            snapshot.energy + snapshot.kinetic,
            snapshot.conserved,
            snapshot.temperature,
            snapshot.pressure / GPA,
            snapshot.volume if atoms.pbc.all() else math.nan,
            self.sums.drift(snapshot.number, len(atoms)),
            ms_per_step,
        )
        text = io.StringIO()
        ase.io.write(text, atoms, format="extxyz")
        self._write(self.trajectory(snapshot.number), text.getvalue())
        values = ("" if math.isnan(value) else f"{value:.10g}" for value in row)
        self._write(self.log(snapshot.number), ",".join([str(snapshot.step), *values]) + "\n")

    def _write(self, path: Path, text: str) -> None:
        try:
            with path.open("ab") as file:
                self._sizes[path.name] += file.write(text.encode())
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def read_log(path: Path, rows: Iterable[int] | None = None) -> dict[str, list[float]]:
    """Return the columns of a log, or those of some of its rows; a value that is not there is NaN."""
    with path.open(encoding="utf-8") as file:
        file.readline()
        lines: Iterable[str] = file
        if rows is not None:
            kept = set(rows)
            lines = (line for number, line in enumerate(file) if number in kept)
        table = [[float(value or "nan") for value in line.rstrip("\n").split(",")] for line in lines]
    return {name: [row[place] for row in table] for place, name in enumerate(COLUMNS)}


def file_name(number: int, file: str, temperature: float) -> str:
    """Name the files of a crystal: its number makes it unique, the rest helps people."""
    return f"{number:03d}-{plain_name(Path(file).stem)}-{temperature:g}K"


def _fits(state: State, like: State, n_systems: int, n_atoms: int) -> bool:
    """Tell whether a state has the shapes and precisions of another, but for so many systems and atoms."""
    for name, values, others in zip(State._fields, state, like, strict=True):
        rows = [] if name == "step" else [n_atoms if name in PER_ATOM else n_systems]
        if values.dtype != others.dtype or list(values.shape) != rows + list(others.shape[1:]):
            return False
    return int(state.step) >= 0


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Name an option that differs."""
    for name in here:
        if there.get(name) != here[name]:
            if isinstance(here[name], list | dict):
                return f"{name} is another there"
            return f"{name} is {there.get(name)} there and {here[name]} here"
    return None
