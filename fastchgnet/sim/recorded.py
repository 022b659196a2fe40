"""Steps of molecular dynamics whose shapes never change: recorded once, then replayed with one call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastchgnet.data.frame import MIN_DISTANCE
from fastchgnet.device_graph import build_graph, count_candidates, spare_systems
from fastchgnet.graph import Batch, Output, Systems
from fastchgnet.neighbors import squared_length
from fastchgnet.padding import Capacity, rows_of
from fastchgnet.potential import Potential
from fastchgnet.sim.ensemble import temperature_of
from fastchgnet.sim.integrators import Bath, State, Step, kinetic_energy
from fastchgnet.sim.noise import Noise
from fastchgnet.train.record import Record, Recorder

MAX_TEMPERATURE = 1e5
"""K; no crystal is that hot, but simulations that explode are."""

_SPARE_ROWS = {"short_bonds": 0.2, "long_bonds": 0.1, "angles": 0.4}
"""Rows to spare for a graph that changes as atoms move, relative to those of now."""

_SPARE_CANDIDATES = 0.3
"""As above, for candidate pairs, whose number follows the cell."""


class RecordedSteps:
    """Take steps on a state that stays where it is, with graphs that are built there too.

    Whether all went well is a flag on the device; nobody looks at it before the last step.

    Args:
        potential: the model.
        bath: of the systems.
        step: the integrator.
        record: makes recordings.
    """

    def __init__(self, potential: Potential, bath: Bath, step: Step, record: Record) -> None:
        self._potential, self._bath, self._step = potential, bath, step
        self._recorder = Recorder(self._once, record)
        self._state: State | None = None
        self._is_sound = torch.ones((), dtype=torch.bool, device=potential.device)

    def make_room(self, systems: Systems, batch: Batch) -> None:
        """Reserve arrays for systems, given on the host, whose graph is `batch` now."""
        rows = rows_of(batch)
        spare = {
            name: getattr(rows, name) + math.ceil(share * getattr(rows, name)) + 64
            for name, share in _SPARE_ROWS.items()
        }
        # some ghosts, over which those of the other rows are spread
        self._capacity = Capacity(rows.systems + 1, rows.atoms + max(8, rows.atoms // 16), **spare)
        self._systems = spare_systems(systems, *self._capacity[:2]).to(self._potential.device)
        sizes = torch.tensor(systems.n_atoms).numpy()
        candidates = count_candidates(
            systems.cell, systems.pbc, sizes, self._potential.config.atom_cutoff
        ).sum()
        self._n_candidates = math.ceil((1 + _SPARE_CANDIDATES) * int(candidates))

    def take(self, state: State, noise: Noise | None, steps: Sequence[int]) -> State | None:
        """Take steps of these numbers from a state, and return the last; None where one went wrong."""
        if self._state is None:
            self._state = State(*(tensor.clone() for tensor in state))
        else:
            torch._foreach_copy_(list(self._state), list(state))
        self._is_sound.fill_(True)
        nothing = state.position[:0]
        for step in steps:
            self._recorder("step", [nothing if noise is None else noise.at(step)])
        if not self._is_sound.item():
            return None
        return State(*(tensor.clone() for tensor in self._state))

    def _once(self, shapes: str, inputs: Sequence[Tensor]) -> Tensor:
        """Take one step, in place."""
        assert self._state is not None
        new = self._step(self._state, self._bath, self._forces, inputs[0])
        kelvin = temperature_of(kinetic_energy(new.velocity, self._bath), self._bath)
        self._is_sound.logical_and_((new.energy.isfinite() & (kelvin <= MAX_TEMPERATURE)).all())
        for old, value in zip(self._state, new, strict=True):
            if old is not value:
                old.copy_(value)
        return self._is_sound

    def _forces(self, position: Tensor, cell: Tensor) -> Output:
        """Evaluate systems on a graph that is built on the device."""
        spare = self._systems
        moved = dataclasses.replace(
            spare,
            position=torch.cat([position, spare.position[len(position) :]]),
            cell=torch.cat([cell, spare.cell[len(cell) :]]),
        )
        config = self._potential.config
        cutoffs = (config.atom_cutoff, config.bond_cutoff)
        batch, fits = build_graph(moved, *cutoffs, self._capacity, self._n_candidates)
        is_apart = squared_length(batch.bond_vector).min() >= MIN_DISTANCE**2
        self._is_sound.logical_and_(fits & is_apart)
        output = self._potential(batch)
        n_systems, n_atoms = len(cell), len(position)
        return Output(
            energy=output.energy[:n_systems],
            forces=output.forces[:n_atoms],
            stress=output.stress[:n_systems],
            magmoms=output.magmoms[:n_atoms],
            site_energies=output.site_energies[:n_atoms],
        )
