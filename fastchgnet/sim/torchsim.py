"""The model interface of TorchSim: its integrators, optimizers and batchers with this potential.

TorchSim (torch-sim-atomistic) needs Python 3.12 or newer and is an extra; this module alone imports it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastchgnet.graph import Systems
from fastchgnet.potential import Potential
from fastchgnet.record import recording_on
from fastchgnet.sim.calculator import DIRECT, potential_of
from fastchgnet.sim.moving import MovingSystems

try:
    from torch_sim.models.interface import ModelInterface
except ModuleNotFoundError as error:
    python = ".".join(map(str, sys.version_info[:3]))
    raise ImportError(
        f"{error}: TorchSim needs pip install 'fastchgnet[torchsim]' on Python 3.12 or newer, not {python}"
    ) from None

if TYPE_CHECKING:
    from torch_sim.state import SimState


class FastCHGNetModel(ModelInterface):
    """Energies, forces, stresses and magnetic moments of a batch of systems, for TorchSim.

    Neighbours are kept, and found anew when atoms have moved far or the members of the batch have changed.
    Stress is NaN of systems that are not periodic in three directions. Systems that are no crystals any more
    raise Unsound, an InputError that names them.

    Args:
        model: name of a published model, path of a .safetensors file, or a Potential.
        device: cpu, cuda, or auto: a GPU where there is one. A Potential stays where it is.
        dtype: precision of the network and of TorchSim's states. A Potential keeps its own.
        skin: width beyond the cutoff within which neighbours are kept, A. Results do not depend on it.
    """

    _memory_scales_with = "n_edges"

    def __init__(
        self,
        model: str | Path | Potential = "chgnet-0.3.0",
        device: str = "auto",
        dtype: Literal["float32", "float64"] = "float32",
        skin: float = 0.5,
    ) -> None:
        super().__init__()
        self.potential = potential_of(model, device, dtype)
        self.skin = skin
        self._compute_stress = True
        self._compute_forces = True
        self._moving: MovingSystems | None = None
        self._members: tuple[Tensor, ...] = ()
        self.eval()
        if self.potential.heads is not None:
            warnings.warn(DIRECT, stacklevel=2)

    @property
    def device(self) -> torch.device:
        """Device of the network, where states are expected."""
        return self.potential.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network, which TorchSim gives to states."""
        return self.potential.dtype

    @property
    def compute_stress(self) -> bool:
        """Whether `forward` returns stress."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, value: bool) -> None:
        self._compute_stress = value

    @property
    def compute_forces(self) -> bool:
        """Whether `forward` returns forces."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, value: bool) -> None:
        self._compute_forces = value

    def forward(self, state: SimState, **_: Any) -> dict[str, Tensor]:
        """Evaluate a state of S systems with A atoms.

        Returns:
            energy [S] eV; forces [A, 3] eV/A and stress [S, 3, 3] eV/A^3, positive under tension, unless
            switched off; magmoms [A] mu_B. Detached, in the precision of the state.

        Raises:
            Unsound: for systems that `fastchgnet.predict` would refuse.
        """
        position, cell = state.positions.detach().double(), state.row_vector_cell.detach().double()
        derivatives = self._compute_forces or self._compute_stress
        output = self._systems(state).evaluate(position, cell.contiguous(), derivatives)
        results = {"energy": output.energy, "magmoms": output.magmoms}
        if self._compute_forces:
            results["forces"] = output.forces
        if self._compute_stress:
            results["stress"] = output.stress
        return {name: values.detach().to(state.dtype) for name, values in results.items()}

    def _systems(self, state: SimState) -> MovingSystems:
        """Return the systems of the last call, or new ones where the members are others."""
        members = (state.system_idx, state.atomic_numbers, state.pbc)
        if self._moving is None or not all(map(torch.equal, members, self._members)):
            n_atoms = tuple(state.system_idx.bincount().tolist())
            systems = Systems(
                atomic_number=state.atomic_numbers.long(),
                position=state.positions.detach().double(),
                cell=state.row_vector_cell.detach().double(),
                pbc=state.pbc.expand(len(n_atoms), 3),
                n_atoms=n_atoms,
            )
            record = recording_on(self.potential.device)
            self._moving = MovingSystems(self.potential, systems.to("cpu"), self.skin, record)
            # a state may be changed in place
            self._members = tuple(tensor.clone() for tensor in members)
        return self._moving
