"""The ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from fastchgnet.potential import Potential
from fastchgnet.prediction import sound_systems
from fastchgnet.published import load


class FastCHGNetCalculator(Calculator):
    """Energy, forces, stress and magnetic moments for ASE, in ASE's units.

    A crystal that is not periodic in three directions has no stress: asking for it raises ASE's
    PropertyNotImplementedError. Atoms that no crystal has, as those of a simulation that has exploded, raise
    InputError: at NaN, within 0.3 A of each other, too far apart.

    Args:
        model: name of a published model, path of a .safetensors file, or a Potential.
        device: cpu, cuda, or auto: a GPU where there is one. A Potential stays where it is.
        dtype: precision of the network. A Potential keeps its own.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress", "magmoms"]  # noqa: RUF012

    def __init__(
        self,
        model: str | Path | Potential = "chgnet-0.3.0",
        device: str = "auto",
        dtype: Literal["float32", "float64"] = "float32",
    ) -> None:
        super().__init__()
        self.potential = model.eval() if isinstance(model, Potential) else load(model, device, dtype)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Evaluate `atoms` and fill `results`."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        output = self.potential(self.potential.build_graph(sound_systems([self.atoms])))
        energy = output.energy.item()
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": output.site_energies.cpu().numpy(),
            "forces": output.forces.double().cpu().numpy(),
            "magmoms": output.magmoms.double().cpu().numpy(),
        }
        if self.atoms.pbc.all():
            stress = output.stress[0].double().cpu().numpy()
            self.results["stress"] = full_3x3_to_voigt_6_stress(stress)
