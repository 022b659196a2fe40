"""FIRE, the fast inertial relaxation engine, for many systems at once.

Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006), step by step as ASE's `FIRE`, with its defaults: every
system has a time step, a mixing and a velocity of its own, and stops at once where it would run uphill.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FIRST_TIME_STEP, LONGEST_TIME_STEP = 0.1, 1.0
FIRST_MIXING, MIXING_DECAY = 0.1, 0.99
SPEED_UP, SLOW_DOWN = 1.1, 0.5
PATIENCE = 5
"""Steps downhill before the time step grows."""
LONGEST_STEP = 0.2
"""Length, at most, of the step of a whole system in all its coordinates, A."""


class Vector(NamedTuple):
    """A vector of the coordinates of S systems: three for each of A atoms, and nine for each cell."""

    atoms: Tensor  # [A, 3]
    cells: Tensor  # [S, 3, 3]

    def dot(self, other: Vector, atom_start: Tensor) -> Tensor:
        """Multiply the vectors of each system, [S]."""
        return per_system((self.atoms * other.atoms).sum(1), "sum", atom_start) + (
            self.cells * other.cells
        ).sum((1, 2))

    def longest(self, atom_start: Tensor) -> Tensor:
        """Find the longest row of three of each system, [S]: ASE's fmax where these are forces."""
        atoms = per_system(torch.linalg.vector_norm(self.atoms, dim=1), "max", atom_start)
        return torch.maximum(atoms, torch.linalg.vector_norm(self.cells, dim=2).amax(1))


class Fire(NamedTuple):
    """State of S systems between two steps."""

    velocity: Vector
    time_step: Tensor  # [S]
    mixing: Tensor  # [S]
    n_downhill: Tensor  # [S] float64; steps since the last stop, -1 before the first step


def at_rest(vector: Vector) -> Fire:
    """Begin with systems that have the coordinates of `vector`."""
    ones = vector.cells.new_ones(len(vector.cells))
    velocity = Vector(torch.zeros_like(vector.atoms), torch.zeros_like(vector.cells))
    return Fire(velocity, FIRST_TIME_STEP * ones, FIRST_MIXING * ones, -ones)


def fire_step(fire: Fire, force: Vector, atom_start: Tensor, atom_system: Tensor) -> tuple[Fire, Vector]:
    """Return the next state and the change of the coordinates.

    Args:
        fire: the state.
        force: minus the derivative of what is minimized.
        atom_start: first atom of each system, and A, [S + 1].
        atom_system: the system of each atom, [A].
    """

    def combine(a: Tensor, left: Vector, b: Tensor, right: Vector) -> Vector:
        """Add a left and b right, with factors of each system."""
        a_atom, b_atom = a[atom_system, None], b[atom_system, None]
        cells = a[:, None, None] * left.cells + b[:, None, None] * right.cells
        return Vector(a_atom * left.atoms + b_atom * right.atoms, cells)

    velocity, time_step, mixing, n_downhill = fire
    power = velocity.dot(force, atom_start)
    first = n_downhill < 0
    downhill = (power > 0) & ~first
    stops = ~downhill & ~first

    speed, strength = velocity.dot(velocity, atom_start).sqrt(), force.dot(force, atom_start).sqrt()
    turn = torch.where(downhill, mixing * speed / strength, 0.0)
    kept = torch.where(downhill, 1 - mixing, 0.0)
    patient = downhill & (n_downhill > PATIENCE)
    grown = (time_step * SPEED_UP).clamp(max=LONGEST_TIME_STEP)
    time_step = torch.where(patient, grown, torch.where(stops, time_step * SLOW_DOWN, time_step))
    mixing = torch.where(patient, mixing * MIXING_DECAY, torch.where(stops, FIRST_MIXING, mixing))
    n_downhill = torch.where(downhill, n_downhill + 1, 0.0)

    velocity = combine(kept, velocity, turn + time_step, force)
    length = velocity.dot(velocity, atom_start).sqrt() * time_step
    scale = torch.where(length > LONGEST_STEP, LONGEST_STEP / length, 1.0) * time_step
    step = Vector(scale[atom_system, None] * velocity.atoms, scale[:, None, None] * velocity.cells)
    return Fire(velocity, time_step, mixing, n_downhill), step


def per_system(values: Tensor, how: str, atom_start: Tensor) -> Tensor:
    """Sum ("sum") or compare ("max") values of atoms [A] in their order, for each system, [S]."""
    return torch.segment_reduce(values, how, offsets=atom_start, unsafe=True)
