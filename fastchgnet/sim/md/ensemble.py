"""What a simulation samples: its settings, the surroundings of each crystal, and the first velocities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from ase import Atoms, units
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.errors import InputError
from fastchgnet.sim.constraints import fixed_atoms
from fastchgnet.sim.md.integrators import (
    Bath,
    Step,
    at_rest,
    kinetic_energy,
    langevin,
    martyna_tobias_klein,
    nose_hoover,
    velocity_verlet,
)

if TYPE_CHECKING:
    from pymatgen.core import Structure

Ensemble = Literal["nve", "nvt", "npt"]
Thermostat = Literal["nose-hoover", "langevin"]
Velocities = Literal["random", "given"]

_STEPS: dict[tuple[Ensemble, Thermostat], Step] = {
    ("nve", "nose-hoover"): velocity_verlet,
    ("nvt", "nose-hoover"): nose_hoover,
    ("nvt", "langevin"): langevin,
    ("npt", "nose-hoover"): martyna_tobias_klein,
}

MAX_SEED = 2**63 - 1

TIMES = (1e-6, 1e12)
"""fs; squares of all times between these are numbers, and so are their products."""

HELD_MASS = 1e300
"""Mass of atoms that constraints hold: no force moves them, and sums with it stay finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How crystals move.

    Raises:
        InputError: a setting that makes no sense, by name.
    """

    ensemble: Ensemble = "nve"
    thermostat: Thermostat = "nose-hoover"  # of NVT; that of NPT is Nose-Hoover's, NVE has none
    timestep: float = 1.0  # fs
    thermostat_time: float = 100.0  # fs; of Langevin's thermostat 1 / friction
    barostat_time: float = 1000.0  # fs
    pressure: float = 0.0  # eV/A^3
    velocities: Velocities = "random"  # the first: drawn from the seed, or those of the crystals
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name, kind in (("ensemble", Ensemble), ("thermostat", Thermostat), ("velocities", Velocities)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"{name} {getattr(self, name)!r} is none of {', '.join(map(str, get_args(kind)))}"
                )
        for name in ("timestep", "thermostat_time", "barostat_time"):
            if not TIMES[0] <= getattr(self, name) <= TIMES[1]:
                raise InputError(
                    f"the {name.replace('_', ' ')} must be between {TIMES[0]:g} and {TIMES[1]:g} fs: "
                    f"{getattr(self, name):g}"
                )
        if not math.isfinite(self.pressure):
            raise InputError(f"the pressure must be a number: {self.pressure}")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"the seed must be between 0 and 2^63 - 1: {self.seed}")
        if (self.ensemble, self.thermostat) not in _STEPS:
            raise InputError(f"{self.ensemble} does not run with the thermostat {self.thermostat}")
        if self.step in (nose_hoover, martyna_tobias_klein) and self.timestep > self.thermostat_time:
            # the chains would stop the atoms dead, and the run look sound
            raise InputError(
                f"the timestep must not exceed the thermostat time: {self.timestep:g}, "
                f"{self.thermostat_time:g} fs"
            )

    @property
    def step(self) -> Step:
        """The integrator."""
        return _STEPS[self.ensemble, self.thermostat]

    @property
    def draws(self) -> bool:
        """Whether steps need random numbers."""
        return self.step is langevin


def held_atoms(atoms: Atoms, settings: Settings, source: str) -> NDArray[np.bool_]:
    """Tell which atoms of a crystal are held, [n].

    Raises:
        InputError: the crystal cannot move as the settings say; names `source`.
    """
    held = fixed_atoms(atoms, source)
    if held.all():
        raise InputError(f"{source}: {'all atoms are held' if len(held) else 'no atoms'}")
    if settings.ensemble == "npt" and not atoms.pbc.all():
        raise InputError(f"{source}: npt needs three periodic directions")
    if settings.ensemble == "npt" and held.any():
        raise InputError(f"{source}: npt moves all atoms, but some are held")
    return held


def make_bath(
    crystals: Sequence[Atoms], temperature: Sequence[float], settings: Settings, device: torch.device | str
) -> Bath:
    """Gather masses and surroundings of crystals at their temperatures, K.

    A crystal has three degrees of freedom fewer than coordinates, since its centre of mass rests; one atom
    has three. Where ASE's FixAtoms holds atoms, all others are free.

    Raises:
        InputError: a temperature that is not above zero, or as `held_atoms`.
    """
    n_atoms = [len(atoms) for atoms in crystals]
    for kelvin in temperature:
        if not 0 < kelvin < math.inf:
            raise InputError(f"the temperature must be above zero: {kelvin:g} K")
    held = [held_atoms(atoms, settings, f"structure {number}") for number, atoms in enumerate(crystals)]
    whole = [len(mask) > 1 and not mask.any() for mask in held]  # those whose centre of mass rests

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    masses = [np.where(mask, HELD_MASS, one.get_masses()) for one, mask in zip(crystals, held, strict=True)]
    pressure = settings.pressure if settings.ensemble == "npt" else 0.0
    count = torch.tensor(n_atoms, dtype=torch.int64)
    return Bath(
        mass=torch.from_numpy(np.concatenate([np.zeros(0), *masses]))[:, None].to(device),
        hold=column([1 / mass.sum() if rests else 0.0 for mass, rests in zip(masses, whole, strict=True)])[
            :, None
        ],
        n_free=column([3 * (~mask).sum() - 3 * rests for mask, rests in zip(held, whole, strict=True)]),
        kT=column([units.kB * kelvin for kelvin in temperature]),
        pressure=column([pressure] * len(crystals)),
        atom_system=torch.arange(len(crystals)).repeat_interleave(count).to(device),
        system_start=torch.tensor([0, *n_atoms]).cumsum(0).to(device),
        atoms_each=n_atoms[0] if len(set(n_atoms)) == 1 else None,
        timestep=settings.timestep * units.fs,
        thermostat_time=settings.thermostat_time * units.fs,
        barostat_time=settings.barostat_time * units.fs,
    )


def random_velocities(normal: Tensor, bath: Bath) -> Tensor:
    """Turn normal numbers [A, 3] into velocities of exactly the bath's temperature, at rest as a whole.

    They are Maxwell's and Boltzmann's but for the kinetic energy, which does not fluctuate: what a run starts
    with should be what was asked for.
    """
    kT = bath.kT.index_select(0, bath.atom_system)[:, None]
    velocity = at_rest(normal * (kT / bath.mass).sqrt(), bath)
    scale = (0.5 * bath.n_free * bath.kT / kinetic_energy(velocity, bath)).sqrt()
    return velocity * scale.index_select(0, bath.atom_system)[:, None]


def given_velocities(crystals: Sequence[Atoms | Structure], bath: Bath) -> Tensor:
    """Take the velocities of crystals as ASE has them, but for that of the centre of mass and of held atoms.

    Raises:
        InputError: a crystal has none.
    """
    rows = []
    for number, atoms in enumerate(crystals):
        if not (isinstance(atoms, Atoms) and atoms.has("momenta")):
            raise InputError(f"structure {number} has no velocities to start with")
        rows.append(atoms.get_velocities())
    given = torch.from_numpy(np.concatenate(rows))
    return at_rest(torch.where(bath.mass < HELD_MASS, given.to(bath.mass.device), 0.0), bath)


def temperature_of(kinetic: Tensor, bath: Bath) -> Tensor:
    """Kinetic temperature, K, [S]."""
    return kinetic * (2 / units.kB) / bath.n_free
