"""Time steps of molecular dynamics: functions from a state of S crystals with A atoms to the next one.

Every step asks for forces once, at the new positions and cells. All crystals take it together; nothing is
changed in place and nothing is looked at on the host.

Units are ASE's: eV, A, atomic mass units, and the time A sqrt(u/eV), 10.18 fs.

Symbols: K kinetic energy, n degrees of freedom, kT temperature, P pressure asked for, V volume, W the
barostat's mass, e its strain (log of the length of the cell), h and x the chains of thermostat and barostat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastchgnet.graph import Output

Forces = Callable[[Tensor, Tensor], Output]
"""From positions [A, 3] and cells [S, 3, 3] to what the potential says."""

CHAIN = 3
"""Thermostats in a Nose-Hoover chain."""


class State(NamedTuple):
    """All that the next step depends on, and the magnetic moments; float64 but for `step`."""

    step: Tensor  # int64 scalar, steps taken
    position: Tensor  # [A, 3] never wrapped into the cell
    velocity: Tensor  # [A, 3]
    cell: Tensor  # [S, 3, 3]
    energy: Tensor  # [S] potential energy
    forces: Tensor  # [A, 3]
    stress: Tensor  # [S, 3, 3]
    magmoms: Tensor  # [A]
    heat: Tensor  # [S] what Langevin's bath has taken, eV
    thermostat: Tensor  # [S, 3] h, the chain's coordinates
    thermostat_rate: Tensor  # [S, 3] dh/dt
    barostat: Tensor  # [S, 3] x
    barostat_rate: Tensor  # [S, 3] dx/dt
    strain_rate: Tensor  # [S] de/dt


PER_ATOM = frozenset({"position", "velocity", "forces", "magmoms"})
"""Fields of a state with a row for each atom; the others have one for each system, but for `step`."""


class Bath(NamedTuple):
    """What does not change: masses, and the surroundings of each system."""

    mass: Tensor  # [A, 1]
    hold: Tensor  # [S, 1] 1 / total mass; 0 where the centre of mass is free
    n_free: Tensor  # [S] degrees of freedom
    kT: Tensor  # [S]
    pressure: Tensor  # [S]
    atom_system: Tensor  # [A]
    system_start: Tensor  # [S + 1]
    atoms_each: int | None  # atoms of a system, where all have the same number
    timestep: float
    thermostat_time: float
    barostat_time: float


Step = Callable[[State, Bath, Forces, Tensor], State]
"""A step; the last argument are normal numbers, [A, 3], for those who need some."""


def velocity_verlet(state: State, bath: Bath, forces: Forces, noise: Tensor) -> State:
    """Step at constant energy (NVE): half a kick, a drift, half a kick."""
    velocity = _kicked(state.velocity, state, bath)
    new = _arrived(state, forces, torch.add(state.position, velocity, alpha=bath.timestep), state.cell)
    return new._replace(velocity=_kicked(velocity, new, bath))


def langevin(state: State, bath: Bath, forces: Forces, noise: Tensor) -> State:
    """Step at constant temperature (NVT) with friction and noise: BAOAB, doi:10.1063/1.4802990.

    With c = exp(-timestep / thermostat time), v <- c v + sqrt(1 - c^2) sqrt(kT / m) xi in the middle of the
    drift. Noise does not move the centre of mass: this is exact, as forces do not depend on it.
    """
    half = 0.5 * bath.timestep
    keep = math.exp(-bath.timestep / bath.thermostat_time)
    velocity = _kicked(state.velocity, state, bath)
    position = torch.add(state.position, velocity, alpha=half)
    before = kinetic_energy(velocity, bath)
    thermal = math.sqrt(1 - keep**2) * _per_atom(bath.kT[:, None], bath).div(bath.mass).sqrt() * noise
    velocity = at_rest(torch.add(thermal, velocity, alpha=keep), bath)
    heat = state.heat + before - kinetic_energy(velocity, bath)
    new = _arrived(state, forces, torch.add(position, velocity, alpha=half), state.cell)
    return new._replace(velocity=_kicked(velocity, new, bath), heat=heat)


def nose_hoover(state: State, bath: Bath, forces: Forces, noise: Tensor) -> State:
    """Step at constant temperature (NVT) with a Nose-Hoover chain, doi:10.1080/00268979600100761."""
    state, velocity, _ = _thermostatted(state, state.velocity, bath)
    velocity = _kicked(velocity, state, bath)
    position = torch.add(state.position, velocity, alpha=bath.timestep)
    new = _arrived(state, forces, position, state.cell)
    new, velocity, _ = _thermostatted(new, _kicked(velocity, new, bath), bath)
    return new._replace(velocity=velocity)


def martyna_tobias_klein(state: State, bath: Bath, forces: Forces, noise: Tensor) -> State:
    """Step at constant pressure and temperature (NPT) whose cell keeps its shape, doi:10.1063/1.467468.

    dr/dt = v + e' r, dv/dt = F / m - (1 + 3/n) e' v, W e'' = 3 V (P_now - P) + (3/n) 2K, with a chain for
    the atoms and one for the barostat; W = (n + 3) kT barostat_time^2.
    """
    dt = bath.timestep
    alpha = 1.0 + 3.0 / bath.n_free
    weight = (bath.n_free + 3.0) * bath.kT * bath.barostat_time**2
    state, velocity, twice_kinetic = _both_thermostatted(state, state.velocity, weight, bath)
    volume_now = volume(state)
    pull = alpha * twice_kinetic - volume_now * (_trace(state.stress) + 3.0 * bath.pressure)
    rate = torch.addcdiv(state.strain_rate, pull, weight, value=0.5 * dt)

    growth, shrink = rate * dt, rate * alpha * (-0.5 * dt)
    stretch, keep = _per_atom(growth.exp()[:, None], bath), _per_atom(shrink.exp()[:, None], bath)
    push = _per_atom((0.5 * dt * _relative_growth(shrink))[:, None], bath) / bath.mass
    velocity = torch.addcmul(state.forces * push, velocity, keep)
    drift = velocity * _per_atom((dt * _relative_growth(growth))[:, None], bath)
    cell = state.cell * growth.exp()[:, None, None]
    new = _arrived(state, forces, torch.addcmul(drift, state.position, stretch), cell)
    velocity = torch.addcmul(new.forces * push, velocity, keep)

    volume_now = volume_now * (3.0 * growth).exp()
    pull = alpha * 2.0 * kinetic_energy(velocity, bath) - volume_now * (
        _trace(new.stress) + 3.0 * bath.pressure
    )
    new = new._replace(strain_rate=torch.addcdiv(rate, pull, weight, value=0.5 * dt))
    new, velocity, _ = _both_thermostatted(new, velocity, weight, bath)
    return new._replace(velocity=velocity)


def kinetic_energy(velocity: Tensor, bath: Bath) -> Tensor:
    """K, [S]."""
    return 0.5 * _system_sum(velocity * velocity * bath.mass, bath).sum(1)


def at_rest(velocity: Tensor, bath: Bath) -> Tensor:
    """Take the velocity of the centre of mass away, but for systems of one atom."""
    return velocity - _per_atom(_system_sum(velocity * bath.mass, bath) * bath.hold, bath)


def volume(state: State) -> Tensor:
    """|det cell|, [S]."""
    a, b, c = state.cell.unbind(1)
    return (a * torch.linalg.cross(b, c)).sum(1).abs()


def pressure(state: State, bath: Bath) -> Tensor:
    """Pressure, that of the moving atoms included, [S]; NaN unless periodic in three directions."""
    kinetic = 2.0 * kinetic_energy(state.velocity, bath) / volume(state)
    return (kinetic - _trace(state.stress)) / 3.0


def conserved_energy(state: State, bath: Bath) -> Tensor:
    """The energy of crystal and surroundings, [S], which every step leaves as it is but for its own error."""
    squared = (bath.n_free + 3.0) * bath.barostat_time**2 * state.strain_rate.square()
    return (
        state.energy
        + kinetic_energy(state.velocity, bath)
        + state.heat
        + bath.kT * _chain_energy(state.thermostat, state.thermostat_rate, bath.n_free, bath.thermostat_time)
        + bath.kT * _chain_energy(state.barostat, state.barostat_rate, 1.0, bath.barostat_time)
        + 0.5 * bath.kT * squared
        + bath.pressure * volume(state)
    )


def _kicked(velocity: Tensor, state: State, bath: Bath) -> Tensor:
    """Velocities after the forces of a state have acted for half a step."""
    return torch.addcdiv(velocity, state.forces, bath.mass, value=0.5 * bath.timestep)


def _arrived(state: State, forces: Forces, position: Tensor, cell: Tensor) -> State:
    """The state at new positions and cells, whose velocities are still to come."""
    output = forces(position, cell)
    return state._replace(
        step=state.step + 1,
        position=position,
        cell=cell,
        energy=output.energy,
        forces=output.forces.double(),
        stress=output.stress.double(),
        magmoms=output.magmoms.double(),
    )


def _thermostatted(state: State, velocity: Tensor, bath: Bath) -> tuple[State, Tensor, Tensor]:
    """State and velocities after half a step of the thermostat's chain, and 2K then."""
    twice_kinetic = 2.0 * kinetic_energy(velocity, bath)
    ratio = twice_kinetic / (bath.n_free * bath.kT)
    place, rate, scale = _chain(
        state.thermostat, state.thermostat_rate, ratio, bath.n_free, bath.thermostat_time, 0.5 * bath.timestep
    )
    velocity = velocity * _per_atom(scale[:, None], bath)
    return state._replace(thermostat=place, thermostat_rate=rate), velocity, twice_kinetic * scale * scale


def _both_thermostatted(
    state: State, velocity: Tensor, weight: Tensor, bath: Bath
) -> tuple[State, Tensor, Tensor]:
    """`_thermostatted`, and the same for the barostat's chain, which keeps de/dt at the temperature."""
    twice_kinetic = 2.0 * kinetic_energy(velocity, bath)
    n = torch.cat([bath.n_free, torch.ones_like(bath.n_free)])
    kT = torch.cat([bath.kT, bath.kT])
    ratio = torch.cat([twice_kinetic, weight * state.strain_rate.square()]) / (n * kT)
    time = torch.cat([torch.full_like(bath.kT, t) for t in (bath.thermostat_time, bath.barostat_time)])
    places = torch.cat([state.thermostat, state.barostat])
    rates = torch.cat([state.thermostat_rate, state.barostat_rate])
    places, rates, scales = _chain(places, rates, ratio, n, time, 0.5 * bath.timestep)
    (thermostat, barostat), (scale, other) = places.chunk(2), scales.chunk(2)
    thermostat_rate, barostat_rate = rates.chunk(2)
    state = state._replace(
        thermostat=thermostat,
        thermostat_rate=thermostat_rate,
        barostat=barostat,
        barostat_rate=barostat_rate,
        strain_rate=state.strain_rate * other,
    )
    return state, velocity * _per_atom(scale[:, None], bath), twice_kinetic * scale * scale


def _chain(
    place: Tensor, rate: Tensor, ratio: Tensor, n: Tensor, time: Tensor | float, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance a Nose-Hoover chain by `delta`, as ASE's NoseHooverChainNVT with one Trotter step does.

    Masses are n kT time^2 for the first thermostat and kT time^2 for the others, so that kT drops out.

    Args:
        place: coordinates of N chains, [N, 3].
        rate: their rates, [N, 3].
        ratio: 2K / (n kT) of what each chain acts on, [N].
        n: its degrees of freedom, [N].
        time: relaxation time, of all or of each, [N].
        delta: time to advance.

    Returns:
        Coordinates, rates, and the factor [N] by which the chain scales the velocities.
    """
    half, quarter = 0.5 * delta, 0.25 * delta
    aim = half / time**2
    first, second, third = rate.unbind(1)

    third = torch.addcmul(third - aim, second, second, value=half)
    by_third = torch.exp(-quarter * third)
    second = by_third * torch.addcmul(by_third * second - aim, n * first, first, value=half)
    by_second = torch.exp(-quarter * second)
    first = by_second * (by_second * first + aim * (ratio - 1.0))

    scale = torch.exp(-delta * first)
    place = torch.add(place, torch.stack([first, second, third], dim=1), alpha=delta)

    first = by_second * (by_second * first + aim * (ratio * scale * scale - 1.0))
    second = by_third * torch.addcmul(by_third * second - aim, n * first, first, value=half)
    third = torch.addcmul(third - aim, second, second, value=half)
    return place, torch.stack([first, second, third], dim=1), scale


def _chain_energy(place: Tensor, rate: Tensor, n: Tensor | float, time: float) -> Tensor:
    """Energy of a chain in units of kT, [S]."""
    energy = place + 0.5 * time**2 * rate.square()
    return n * energy[:, 0] + energy[:, 1:].sum(1)


def _relative_growth(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x, which is 1 at 0."""
    return torch.where(x == 0.0, 1.0, torch.expm1(x) / x)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


def _per_atom(rows: Tensor, bath: Bath) -> Tensor:
    """Spread rows of systems, [S, D], over their atoms, [A, D]; one row alone is left to broadcasting."""
    return rows if len(rows) == 1 else rows.index_select(0, bath.atom_system)


def _system_sum(rows: Tensor, bath: Bath) -> Tensor:
    """Sum rows of atoms, [A, D], over their systems, [S, D], in a fixed order."""
    if bath.atoms_each is not None:
        return rows.view(-1, bath.atoms_each, rows.shape[1]).sum(1)
    return torch.segment_reduce(rows, "sum", offsets=bath.system_start, unsafe=True)
