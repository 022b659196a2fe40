"""Crystals that are being relaxed, as tensors: some may leave and others join."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.graph import Output, Systems
from fastchgnet.sim.relax.cell_filter import CellFilter, Geometry, Kind
from fastchgnet.sim.relax.fire import Fire, Vector, at_rest


class AtomRows(NamedTuple):
    """What there is of each of A atoms; float64 but for `mobile`."""

    coordinate: Tensor  # [A, 3]
    velocity: Tensor  # [A, 3]
    mobile: Tensor  # [A, 1] bool
    # of the last sound step
    position: Tensor  # [A, 3] A
    forces: Tensor  # [A, 3] eV/A
    magmoms: Tensor  # [A] mu_B


class SystemRows(NamedTuple):
    """What there is of each of S crystals; float64."""

    start: Tensor  # [S, 3, 3] cell at the start, A
    free: Tensor  # [S, 3, 3] which components of the deformation may change, 0 or 1
    n_atoms: Tensor  # [S]
    coordinate: Tensor  # [S, 3, 3]
    velocity: Tensor  # [S, 3, 3]
    time_step: Tensor  # [S]
    mixing: Tensor  # [S]
    n_downhill: Tensor  # [S]
    # of the last sound step
    cell: Tensor  # [S, 3, 3] A
    energy: Tensor  # [S] eV
    stress: Tensor  # [S, 3, 3] eV/A^3


@dataclass(frozen=True, slots=True)
class State:
    """S crystals, and on the host which they are and what their steps have been."""

    atoms: AtomRows
    systems: SystemRows
    index: NDArray[np.int64]  # [S] which of all crystals
    n_atoms: NDArray[np.int64]  # [S]
    n_evaluated: NDArray[np.int64]  # [S] sound steps
    history: NDArray[np.float64]  # [S, at least max n_evaluated, 2] energy and fmax of each

    @classmethod
    def new(cls, systems: Systems, mobile: Tensor, free: Tensor, index: NDArray[np.int64]) -> State:
        """Begin with crystals at rest, whose energy is not known.

        Args:
            systems: the crystals.
            mobile: which atoms may move, [A] bool.
            free: which components of the deformation may change, [3, 3].
            index: which of all crystals they are, [S].
        """
        position, cell = systems.position, systems.cell
        unknown = torch.full_like
        origin = Vector(position, torch.zeros_like(cell))
        fire = at_rest(origin)
        periodic = systems.pbc.all(1)[:, None, None]
        n_atoms = np.array(systems.n_atoms, dtype=np.int64)
        return cls(
            AtomRows(
                coordinate=position,
                velocity=fire.velocity.atoms,
                mobile=mobile[:, None],
                position=position,
                forces=unknown(position, torch.nan),
                magmoms=unknown(position[:, 0], torch.nan),
            ),
            SystemRows(
                start=cell,
                free=torch.where(periodic, free, 0.0),
                n_atoms=torch.from_numpy(n_atoms).to(cell),
                coordinate=origin.cells,
                velocity=fire.velocity.cells,
                time_step=fire.time_step,
                mixing=fire.mixing,
                n_downhill=fire.n_downhill,
                cell=cell,
                energy=unknown(cell[:, 0, 0], torch.nan),
                stress=unknown(cell, torch.nan),
            ),
            index,
            n_atoms,
            np.zeros(len(index), np.int64),
            np.zeros((len(index), 0, 2)),
        )

    def __len__(self) -> int:
        """Number of crystals."""
        return len(self.index)

    @property
    def coordinates(self) -> Vector:
        """Where the crystals are."""
        return Vector(self.atoms.coordinate, self.systems.coordinate)

    @property
    def fire(self) -> Fire:
        """What the optimizer knows."""
        rows = self.systems
        velocity = Vector(self.atoms.velocity, rows.velocity)
        return Fire(velocity, rows.time_step, rows.mixing, rows.n_downhill)

    def filter(self, kind: Kind, pressure: float) -> CellFilter:
        """Return what turns these coordinates into crystals."""
        rows = self.systems
        counts = torch.from_numpy(self.n_atoms)
        atom_system = torch.arange(len(self)).repeat_interleave(counts).to(rows.start.device)
        return CellFilter(kind, pressure, rows.start, rows.free, rows.n_atoms, atom_system)

    def moved(self, coordinates: Vector, fire: Fire) -> State:
        """Return the state after a step of the optimizer."""
        return self._with(
            self.atoms._replace(coordinate=coordinates.atoms, velocity=fire.velocity.atoms),
            self.systems._replace(
                coordinate=coordinates.cells,
                velocity=fire.velocity.cells,
                time_step=fire.time_step,
                mixing=fire.mixing,
                n_downhill=fire.n_downhill,
            ),
        )

    def evaluated(self, geometry: Geometry, output: Output) -> State:
        """Return the state that remembers this step as the last sound one."""
        return self._with(
            self.atoms._replace(
                position=geometry.position, forces=output.forces.double(), magmoms=output.magmoms.double()
            ),
            self.systems._replace(cell=geometry.cell, energy=output.energy, stress=output.stress.double()),
        )

    def recorded(self, energy: NDArray[np.float64], fmax: NDArray[np.float64]) -> State:
        """Return the state that has these energies and fmaxs, [S], in its history."""
        history, longest = self.history, int(self.n_evaluated.max(initial=0))
        if longest == history.shape[1]:
            history = np.concatenate([history, np.zeros((len(self), longest + 16, 2))], axis=1)
        history[np.arange(len(self)), self.n_evaluated] = np.stack([energy, fmax], axis=1)
        return State(self.atoms, self.systems, self.index, self.n_atoms, self.n_evaluated + 1, history)

    def select(self, chosen: NDArray[np.bool_]) -> State:
        """Take some of the crystals, [S] bool."""
        device = self.systems.start.device
        systems = torch.from_numpy(chosen).to(device)
        atoms = torch.from_numpy(np.repeat(chosen, self.n_atoms)).to(device)
        return State(
            AtomRows(*(rows[atoms] for rows in self.atoms)),
            SystemRows(*(rows[systems] for rows in self.systems)),
            self.index[chosen],
            self.n_atoms[chosen],
            self.n_evaluated[chosen],
            self.history[chosen],
        )

    def join(self, *others: State) -> State:
        """Put other crystals behind these."""
        all_ = (self, *others)
        n_steps = max(one.history.shape[1] for one in all_)
        histories = [
            np.pad(one.history, ((0, 0), (0, n_steps - one.history.shape[1]), (0, 0))) for one in all_
        ]
        return State(
            AtomRows(*map(_joined, *(one.atoms for one in all_))),
            SystemRows(*map(_joined, *(one.systems for one in all_))),
            np.concatenate([one.index for one in all_]),
            np.concatenate([one.n_atoms for one in all_]),
            np.concatenate([one.n_evaluated for one in all_]),
            np.concatenate(histories),
        )

    def _with(self, atoms: AtomRows, systems: SystemRows) -> State:
        return State(atoms, systems, self.index, self.n_atoms, self.n_evaluated, self.history)


def _joined(*rows: Tensor) -> Tensor:
    return torch.cat(rows)
