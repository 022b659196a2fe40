"""The ASE calculator."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.graph import Output
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.potential import Potential
from fastchgnet.published import load
from fastchgnet.record import recording_on
from fastchgnet.sim.moving import MovingSystems

DIRECT = (
    "the forces of a model with a direct readout are no derivatives of its energy: dynamics do not conserve "
    "energy, and relaxation may end beside the minimum"
)


class FastCHGNetCalculator(Calculator):
    """Energy, forces, stress and magnetic moments for ASE, in ASE's units.

    Only what is asked for is computed: an energy or magnetic moments alone take no derivative. Forces and
    stress always come together. A crystal that is not periodic in three directions has no stress: asking for
    it raises ASE's PropertyNotImplementedError. Atoms that no crystal has, as those of a simulation that has
    exploded, raise InputError: at NaN, within 0.3 A of each other, too far apart.

    Args:
        model: name of a published model, path of a .safetensors file, or a Potential.
        device: cpu, cuda, or auto: a GPU where there is one. A Potential stays where it is.
        dtype: precision of the network. A Potential keeps its own.
        skin: width beyond the cutoff within which neighbours are kept, A. Results do not depend on it.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress", "magmoms"]  # noqa: RUF012
    # what the initial moments and charges are does not matter
    ignored_changes = {"initial_magmoms", "initial_charges"}  # noqa: RUF012

    def __init__(
        self,
        model: str | Path | Potential = "chgnet-0.3.0",
        device: str = "auto",
        dtype: Literal["float32", "float64"] = "float32",
        skin: float = 0.5,
    ) -> None:
        super().__init__()
        self.potential = potential_of(model, device, dtype)
        # what ASE writes beside results
        self.parameters |= {"model": self.potential.provenance.name, "dtype": str(self.potential.dtype)[6:]}
        self.skin = skin
        self._crystal: MovingSystems | None = None
        self._kind = (b"", b"")
        if self.potential.heads is not None:
            warnings.warn(DIRECT, stacklevel=2)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Evaluate `atoms` and add to `results`, which keep nothing of other atoms."""
        if system_changes:  # who calls this himself has not had them cleared
            self.results = {}
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        derivatives = not {"forces", "stress"}.isdisjoint(properties)
        output = self._evaluate(self.atoms, derivatives)
        energy = output.energy.item()
        self.results |= {
            "energy": energy,
            "free_energy": energy,
            "energies": _numpy(output.site_energies),
            "magmoms": _numpy(output.magmoms),
        }
        if derivatives:
            self.results["forces"] = _numpy(output.forces)
            if self.atoms.pbc.all():
                self.results["stress"] = full_3x3_to_voigt_6_stress(_numpy(output.stress[0]))

    def _evaluate(self, atoms: Atoms, derivatives: bool) -> Output:
        """Evaluate atoms; neighbours are kept as long as it is the same crystal that moves."""
        kind = (atoms.numbers.tobytes(), atoms.pbc.tobytes())
        if self._crystal is None or kind != self._kind:
            self._crystal, self._kind = self._new(atoms), kind
        position, cell = torch.from_numpy(atoms.positions), torch.from_numpy(atoms.cell.array[None])
        device = self.potential.device
        return self._crystal.evaluate(position.to(device), cell.to(device), derivatives)

    def _new(self, atoms: Atoms) -> MovingSystems:
        record = recording_on(self.potential.device)
        return MovingSystems(self.potential, systems_from_atoms([atoms]), self.skin, record)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is found again, and what no copy of a calculator could share."""
        return self.__dict__ | {"_crystal": None}


def potential_of(
    model: str | Path | Potential, device: str, dtype: Literal["float32", "float64"]
) -> Potential:
    """Load a model, unless it is one."""
    return model.eval() if isinstance(model, Potential) else load(model, device, dtype)


def _numpy(values: Tensor) -> NDArray[np.float64]:
    return values.detach().double().cpu().numpy()
