"""Molecular dynamics of many crystals at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from numpy.typing import NDArray

from fastchgnet.device import own_settings
from fastchgnet.errors import InputError
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.potential import Potential
from fastchgnet.record import Record, recording_on
from fastchgnet.sim.calculator import DIRECT
from fastchgnet.sim.constraints import fixed_atoms
from fastchgnet.sim.fixed import MAX_CANDIDATES, FixedSystems, n_candidates
from fastchgnet.sim.md.ensemble import (
    Settings,
    given_velocities,
    make_bath,
    random_velocities,
    temperature_of,
)
from fastchgnet.sim.md.integrators import (
    PER_ATOM,
    State,
    conserved_energy,
    kinetic_energy,
    pressure,
    volume,
)
from fastchgnet.sim.md.noise import Noise
from fastchgnet.sim.md.recorded import MAX_TEMPERATURE, RecordedSteps
from fastchgnet.sim.moving import MovingSystems, Unsound
from fastchgnet.units import VOIGT

if TYPE_CHECKING:
    from pymatgen.core import Structure

_DEFAULTS = Settings()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A crystal of n atoms at one time, on the host."""

    number: int  # of the crystal in the simulation
    step: int
    atoms: Atoms  # with velocities
    energy: float  # potential energy, eV
    forces: NDArray[np.float64]  # [n, 3] eV/A
    stress: NDArray[np.float64]  # [3, 3] eV/A^3; NaN unless periodic in three directions
    magmoms: NDArray[np.float64]  # [n] mu_B
    kinetic: float  # eV
    conserved: float  # energy of crystal and surroundings, eV
    temperature: float  # K
    pressure: float  # eV/A^3, that of the moving atoms included
    volume: float  # A^3

    def as_atoms(self) -> Atoms:
        """Give the crystal with its velocities, and what the potential says of it, as ASE takes them."""
        atoms = self.atoms.copy()
        results = {"energy": self.energy, "forces": self.forces, "magmoms": self.magmoms}
        if atoms.pbc.all():
            results["stress"] = self.stress[VOIGT]
        atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms


class Lost(NamedTuple):
    """A crystal that left a simulation."""

    number: int
    step: int  # its last good one
    reason: str
    last: Snapshot | None  # None where it was no crystal from the start


class MolecularDynamics:
    """S crystals that move, each for itself and all at the same pace.

    A crystal that is none any more, or whose energy is not finite or temperature above 1e5 K, leaves with its
    last good snapshot, and the others go on. What happens to a crystal depends on its number and the seed,
    but not on who else is there.

    Args:
        potential: the model, on the device where it shall run.
        crystals: ase Atoms or pymatgen Structures; masses, held atoms and, where the settings ask for
            them, velocities are theirs.
        temperature: of all, or of each, K; a bath's where the ensemble has one, else that of the start.
        settings: how they move.
        record: makes recordings of steps; by default CUDA graphs on a GPU, and none elsewhere.

    Attributes:
        members: numbers of the crystals that are still there.
        lost: those that left, in the order in which they did.
        n_steps: steps taken.
        state: of the members.

    Raises:
        InputError: a temperature that is not above zero, missing velocities, constraints that are not
            FixAtoms, NPT without a periodic cell.
    """

    @own_settings
    def __init__(
        self,
        potential: Potential,
        crystals: Sequence[Atoms | Structure],
        temperature: float | Sequence[float] = 300.0,
        settings: Settings = _DEFAULTS,
        record: Record | None = None,
    ) -> None:
        each = [float(temperature)] * len(crystals) if isinstance(temperature, float | int) else temperature
        if len(each) != len(crystals):
            raise InputError(f"{len(each)} temperatures for {len(crystals)} crystals")
        if potential.config.readout == "direct":
            warnings.warn(DIRECT, stacklevel=2)
        self.potential, self.settings = potential, settings
        self._record = record or recording_on(potential.device)
        self._crystals = dict(enumerate(_bare(crystals)))
        self._temperature = dict(enumerate(each))
        self.lost: list[Lost] = []
        self.n_steps = 0
        self._is_settled = False
        self._gather(range(len(crystals)))
        self.state = self._first_state(crystals)
        self._settle()

    def run(
        self,
        n_steps: int,
        interval: int = 10,
        observe: Callable[[MolecularDynamics], None] = lambda dynamics: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take steps.

        Args:
            n_steps: how many; fewer where all crystals leave.
            interval: `observe` is called where the number of steps taken is a multiple of it. On a GPU this
                is also when the host looks whether all is well.
            observe: called with this object.
            stop: asked again and again; the run ends when it says yes.
        """
        end = self.n_steps + n_steps
        while self.members and self.n_steps < end and not stop():
            until = min(end, self.n_steps - self.n_steps % interval + interval)
            if self._recorded_run(until - self.n_steps):
                self.n_steps = until
            while self.members and self.n_steps < until and not stop():
                self._step()
            if self.n_steps == until and until % interval == 0:
                observe(self)

    @own_settings
    def snapshots(self, chosen: Iterable[int] | None = None) -> list[Snapshot]:
        """Take snapshots of the members, or of some by their place among them."""
        state, bath = self.state, self.bath
        kinetic = kinetic_energy(state.velocity, bath)
        columns = (
            kinetic,
            conserved_energy(state, bath),
            temperature_of(kinetic, bath),
            pressure(state, bath),
        )
        table = torch.stack([state.energy, *columns, volume(state)], dim=1).tolist()
        rows = [getattr(state, name).cpu().numpy() for name in ("position", "velocity", "forces", "magmoms")]
        cells, stresses = state.cell.cpu().numpy(), state.stress.cpu().numpy()
        ends = np.cumsum(self._n_atoms)
        made = []
        for place in range(len(self.members)) if chosen is None else chosen:
            number = self.members[place]
            part = slice(ends[place] - self._n_atoms[place], ends[place])
            position, velocity, forces, magmoms = (values[part].copy() for values in rows)
            atoms = self._crystals[number].copy()
            atoms.set_cell(cells[place])
            atoms.set_positions(position, apply_constraint=False)
            atoms.set_velocities(velocity)
            energy, kinetic_of, conserved, kelvin, pressure_of, volume_of = table[place]
            made.append(
                Snapshot(
                    number=number,
                    step=self.n_steps,
                    atoms=atoms,
                    energy=energy,
                    forces=forces,
                    stress=stresses[place].copy(),
                    magmoms=magmoms,
                    kinetic=kinetic_of,
                    conserved=conserved,
                    temperature=kelvin,
                    pressure=pressure_of,
                    volume=volume_of,
                )
            )
        return made

    @own_settings
    def restore(self, state: State, members: Sequence[int], lost: Sequence[Lost]) -> None:
        """Go on from a state of these members, which `state`, `members` and `lost` were before."""
        self._gather(members)
        self.state = State(*(tensor.to(self.potential.device) for tensor in state))
        self.lost, self.n_steps = list(lost), int(state.step)

    def _gather(self, members: Iterable[int]) -> None:
        """Make all that depends on which crystals are there."""
        self.members = list(members)
        crystals = [self._crystals[number] for number in self.members]
        self._n_atoms = [len(atoms) for atoms in crystals]
        device = self.potential.device
        kelvin = [self._temperature[number] for number in self.members]
        self.bath = make_bath(crystals, kelvin, self.settings, device)
        self._moving = MovingSystems(self.potential, systems_from_atoms(crystals))
        stream = torch.tensor(self.members, dtype=torch.int64).to(device)[self.bath.atom_system]
        place = torch.arange(len(stream), device=device) - self.bath.system_start[self.bath.atom_system]
        self._noise = Noise(self.settings.seed, stream, place)
        self._recorded: RecordedSteps | None = None

    def _first_state(self, crystals: Sequence[Atoms | Structure]) -> State:
        """The state before the first step, but for what the potential says of it."""
        device = self.potential.device
        systems, none = (
            self._moving.systems,
            torch.zeros(len(crystals), 3, dtype=torch.float64, device=device),
        )
        if self.settings.velocities == "given":
            velocity = given_velocities(crystals, self.bath)
        else:
            velocity = random_velocities(self._noise.start(), self.bath)
        return State(
            step=torch.tensor(0, device=device),
            position=systems.position.clone(),
            velocity=velocity,
            cell=systems.cell.clone(),
            energy=none[:, 0],
            forces=torch.zeros_like(velocity),
            stress=torch.zeros_like(systems.cell),
            magmoms=torch.zeros_like(velocity[:, 0]),
            heat=none[:, 0],
            thermostat=none,
            thermostat_rate=none,
            barostat=none,
            barostat_rate=none,
            strain_rate=none[:, 0],
        )

    def _settle(self) -> None:
        """Ask the potential about the first state; those that are no crystals leave."""
        while self.members:
            try:
                output = self._moving.evaluate(self.state.position, self.state.cell)
            except Unsound as error:
                self._dismiss(error.reasons)
                continue
            self.state = self.state._replace(
                energy=output.energy,
                forces=output.forces.double(),
                stress=output.stress.double(),
                magmoms=output.magmoms.double(),
            )
            if faults := self._faults(self.state):
                self._dismiss(faults)
                continue
            break
        self._is_settled = True

    @own_settings
    def _step(self) -> None:
        """Take one step, or find out who cannot take it and let them leave."""
        noise = self._noise.at(self.n_steps) if self.settings.draws else self.state.position[:0]
        try:
            new = self.settings.step(self.state, self.bath, self._moving.evaluate, noise)
        except Unsound as error:
            self._dismiss(error.reasons)
            return
        if faults := self._faults(new):
            self._dismiss(faults)
            return
        self.state, self.n_steps = new, self.n_steps + 1

    @own_settings
    def _recorded_run(self, n_steps: int) -> bool:
        """Take steps that are recorded; False where there are none, or a fault was found afterwards.

        With a fault, or a graph that has outgrown its arrays, the state is as before, and taking the same
        steps one by one shows which.
        """
        if self._record is None:
            return False
        if self._recorded is None:
            try:
                batch = self._moving.graph(self.state.position, self.state.cell)
            except Unsound:
                return False
            host = self._moving.systems.to("cpu")
            if n_candidates(self.potential, host) > MAX_CANDIDATES:
                return False
            systems = FixedSystems(self.potential, host, batch)
            self._recorded = RecordedSteps(systems, self.bath, self.settings.step, self._record)
        numbers = self._noise if self.settings.draws else None
        state = self._recorded.take(self.state, numbers, range(self.n_steps, self.n_steps + n_steps))
        if state is None:
            self._recorded = None
            return False
        self.state = state
        return True

    def _faults(self, state: State) -> dict[int, str]:
        """Say what is wrong with members, by their place, after a step of whose geometry all is well."""
        kelvin = temperature_of(kinetic_energy(state.velocity, self.bath), self.bath)
        is_good = state.energy.isfinite() & (kelvin <= MAX_TEMPERATURE)
        if is_good.all():
            return {}
        energies, kelvins = state.energy.tolist(), kelvin.tolist()
        return {
            place: f"its temperature is {kelvins[place]:.3g} K; is the time step too long?"
            if np.isfinite([energies[place], kelvins[place]]).all()
            else "its energy or forces are not finite"
            for place in (~is_good).nonzero()[:, 0].tolist()
        }

    def _dismiss(self, reasons: dict[int, str]) -> None:
        """Let members leave, by their place, with the last state, which was good unless it is the first."""
        snapshots: Sequence[Snapshot | None] = [None] * len(reasons)
        if self._is_settled:
            snapshots = self.snapshots(reasons)
        for (place, reason), last in zip(reasons.items(), snapshots, strict=True):
            self.lost.append(Lost(self.members[place], self.n_steps, reason, last))
        kept = [place for place in range(len(self.members)) if place not in reasons]
        of_atoms = torch.isin(self.bath.atom_system, torch.tensor(kept, device=self.potential.device))
        of_systems = torch.tensor(kept, dtype=torch.int64, device=self.potential.device)
        fields = self.state._asdict()
        for name, values in fields.items():
            if name != "step":
                fields[name] = values[of_atoms] if name in PER_ATOM else values[of_systems]
        self.state = State(**fields)
        self._gather([self.members[place] for place in kept])


def _bare(structures: Sequence[Atoms | Structure]) -> list[Atoms]:
    """Copy crystals without their velocities and results, but with masses and held atoms.

    Raises:
        InputError: as `systems_from_atoms` and `fixed_atoms`.
    """
    systems, made = systems_from_atoms(structures), []
    per_atom = (systems.atomic_number.split(systems.n_atoms), systems.position.split(systems.n_atoms))
    parts = zip(structures, *per_atom, systems.cell, systems.pbc, strict=True)
    for index, (structure, numbers, position, cell, pbc) in enumerate(parts):
        atoms = Atoms(numbers.numpy(), position.numpy(), cell=cell.numpy(), pbc=pbc.numpy())
        if isinstance(structure, Atoms) and structure.has("masses"):
            atoms.set_masses(structure.get_masses())
        held = fixed_atoms(structure, f"structure {index}")
        if held.any():
            atoms.set_constraint(FixAtoms(mask=held))
        made.append(atoms)
    return made
