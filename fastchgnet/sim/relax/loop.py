"""Relaxation of many crystals at once: they leave the batch when they are done, and others take their place.

Every crystal takes the steps that ASE's `FIRE` takes on its `FrechetCellFilter`, whoever else is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.device import own_settings
from fastchgnet.graph import Systems
from fastchgnet.neighbors import graph_sizes
from fastchgnet.potential import Potential
from fastchgnet.prediction import sound_systems
from fastchgnet.sim.calculator import DIRECT
from fastchgnet.sim.constraints import fixed_atoms
from fastchgnet.sim.moving import MovingSystems, Unsound
from fastchgnet.sim.relax.cell_filter import CellFilter, CellMode
from fastchgnet.sim.relax.fire import Vector, fire_step
from fastchgnet.sim.relax.result import CONVERGED, OUT_OF_STEPS, Relaxed, Settings, Step
from fastchgnet.sim.relax.room import Room, needed_bytes
from fastchgnet.sim.relax.state import State

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

VOLUME_RANGE = (0.1, 10.0)
"""Volumes, relative to that at the start, between which a relaxation goes on.

A cell that collapses has more and more neighbours, until they no longer fit in memory.
"""

CHUNK = 256
"""Waiting crystals whose neighbours are counted at a time."""


def relax(
    potential: Potential,
    structures: Sequence[Atoms | Structure],
    settings: Settings | None = None,
    batch_size: int | None = None,
) -> list[Relaxed]:
    """Relax crystals, and return them in their order; see `relax_each`."""
    done = relax_each(potential, structures, settings, batch_size)
    return sorted(done, key=lambda relaxed: relaxed.index)


def relax_each(
    potential: Potential,
    structures: Sequence[Atoms | Structure],
    settings: Settings | None = None,
    batch_size: int | None = None,
) -> Iterator[Relaxed]:
    """Relax crystals, and yield each as soon as it is done.

    A cell that is not periodic in three directions stays as it is. Atoms that ASE's FixAtoms or pymatgen's
    selective dynamics hold stay where they are in their cell.

    Args:
        potential: the model, on the device where it shall run.
        structures: ase Atoms or pymatgen Structures.
        settings: how; by default cell and atoms, to 0.05 eV/A, in at most 500 steps.
        batch_size: crystals in a batch, at most; by default as many as are fast and fit in memory.

    Raises:
        InputError: a structure is no crystal, or has constraints of another kind. Names its index.
    """
    systems = sound_systems(structures)
    held = [fixed_atoms(structure, f"structure {index}") for index, structure in enumerate(structures)]
    relaxation = Relaxation(potential, systems, held, settings or Settings(), Room.of(potential, batch_size))
    while not relaxation.finished:
        yield from relaxation.step()


class Relaxation:
    """Crystals that are being relaxed.

    Args:
        potential: the model, on the device where it shall run.
        systems: the crystals, on the host, known to be sound.
        held: which atoms of each stay where they are in its cell, [n] bool.
        settings: how to relax.
        room: how much goes into a batch.
        keep_paths: whether results hold all their steps.
    """

    # the crystals in the batch
    _state: State
    _filter: CellFilter
    _atom_start: Tensor
    _moving: MovingSystems

    @own_settings
    def __init__(
        self,
        potential: Potential,
        systems: Systems,
        held: Sequence[NDArray[np.bool_]],
        settings: Settings,
        room: Room,
        keep_paths: bool = False,
    ) -> None:
        if potential.heads is not None and systems.n_systems:
            warnings.warn(DIRECT, stacklevel=3)
        self.potential = potential.eval()
        self.systems = systems
        self.settings = settings
        self.n_crystal_steps = 0  # of all crystals together
        self._mode = CellMode.of(settings.cell)
        self._room = room
        self._mobile = [torch.from_numpy(~fixed) for fixed in held]
        self._n_entered = 0
        self._need = np.zeros(systems.n_systems)  # bytes
        self._n_counted = 0
        self._first_atom = np.cumsum([0, *systems.n_atoms])
        self._parked: list[State] = []  # crystals that had to leave when memory was short
        self._paths: dict[int, list[Step]] | None = {} if keep_paths else None
        none = systems.subset([])
        self._moving = MovingSystems(potential, none)
        self._regroup(self._enter_state(range(0)), range(0), none)

    @property
    def finished(self) -> bool:
        """Whether every crystal is done."""
        return not len(self._state) and not self._parked and self._n_entered == self.systems.n_systems

    @own_settings
    def step(self) -> list[Relaxed]:
        """Take a step of every crystal in the batch, and return those that are done."""
        self._fill()
        failed: list[Relaxed] = []
        while len(self._state):
            short_of_memory = False
            try:
                force, numbers = self._evaluate()
            except Unsound as error:
                failed += self._leave(error.reasons)
            except torch.OutOfMemoryError:
                short_of_memory = True  # the error holds what the step had taken, until it is forgotten
            else:
                self._record(numbers)
                self._move(force)
                return failed + self._leave(self._ends(numbers))
            if short_of_memory:
                failed += self._park()
        return failed

    def _evaluate(self) -> tuple[Vector, NDArray[np.float64]]:
        """Return the force on all coordinates; and energy, fmax and relative volume of each crystal, [S, 3].

        Raises:
            Unsound: for crystals that are none, or of which the model says nothing.
        """
        state, cells = self._state, self._filter
        geometry = cells.geometry(state.coordinates)
        output = self._moving.evaluate(geometry.position, geometry.cell)
        forces = torch.where(state.atoms.mobile, output.forces.double(), 0.0)
        force = cells.force(state.coordinates, geometry, forces, output.stress.double())
        fmax = force.longest(self._atom_start)
        columns = (output.energy, fmax, torch.linalg.det(geometry.deformation))
        numbers = torch.stack(columns, dim=1).cpu().numpy()
        unknown = np.flatnonzero(~np.isfinite(numbers).all(1))
        if len(unknown):
            raise Unsound(dict.fromkeys(unknown.tolist(), "the model's prediction is not finite"))
        self._state = state.evaluated(geometry, output)
        return force, numbers

    def _record(self, numbers: NDArray[np.float64]) -> None:
        """Remember the step."""
        self._state = self._state.recorded(numbers[:, 0], numbers[:, 1])
        if self._paths is not None:
            for index, step in zip(self._state.index.tolist(), self._steps(self._state), strict=True):
                self._paths.setdefault(index, []).append(step)

    def _move(self, force: Vector) -> None:
        state = self._state
        fire, change = fire_step(state.fire, force, self._atom_start, self._filter.atom_system)
        coordinates = Vector(*(old + new for old, new in zip(state.coordinates, change, strict=True)))
        self._state = state.moved(self._filter.allowed(coordinates), fire)

    def _ends(self, numbers: NDArray[np.float64]) -> dict[int, str]:
        """Say which crystals are done, and why."""
        smallest, largest = VOLUME_RANGE
        fmax, volume = numbers[:, 1], numbers[:, 2]
        last = self._state.n_evaluated > self.settings.max_steps
        self.n_crystal_steps += int((self._state.n_evaluated > 1).sum())
        ends = {}
        for place in np.flatnonzero(
            last | (fmax < self.settings.fmax) | (volume < smallest) | (volume > largest)
        ):
            if fmax[place] < self.settings.fmax:
                ends[int(place)] = CONVERGED
            elif not smallest <= volume[place] <= largest:
                ends[int(place)] = f"the cell has {volume[place]:.3g} times its volume at the start"
            else:
                ends[int(place)] = OUT_OF_STEPS
        return ends

    def _leave(self, ends: Mapping[int, str]) -> list[Relaxed]:
        """Take crystals, by their place in the batch, out of it."""
        if not ends:
            return []
        leaving = np.isin(np.arange(len(self._state)), list(ends))
        gone = self._state.select(leaving)
        self._regroup(self._state.select(~leaving), np.flatnonzero(~leaving).tolist())
        reasons = [ends[place] for place in sorted(ends)]
        return [
            self._relaxed(gone, place, step, reason)
            for place, (step, reason) in enumerate(zip(self._steps(gone), reasons, strict=True))
        ]

    def _relaxed(self, gone: State, place: int, final: Step, reason: str) -> Relaxed:
        index, n_evaluated = int(gone.index[place]), gone.n_evaluated[place]
        start = abs(float(torch.linalg.det(self.systems.cell[index])))
        return Relaxed(
            index=index,
            final=final,
            energies=gone.history[place, :n_evaluated, 0].copy(),
            fmaxs=gone.history[place, :n_evaluated, 1].copy(),
            volume_change=final.volume / start - 1 if final.pbc.all() else np.nan,
            reason=reason,
            functional=self.potential.provenance.functional,
            energy_correction=self.potential.provenance.energy_correction,
            path=tuple(self._paths.pop(index, ())) if self._paths is not None else (),
        )

    def _steps(self, state: State) -> Iterator[Step]:
        """Bring the last sound step of crystals to the host."""
        counts = state.n_atoms.tolist()
        rows = (state.atoms.position, state.atoms.forces, state.atoms.magmoms)
        per_atom = zip(*(values.cpu().split(counts) for values in rows), strict=True)
        per_system = (state.systems.cell.cpu(), state.systems.energy.cpu(), state.systems.stress.cpu())
        for index, atoms, cell, energy, stress in zip(state.index, per_atom, *per_system, strict=True):
            numbers = self.systems.atomic_number[self._rows(int(index))]
            yield Step(
                numbers=numbers.numpy(),
                pbc=self.systems.pbc[index].numpy(),
                positions=atoms[0].numpy().copy(),
                cell=cell.numpy().copy(),
                energy=float(energy),
                forces=atoms[1].numpy().copy(),
                stress=stress.numpy().copy(),
                magmoms=atoms[2].numpy().copy(),
            )

    def _park(self) -> list[Relaxed]:
        """Halve the batch because memory was short; a crystal that is alone in it fails."""
        n_systems = len(self._state)
        if n_systems == 1:
            return self._leave({0: "it does not fit in the memory of the device"})
        torch.cuda.empty_cache()
        first = np.arange(n_systems) < n_systems // 2
        self._room = Room(self._need[self._state.index].sum() / 2, self._room.n_systems)
        self._parked.append(self._state.select(~first))
        self._regroup(self._state.select(first), range(n_systems // 2))
        return []

    def _fill(self) -> None:
        """Let crystals enter while there is room."""
        n_systems, n_bytes = len(self._state), float(self._need[self._state.index].sum())
        entering: list[State] = []
        while self._parked:
            parked = self._parked[-1]
            n_systems, n_bytes = n_systems + len(parked), n_bytes + self._need[parked.index].sum()
            if not self._room.fits(n_systems, n_bytes) and (entering or len(self._state)):
                break
            entering.append(self._parked.pop())
        first = self._n_entered
        while not self._parked and self._n_entered < self.systems.n_systems:
            n_systems, n_bytes = n_systems + 1, n_bytes + self._need_of(self._n_entered)
            if not self._room.fits(n_systems, n_bytes):
                break
            self._n_entered += 1
        if first < self._n_entered:
            entering.append(self._enter_state(range(first, self._n_entered)))
        if entering:
            kept = range(len(self._state))
            indices = [index for state in entering for index in state.index.tolist()]
            states = [self._state] if len(self._state) else []
            self._regroup(State.join(*states, *entering), kept, self.systems.subset(indices))

    def _enter_state(self, indices: Sequence[int]) -> State:
        """Make the state of some crystals that begin."""
        systems = self.systems.subset(indices).to(self.potential.device)
        mobile = torch.cat([torch.zeros(0, dtype=torch.bool), *(self._mobile[index] for index in indices)])
        free = self._mode.free().to(systems.cell.device)
        return State.new(systems, mobile.to(systems.cell.device), free, np.array(indices, dtype=np.int64))

    def _need_of(self, index: int) -> float:
        """Estimate the memory of a crystal, bytes."""
        if index >= self._n_counted:
            chunk = range(self._n_counted, min(index + CHUNK, self.systems.n_systems))
            config = self.potential.config
            sizes = graph_sizes(self.systems.subset(chunk), config.atom_cutoff, config.bond_cutoff)
            self._need[chunk.start : chunk.stop] = needed_bytes(sizes, self.potential.dtype)
            self._n_counted = chunk.stop
        return float(self._need[index])

    def _regroup(self, state: State, kept: Sequence[int], joining: Systems | None = None) -> None:
        """Make these the crystals of the batch: those in it that are `kept`, and others behind them."""
        self._state = state
        self._filter = state.filter(self._mode.kind, self.settings.pressure)
        self._atom_start = torch.from_numpy(np.concatenate([[0], state.n_atoms.cumsum()])).to(
            self.potential.device
        )
        self._moving = self._moving.exchange(kept, joining or self.systems.subset([]))

    def _rows(self, index: int) -> slice:
        """Where the atoms of a crystal are among all."""
        first = int(self._first_atom[index])
        return slice(first, first + self.systems.n_atoms[index])
