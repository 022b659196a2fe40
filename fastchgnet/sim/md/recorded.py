"""Steps of molecular dynamics whose shapes never change: recorded once, then replayed with one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastchgnet.graph import Output
from fastchgnet.record import Record, Recorder
from fastchgnet.sim.fixed import FixedSystems
from fastchgnet.sim.md.ensemble import temperature_of
from fastchgnet.sim.md.integrators import Bath, State, Step, kinetic_energy
from fastchgnet.sim.md.noise import Noise

MAX_TEMPERATURE = 1e5
"""K; no crystal is that hot, but simulations that explode are."""


class RecordedSteps:
    """Take steps on a state that stays where it is, with graphs that are built there too.

    Whether all went well is a flag on the device; nobody looks at it before the last step.

    Args:
        systems: what moves.
        bath: of the systems.
        step: the integrator.
        record: makes recordings.
    """

    def __init__(self, systems: FixedSystems, bath: Bath, step: Step, record: Record) -> None:
        self._systems, self._bath, self._step = systems, bath, step
        self._recorder = Recorder(self._once, bath.kT.device, record)
        self._state: State | None = None
        self._is_sound = torch.ones((), dtype=torch.bool, device=bath.kT.device)

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
        output, is_sound = self._systems.evaluate(position, cell)
        self._is_sound.logical_and_(is_sound)
        return output
