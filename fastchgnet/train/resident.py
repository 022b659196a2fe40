"""The raw frames of a store on a device, about 1 KB each, gathered there by number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastchgnet.data.store import Store
from fastchgnet.device_graph import SpareSystems
from fastchgnet.graph import Labels
from fastchgnet.ops.gpu import runtime
from fastchgnet.units import MATRIX_FROM_VOIGT


class ResidentFrames:
    """Geometry and labels of all frames of a store, on a device."""

    def __init__(self, store: Store, device: torch.device) -> None:
        # a copy of each: what is mapped from the disk must not be written to, and torch cannot promise that
        self._arrays = {
            name: torch.from_numpy(np.array(rows)).to(device) for name, rows in store.raw().items()
        }

    def gather(self, numbers: Tensor, n_atoms: int) -> tuple[SpareSystems, Labels]:
        """Copy frames into arrays of static shapes, in the order of `numbers`; the host waits for nothing.

        Args:
            numbers: [S] int64, numbers of frames, then -1 for spare systems.
            n_atoms: atoms to have room for.

        Returns:
            What `Store.gather` returns, with spare rows behind; labels are missing there.
        """
        gather = _gather_on_gpu if runtime.serves(numbers) else _gather
        return gather(numbers, self._arrays, n_atoms)


def _gather(numbers: Tensor, arrays: dict[str, Tensor], n_atoms: int) -> tuple[SpareSystems, Labels]:
    """`ResidentFrames.gather` in PyTorch."""
    is_real, frame = numbers >= 0, numbers.clamp(min=0)
    first = arrays["pointer"].index_select(0, frame)
    length = torch.where(is_real, arrays["pointer"].index_select(0, frame + 1) - first, 0)
    start = torch.cat([length.new_zeros(1), length.cumsum(0)])
    atom = torch.arange(n_atoms, device=numbers.device)
    system = torch.searchsorted(start[1:], atom, right=True).clamp(max=len(numbers) - 1)
    is_atom = atom < start[-1]
    row = torch.where(is_atom, (first - start[:-1]).index_select(0, system) + atom, 0)

    def frames(name: str) -> Tensor:
        return arrays[name].index_select(0, frame)

    def atoms(name: str) -> Tensor:
        return arrays[name].index_select(0, row)

    systems = SpareSystems(
        atomic_number=atoms("atomic_number").long(),
        position=atoms("position").double(),
        cell=frames("cell"),
        pbc=frames("pbc"),
        start=start,
        n_systems=is_real.sum(),
    )
    components = frames("stress").unbind(1)
    stress = torch.stack([components[k] for k in MATRIX_FROM_VOIGT], dim=1).view(-1, 3, 3)
    labels = Labels(
        energy=frames("energy").where(is_real, torch.nan),
        forces=atoms("forces").where(is_atom[:, None], torch.nan),
        stress=stress.where(is_real[:, None, None], torch.nan),
        magmoms=atoms("magmoms").where(is_atom, torch.nan),
    )
    return systems, labels


_gather_on_gpu = runtime.body("frames", "gather", _gather, (torch.int64,))
