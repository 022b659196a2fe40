"""Crystals that move: their neighbours are searched for now and then, and sifted in every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastchgnet.data.frame import MIN_DISTANCE
from fastchgnet.device import own_settings
from fastchgnet.errors import InputError
from fastchgnet.graph import Batch, Output, Systems
from fastchgnet.neighbors import (
    Pairs,
    cell_volume,
    concatenated,
    find_pairs,
    graph_of_pairs,
    near_first,
    pair_vector,
    squared_length,
    warn_of_lone_atoms,
)
from fastchgnet.potential import Potential
from fastchgnet.prediction import flaws
from fastchgnet.record import Record
from fastchgnet.sim.fixed import (
    MAX_CANDIDATES,
    FixedSystems,
    RecordedSystems,
    inverse_boxes,
    n_candidates,
    strains,
)


class Unsound(InputError):
    """Some crystals of a batch are none any more.

    Args:
        reasons: what is wrong with each, by its number in the batch.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = reasons
        super().__init__("; ".join(f"structure {index}: {reason}" for index, reason in reasons.items()))


class MovingSystems:
    """S crystals whose A atoms and cells move, and their graph.

    Pairs within the cutoff and a skin are kept until, given how far atoms have moved and cells have been
    strained, one from outside could have come within the cutoff. Every step takes those that are within it
    now: the graph is a function of positions and cells alone, whatever they were before. While no pair
    crosses a cutoff only the vectors change.

    Args:
        potential: the model, on the device where it shall run.
        systems: the crystals, on the host; soundness is checked when they are given a geometry.
        skin: width beyond the cutoff, A.
        record: makes recordings of evaluations, for crystals that stay together for long; their graphs are
            then built on the device in every step, until one outgrows its room or there is a fault.
    """

    @own_settings
    def __init__(
        self, potential: Potential, systems: Systems, skin: float = 0.5, record: Record | None = None
    ) -> None:
        if not 0 <= skin < math.inf:
            raise InputError(f"a skin must be finite and not negative: {skin}")
        self.potential = potential
        self.skin = skin
        self._record = record
        self._recorded: RecordedSystems | None = None
        self.systems = systems.to(potential.device)
        self._atom_system = systems.atom_system.to(potential.device)
        self._found: dict[int, Pairs] = {}
        self._pairs: Pairs | None = None
        self._position = self.systems.position.clone()  # where pairs were searched for last, of each system
        self._cell = self.systems.cell.clone()
        self._inverse = torch.zeros_like(self._cell)
        self._is_new = torch.ones(
            len(self._cell), dtype=torch.bool, device=potential.device
        )  # never searched
        self._pair_system = self._atom_system[:0]
        self._ranges: Tensor | None = None  # of the pairs: far, near or short
        self._order = self._atom_system[:0]
        self._batch: Batch | None = None

    @own_settings
    def evaluate(self, position: Tensor, cell: Tensor, derivatives: bool = True) -> Output:
        """Evaluate the crystals at positions [A, 3] and cells [S, 3, 3], float64; see `graph`.

        Without `derivatives` forces and stress are NaN.
        """
        if self._recorded is not None and derivatives:
            if (output := self._recorded.evaluate(position, cell)) is not None:
                self.systems = replace(self.systems, position=position, cell=cell)
                return output
            self._recorded = None
        # not for crystals that are evaluated once, nor for those of which only energies are asked
        begins = derivatives and self._recorded is None and self._batch is not None
        batch = self.graph(position, cell)
        if self._record is not None and begins:
            host = self.systems.to("cpu")
            if n_candidates(self.potential, host) <= MAX_CANDIDATES:
                self._recorded = RecordedSystems(FixedSystems(self.potential, host, batch), self._record)
        return self.potential(batch, derivatives)

    def graph(self, position: Tensor, cell: Tensor) -> Batch:
        """Build the graph at positions [A, 3] and cells [S, 3, 3], float64, on the potential's device.

        Raises:
            Unsound: for systems that `fastchgnet.predict` would refuse.
        """
        config = self.potential.config
        self.systems = replace(self.systems, position=position, cell=cell)
        stale = self._stale() | self._is_new
        if self._pairs is None or stale.any():
            self._search(stale.nonzero()[:, 0].tolist())
        pairs = self._pairs
        assert pairs is not None
        start, end = (position.index_select(0, atoms) for atoms in (pairs.center, pairs.neighbor))
        vector = pair_vector(start, end, pairs.image, cell.index_select(0, self._pair_system))
        distance2 = squared_length(vector)
        if len(distance2) and distance2.min() < MIN_DISTANCE**2:
            self._refuse(range(self.systems.n_systems), self.systems.to("cpu"))
        near, short = distance2 < config.atom_cutoff**2, distance2 < config.bond_cutoff**2
        ranges = near.to(torch.int8) + short
        if self._batch is None or self._ranges is None or not torch.equal(ranges, self._ranges):
            is_first = self._batch is None
            self._ranges = None  # Ctrl-C below must not leave the ranges of one graph beside another
            self._order = near_first(near, short)[0]
            self._batch = graph_of_pairs(self.systems, pairs, vector, near, short)
            self._ranges = ranges
            if is_first:
                warn_of_lone_atoms(self._batch, config.atom_cutoff)
            return self._batch
        volume = cell_volume(cell, self.systems.pbc)
        return replace(self._batch, bond_vector=vector.index_select(0, self._order), cell=cell, volume=volume)

    def exchange(self, kept: Sequence[int], joining: Systems) -> MovingSystems:
        """Return some of these crystals, with the neighbours found for them, and others behind them.

        Args:
            kept: which of these, in their new order.
            joining: crystals on the host.
        """
        joining = joining.to(self.potential.device)
        staying = self.systems.subset(kept)
        found = replace(self.systems, position=self._position, cell=self._cell).subset(kept)
        new = MovingSystems(self.potential, _joined(staying, joining), self.skin)
        new._position = torch.cat([found.position, joining.position])
        new._cell = torch.cat([found.cell, joining.cell])
        new._inverse[: len(kept)] = self._inverse[list(kept)]
        new._is_new[: len(kept)] = self._is_new[list(kept)]
        new._found = {place: self._found[index] for place, index in enumerate(kept) if index in self._found}
        return new

    def _stale(self) -> Tensor:
        """Tell of which systems [S] a pair might be missing.

        A pair r that was farther away than cutoff + skin has become r D + u_j - u_i, with D the deformation
        of the cell and u the rest of the displacements; it is at least
        (1 - |D - 1|)(cutoff + skin) - 2 max |u| long. NaN is stale.
        """
        systems, cutoff = self.systems, self.potential.config.atom_cutoff
        reach: Tensor | float = cutoff + self.skin
        before = self._position
        if not torch.equal(systems.cell, self._cell):
            strain = strains(self._inverse, systems.pbc, systems.cell - self._cell)
            reach = reach * (1 - torch.linalg.matrix_norm(strain))
            before = before + (before[:, None] @ strain.index_select(0, self._atom_system))[:, 0]
        moved = torch.linalg.vector_norm(systems.position - before, dim=1)
        farthest = moved.new_zeros(systems.n_systems).scatter_reduce(0, self._atom_system, moved, "amax")
        return ~(reach - 2 * farthest >= cutoff)

    def _search(self, stale: Sequence[int]) -> None:
        """Search for the pairs of some systems anew."""
        host = self.systems.to("cpu")
        some = host.subset(stale)
        self._refuse(stale, some)
        device, cutoff = self._cell.device, self.potential.config.atom_cutoff + self.skin
        inverse = inverse_boxes(some)
        chosen = torch.tensor(stale, dtype=torch.int64, device=device)
        self._is_new[chosen] = True  # after Ctrl-C below these systems are searched anew
        self._pairs = self._ranges = None
        for index, found in zip(stale, find_pairs(some, cutoff), strict=True):
            self._found[index] = _sorted(found)
        moved = torch.isin(self._atom_system, chosen)
        self._position[moved] = self.systems.position[moved]
        self._cell[chosen] = self.systems.cell[chosen]
        self._inverse[chosen] = inverse.to(device)
        self._is_new[chosen] = False
        joined = concatenated([self._found[index] for index in range(host.n_systems)], host.n_atoms)
        pairs = Pairs(*(values.to(device) for values in joined))
        self._pair_system = self._atom_system.index_select(0, pairs.center)
        self._pairs = pairs

    def _refuse(self, indices: Sequence[int], host: Systems) -> None:
        """Raise Unsound where one of these systems, given on the host, is no crystal."""
        if found := flaws(host):
            raise Unsound({indices[index]: reason for index, reason in found.items()})


def _joined(first: Systems, second: Systems) -> Systems:
    """Put systems behind others."""
    return Systems(
        atomic_number=torch.cat([first.atomic_number, second.atomic_number]),
        position=torch.cat([first.position, second.position]),
        cell=torch.cat([first.cell, second.cell]),
        pbc=torch.cat([first.pbc, second.pbc]),
        n_atoms=first.n_atoms + second.n_atoms,
    )


def _sorted(pairs: Pairs) -> Pairs:
    """Put pairs into an order and a direction that depend on nothing but the set."""
    center, neighbor, image = (values.numpy() for values in pairs)
    first = image[np.arange(len(image)), (image != 0).argmax(1)]  # of the components that are not zero
    back = (center > neighbor) | ((center == neighbor) & (first < 0))
    start, end = np.where(back, neighbor, center), np.where(back, center, neighbor)
    image = np.where(back[:, None], -image, image)
    order = np.lexsort((*image.T[::-1], end, start))
    return Pairs(*(torch.from_numpy(values[order]) for values in (start, end, image)))
