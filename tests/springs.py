"""A cheap potential whose crystals never melt: anharmonic springs between the neighbours of the start."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from fastchgnet.graph import Output


class Springs:
    """Energy 1/2 k (r - r0)^2 + 1/4 q (r - r0)^4 of every pair, r0 its length at the start."""

    def __init__(
        self, crystals: Sequence[Atoms], cutoff: float = 4.2, k: float = 1.0, q: float = 2.0
    ) -> None:
        first = np.cumsum([0, *(len(atoms) for atoms in crystals)])
        pairs = [neighbor_list("ijSd", atoms, cutoff) for atoms in crystals]
        self.i = torch.from_numpy(np.concatenate([p[0] + n for p, n in zip(pairs, first, strict=False)]))
        self.j = torch.from_numpy(np.concatenate([p[1] + n for p, n in zip(pairs, first, strict=False)]))
        self.image = torch.from_numpy(np.concatenate([p[2] for p in pairs])).double()
        self.length = torch.from_numpy(np.concatenate([p[3] for p in pairs]))
        self.system = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(p[0]) for p in pairs]))
        self.periodic = torch.tensor([bool(atoms.pbc.all()) for atoms in crystals])
        self.k, self.q, self.n_calls = k, q, 0

    def __call__(self, position: Tensor, cell: Tensor) -> Output:
        self.n_calls += 1
        vector = position[self.j] + (self.image[:, None] @ cell[self.system])[:, 0] - position[self.i]
        distance = vector.norm(dim=1)
        stretch = distance - self.length
        # every pair is there twice
        energies = 0.5 * (0.5 * self.k * stretch**2 + 0.25 * self.q * stretch**4)
        pull = ((self.k * stretch + self.q * stretch**3) / distance)[:, None] * vector
        virial = 0.5 * pull[:, :, None] * vector[:, None, :]
        n_systems = len(cell)
        volume = torch.linalg.det(cell).abs().where(self.periodic, torch.nan)
        return Output(
            energy=position.new_zeros(n_systems).index_add(0, self.system, energies),
            forces=torch.zeros_like(position).index_add(0, self.i, pull),
            stress=torch.zeros_like(cell).index_add(0, self.system, virial) / volume[:, None, None],
            magmoms=position.new_zeros(len(position)),
            site_energies=position.new_zeros(len(position)),
        )


class SpringCalculator(Calculator):
    """The same for ASE."""

    implemented_properties = ("energy", "free_energy", "forces", "stress")

    def __init__(self, springs: Springs) -> None:
        super().__init__()
        self.springs = springs

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        output = self.springs(
            torch.from_numpy(self.atoms.positions), torch.from_numpy(self.atoms.cell.array)[None]
        )
        self.results = {
            "energy": output.energy.item(),
            "free_energy": output.energy.item(),
            "forces": output.forces.numpy(),
            "stress": full_3x3_to_voigt_6_stress(output.stress[0].numpy()),
        }
