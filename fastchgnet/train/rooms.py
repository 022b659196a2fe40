"""Static shapes for the batches of a run: a few rooms, and the smallest that each batch fits in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastchgnet.data.store import Store
from fastchgnet.device_graph import count_candidates
from fastchgnet.neighbors import graph_sizes
from fastchgnet.padding import Capacity

_QUANTILES = (0.25, 0.5, 0.75, 0.95, 1.0)
"""Shares of the batches that rooms are made for: most steps shall not pay for the largest batch."""

_MARGIN = 1.02
"""Of the largest room, for batches that were not among those it was planned for."""

_GRAIN = 64
"""Rows that sizes are multiples of."""

_CHUNK = 1024


Parts = Sequence[NDArray[np.int64]]
"""Frames of one batch that are taken at different times or by different processes, in the same shapes."""


class Room(NamedTuple):
    """Shapes of a padded batch, and of the search for its neighbours."""

    capacity: Capacity
    n_candidates: int


def frame_sizes(
    store: Store, indices: NDArray[np.int64], atom_cutoff: float, bond_cutoff: float
) -> NDArray[np.int64]:
    """Count what frames need room for, [n, 5]: atoms, edges, short bonds, angles, candidate pairs."""
    plan = store.header.plan
    if (plan.atom_cutoff, plan.bond_cutoff) == (atom_cutoff, bond_cutoff):
        sizes = store.sizes[indices].astype(np.int64)
    else:
        chunks = np.array_split(indices, math.ceil(len(indices) / _CHUNK))
        sizes = np.concatenate([graph_sizes(store.gather(c)[0], atom_cutoff, bond_cutoff) for c in chunks])
    cell, pbc = (torch.from_numpy(array[indices]) for array in (store.cells, store.pbc))
    candidates = count_candidates(cell, pbc, sizes[:, 0], atom_cutoff)
    return np.column_stack([sizes, candidates])


class Rooms:
    """The rooms of a run.

    Args:
        sizes: `frame_sizes` of all frames.
        batches: batches to plan for, each as its parts: positions in `sizes`. Others may come.
    """

    def __init__(self, sizes: NDArray[np.int64], batches: Sequence[Parts]) -> None:
        self._sizes = sizes
        needs = np.array([self._needs(parts) for parts in batches])
        load = (needs / needs.mean(0).clip(1)).max(1)  # a set may have no angles
        self.rooms: Sequence[Room] = sorted(
            {self._room(needs[load <= np.quantile(load, q)].max(0), q) for q in _QUANTILES},
            key=lambda room: room.capacity.bonds + room.capacity.angles,
        )

    def __call__(self, parts: Parts) -> Room | None:
        """Return the smallest room for each of the parts of a batch, or None where there is none."""
        systems, *rows, n_candidates = self._needs(parts).tolist()
        for room in self.rooms:
            if room.capacity.holds(Capacity(systems, *rows)) and n_candidates <= room.n_candidates:
                return room
        return None

    def _needs(self, parts: Parts) -> NDArray[np.int64]:
        """Count systems, atoms, short bonds, long bonds, angles and candidate pairs of the largest parts."""
        counts = []
        for positions in parts:
            atoms, edges, short, angles, candidates = self._sizes[positions].sum(0)
            counts.append((len(positions), atoms, short, edges // 2 - short, angles, candidates))
        return np.array(counts).max(0)

    @staticmethod
    def _room(needs: NDArray[np.int64], quantile: float) -> Room:
        """Round up; a filler system, its atom and a short bond of its own come on top."""
        margin = _MARGIN if quantile == 1 else 1.0
        systems, *rest = needs.tolist()
        rows = [math.ceil((margin * n + 2) / _GRAIN) * _GRAIN for n in rest]
        return Room(Capacity(systems + 1, *rows[:-1]), rows[-1])
