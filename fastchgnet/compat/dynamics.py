"""chgnet's molecular dynamics of one crystal, on ASE's integrators."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.md.nptberendsen import Inhomogeneous_NPTBerendsen, NPTBerendsen
from ase.md.nvtberendsen import NVTBerendsen
from ase.md.velocitydistribution import Stationary, force_temperature
from ase.md.verlet import VelocityVerlet

from fastchgnet.compat.calculator import CHGNetCalculator, OnIsolatedAtoms
from fastchgnet.compat.eos import EquationOfState
from fastchgnet.compat.model import CHGNet
from fastchgnet.compat.relaxation import CrystalFeasObserver
from fastchgnet.compat.structures import require_cell, require_pymatgen, to_atoms, to_structure
from fastchgnet.errors import InputError

try:
    from ase.md.melchionna import MelchionnaNPT
except ImportError:  # its name before ASE 3.27
    from ase.md.npt import NPT as MelchionnaNPT

if TYPE_CHECKING:
    from pymatgen.core import Structure

logger = logging.getLogger(__name__)

SOFT = 2.0
"""Bulk modulus where none can be fitted, GPa: that of water."""

LEAST = 0.01
"""Bulk modulus below which a fit means nothing, GPa; the softest solids have a hundred times as much."""

INTEGRATORS = {
    ("nvt", "nose-hoover"),
    ("nvt", "berendsen"),
    ("nvt", "berendsen_inhomogeneous"),
    ("npt", "nose-hoover"),
    ("npt", "berendsen_inhomogeneous"),
    ("npt", "npt_berendsen"),
}


class MolecularDynamics:
    """Run one crystal; `fastchgnet md` keeps everything on the device and is faster.

    Args:
        atoms: ase Atoms are moved in place and get the calculator; or a pymatgen Structure or Molecule.
        model: None for the published 0.3.0; a calculator is used as it is.
        ensemble: nve, nvt or npt.
        thermostat: Nose-Hoover, Berendsen, Berendsen_inhomogeneous; for npt, NPT_Berendsen keeps the shape.
        temperature: K.
        starting_temperature: K, from which velocities are drawn; None keeps those of the atoms.
        timestep: fs.
        pressure: GPa; for Nose-Hoover also a stress, [6] or [3, 3].
        taut: time constant of the thermostat, fs; 100 steps where None.
        taup: that of the barostat, fs; 1000 steps where None.
        bulk_modulus: GPa, for npt; None for one fitted by EquationOfState.
        trajectory: of ASE, or the name of its file.
        logfile: of ASE.
        loginterval: steps between frames and lines.
        crystal_feas_logfile: pickle of the crystals' features to write after each run.
        append_trajectory: whether to continue the trajectory's file.
        on_isolated_atoms: as in CHGNetCalculator, like the arguments below.
        return_site_energies: see there.
        use_device: see there.
    """

    def __init__(
        self,
        atoms: Atoms | Structure,
        *,
        model: CHGNet | BaseCalculator | None = None,
        ensemble: str = "nvt",
        thermostat: str = "Berendsen_inhomogeneous",
        temperature: float = 300,
        starting_temperature: float | None = None,
        timestep: float = 2.0,
        pressure: Any = 1.01325e-4,
        taut: float | None = None,
        taup: float | None = None,
        bulk_modulus: float | None = None,
        trajectory: Any = None,
        logfile: str | None = None,
        loginterval: int = 1,
        crystal_feas_logfile: str | None = None,
        append_trajectory: bool = False,
        on_isolated_atoms: OnIsolatedAtoms = "warn",
        return_site_energies: bool = False,
        use_device: str | None = None,
    ) -> None:
        kind = _kind(ensemble, thermostat)
        _require_range(timestep=timestep, taut=taut, taup=taup, bulk_modulus=bulk_modulus)
        _require_range(True, temperature=temperature, starting_temperature=starting_temperature)
        self.ensemble, self.thermostat = ensemble, thermostat
        self.trajectory, self.logfile, self.loginterval = trajectory, logfile, loginterval
        self.timestep, self.crystal_feas_logfile = timestep, crystal_feas_logfile
        self.bulk_modulus = bulk_modulus
        self.atoms = to_atoms(atoms)
        _require_room(self.atoms, kind, pressure)
        if starting_temperature is not None:
            _draw_velocities(self.atoms, starting_temperature)
        if isinstance(model, BaseCalculator):
            self.atoms.calc = model
        else:
            self.atoms.calc = CHGNetCalculator(
                model,
                use_device=use_device,
                on_isolated_atoms=on_isolated_atoms,
                return_site_energies=return_site_energies,
            )
        files = {
            "trajectory": trajectory,
            "logfile": logfile,
            "loginterval": loginterval,
            "append_trajectory": append_trajectory,
        }
        times = {
            "taut": (100 * timestep if taut is None else taut) * units.fs,
            "taup": (1000 * timestep if taup is None else taup) * units.fs,
        }
        make = self._integrator(kind, temperature, pressure, times)
        self.dyn: Any = make(atoms=self.atoms, timestep=timestep * units.fs, **files)
        logger.info("%s %s with %s", ensemble, thermostat, type(self.dyn).__name__)

    def run(self, steps: int) -> None:
        """Run so many steps."""
        features = CrystalFeasObserver(self.atoms)
        if self.crystal_feas_logfile:
            self.dyn.attach(features, interval=self.loginterval)
        self.dyn.run(steps)
        if self.crystal_feas_logfile:
            features.save(self.crystal_feas_logfile)

    def set_atoms(self, atoms: Atoms) -> None:
        """Go on with other atoms."""
        atoms.calc = self.atoms.calc
        self.atoms = self.dyn.atoms = atoms

    def upper_triangular_cell(self, *, verbose: bool = False) -> None:
        """Rotate the crystal, with its momenta, so that its cell is upper triangular.

        ASE's Nose-Hoover dynamics asks for that. A left-handed cell becomes its mirror image.
        """
        cell = self.atoms.cell.array
        if np.tril(cell, -1).any():
            # cell = upper @ rotation; from the end, QR of the transpose is that
            q, r = np.linalg.qr(cell[::-1].T)
            upper, rotation = r.T[::-1, ::-1], q.T[::-1]
            sign = np.sign(np.diag(upper))
            upper, rotation = upper * sign, sign[:, None] * rotation
            momenta = self.atoms.get_momenta() @ rotation.T
            self.atoms.set_cell(upper, scale_atoms=True)
            self.atoms.set_momenta(momenta)
            if verbose:
                logger.info("rotated the crystal to an upper triangular cell")

    def _integrator(
        self, kind: tuple[str, str], temperature: float, pressure: Any, times: dict[str, float]
    ) -> Callable[..., Any]:
        """Choose an integrator of ASE and fill in its thermostat and barostat."""
        ensemble, thermostat = kind
        if ensemble == "nve":
            return VelocityVerlet
        if ensemble == "npt" and self.bulk_modulus is None:
            self.bulk_modulus = self._fitted_bulk_modulus()
        if thermostat == "nose-hoover":
            self.upper_triangular_cell()
            barostat = None
            if ensemble == "npt":
                assert self.bulk_modulus is not None
                barostat = self.bulk_modulus * units.GPa * times["taup"] ** 2
            return partial(
                MelchionnaNPT,
                temperature_K=temperature,
                externalstress=np.multiply(pressure, units.GPa),
                ttime=times["taut"],
                pfactor=barostat,
            )
        if ensemble == "nvt":
            return partial(NVTBerendsen, temperature_K=temperature, taut=times["taut"])
        assert self.bulk_modulus is not None
        return partial(
            NPTBerendsen if thermostat == "npt_berendsen" else Inhomogeneous_NPTBerendsen,
            temperature_K=temperature,
            pressure_au=pressure * units.GPa,
            compressibility_au=1 / (self.bulk_modulus * units.GPa),
            taut=times["taut"],
            taup=times["taup"],
        )

    def _fitted_bulk_modulus(self) -> float:
        """Fit one to a copy, GPa; where there is no stable fit warn and take a soft one."""
        require_pymatgen()
        from pymatgen.analysis.eos import EOSError

        eos = EquationOfState(self.atoms.calc)
        try:
            eos.fit(to_structure(self.atoms), steps=500, fmax=0.1, verbose=False)
            modulus = eos.get_bulk_modulus("GPa")
        except EOSError:
            modulus = 0.0
        if modulus > LEAST:
            logger.info("fitted bulk modulus: %.3g GPa", modulus)
            return modulus
        warnings.warn(
            f"no bulk modulus could be fitted; the barostat assumes {SOFT:g} GPa: give bulk_modulus",
            stacklevel=4,
        )
        return SOFT


def _kind(ensemble: str, thermostat: str) -> tuple[str, str]:
    """Both in small letters, where there is an integrator."""
    kind = (ensemble.lower(), thermostat.lower())
    if kind[0] != "nve" and kind not in INTEGRATORS:
        raise InputError(
            f"ensemble={ensemble!r} with thermostat={thermostat!r}: choose nve, nvt or npt with "
            "Nose-Hoover, Berendsen (nvt), NPT_Berendsen (npt) or Berendsen_inhomogeneous"
        )
    return kind


def _require_range(with_zero: bool = False, **values: float | None) -> None:
    """Raise InputError for a value that is given and not above, or `with_zero` below, zero."""
    for name, value in values.items():
        if value is not None and not (0 < value < math.inf or (with_zero and value == 0)):
            raise InputError(f"{name}={value}: must be {'at least' if with_zero else 'above'} zero")


def _require_room(atoms: Atoms, kind: tuple[str, str], pressure: Any) -> None:
    """Raise InputError for atoms or a pressure that the integrator cannot take."""
    if kind[0] == "nve":
        return
    if kind[0] == "npt" and not atoms.pbc.all():
        raise InputError("ensemble='npt' needs a crystal that is periodic in three directions")
    if kind[1] == "nose-hoover":
        require_cell(atoms, "thermostat='Nose-Hoover'")
    elif np.ndim(pressure):
        raise InputError("pressure must be one number, or thermostat='Nose-Hoover'")


def _draw_velocities(atoms: Atoms, temperature: float) -> None:
    """Draw momenta of exactly this temperature, then bring the whole to rest, as chgnet does.

    From numpy's global generator, so that `numpy.random.seed` decides them as it does there.
    """
    width = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(np.random.standard_normal((len(atoms), 3)) * width[:, None])
    force_temperature(atoms, temperature)
    Stationary(atoms)
