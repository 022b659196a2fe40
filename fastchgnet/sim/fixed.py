"""Crystals whose graphs have static shapes and are built on their device: what can be recorded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastchgnet.data.frame import MIN_DISTANCE, periodic_box
from fastchgnet.device_graph import build_graph, count_candidates, spare_systems
from fastchgnet.graph import Batch, Output, Systems
from fastchgnet.neighbors import squared_length
from fastchgnet.padding import Capacity, rows_of
from fastchgnet.potential import Potential
from fastchgnet.record import Record, Recorder

_SPARE_ROWS = {"short_bonds": 0.2, "long_bonds": 0.1, "angles": 0.4}
"""Rows to spare for a graph that changes as atoms move, relative to those of now."""

_SPARE_CANDIDATES = 0.3
"""As above, for candidate pairs, whose number follows the cell."""

MAX_STRAIN = 0.5
"""Norm of a cell's strain up to which the room that was made for it may do."""

MAX_CANDIDATES = 100_000_000
"""Candidate pairs beyond which keeping a list of neighbours is faster than trying them all in every step."""


class FixedSystems:
    """S crystals with A atoms, and room for their graphs.

    Args:
        potential: the model.
        systems: the crystals, on the host.
        batch: their graph now, or one like it.
    """

    def __init__(self, potential: Potential, systems: Systems, batch: Batch) -> None:
        self._potential = potential
        rows = rows_of(batch)
        spare = {
            name: getattr(rows, name) + math.ceil(share * getattr(rows, name)) + 64
            for name, share in _SPARE_ROWS.items()
        }
        # some ghosts, over which those of the other rows are spread
        self._capacity = Capacity(rows.systems + 1, rows.atoms + max(8, rows.atoms // 16), **spare)
        self._systems = spare_systems(systems, *self._capacity[:2]).to(potential.device)
        self._inverse = inverse_boxes(systems).to(potential.device)
        self._n_candidates = math.ceil((1 + _SPARE_CANDIDATES) * n_candidates(potential, systems))

    @property
    def device(self) -> torch.device:
        """Where the crystals are."""
        return self._inverse.device

    def evaluate(self, position: Tensor, cell: Tensor) -> tuple[Output, Tensor]:
        """Evaluate the crystals at positions [A, 3] and cells [S, 3, 3], without asking the host.

        Returns:
            the output, and whether it means anything, a bool scalar on the device: it does not where graphs
            have outgrown their room, cells are others than they were, or the crystals are none any more.
        """
        position, cell, is_alike = self._sane(position, cell)
        spare = self._systems
        moved = dataclasses.replace(
            spare,
            position=torch.cat([position, spare.position[len(position) :]]),
            cell=torch.cat([cell, spare.cell[len(cell) :]]),
        )
        config = self._potential.config
        cutoffs = (config.atom_cutoff, config.bond_cutoff)
        batch, fits = build_graph(moved, *cutoffs, self._capacity, self._n_candidates)
        is_apart = squared_length(batch.bond_vector).min() >= MIN_DISTANCE**2
        output = self._potential(batch)
        n_systems, n_atoms = len(cell), len(position)
        real = Output(
            energy=output.energy[:n_systems],
            forces=output.forces[:n_atoms],
            stress=output.stress[:n_systems],
            magmoms=output.magmoms[:n_atoms],
            site_energies=output.site_energies[:n_atoms],
        )
        return real, fits & is_apart & is_alike

    def _sane(self, position: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put what it was made for in the place of what could keep a search busy for ever; and tell."""
        first, pbc = self._systems.cell[: len(cell)], self._systems.pbc[: len(cell)]
        is_alike = torch.linalg.matrix_norm(strains(self._inverse, pbc, cell - first)) < MAX_STRAIN
        cell = torch.where(is_alike[:, None, None], cell, first)
        is_known = position.isfinite()
        return torch.where(is_known, position, 0.0), cell, is_alike.all() & is_known.all()


class RecordedSystems:
    """Fixed crystals that the host evaluates with a single call.

    Args:
        fixed: the crystals.
        record: makes recordings.
    """

    def __init__(self, fixed: FixedSystems, record: Record) -> None:
        self._fixed = fixed
        self._recorder = Recorder(self._evaluate, fixed.device, record)
        self._output: Output | None = None

    def evaluate(self, position: Tensor, cell: Tensor) -> Output | None:
        """Evaluate the crystals; None where that means nothing. See `FixedSystems.evaluate`."""
        if not self._recorder("evaluate", [position, cell]).item():
            return None
        assert self._output is not None
        return Output(*(values.clone() for values in self._output))

    def _evaluate(self, shapes: str, inputs: Sequence[Tensor]) -> Tensor:
        output, is_sound = self._fixed.evaluate(*inputs)
        if self._output is None:
            self._output = Output(*(torch.empty_like(values) for values in output))
        for place, values in zip(self._output, output, strict=True):
            place.copy_(values)
        return is_sound


def inverse_boxes(systems: Systems) -> Tensor:
    """Invert the cells of systems on the host, [S, 3, 3], whatever they say along open axes."""
    boxes = map(periodic_box, systems.cell.numpy(), systems.pbc.numpy())
    return torch.from_numpy(np.array([np.linalg.inv(box) for box in boxes]).reshape(-1, 3, 3))


def strains(inverse: Tensor, pbc: Tensor, change: Tensor) -> Tensor:
    """Strains that changes of cells are, [S, 3, 3]; along open axes a cell means nothing and nothing strains.

    Args:
        inverse: of the cells before, see `inverse_boxes`.
        pbc: [S, 3].
        change: [S, 3, 3], A.
    """
    return inverse @ torch.where(pbc[:, :, None], change, 0.0)


def n_candidates(potential: Potential, systems: Systems) -> int:
    """Count the pairs, with images, that a search without lists tries for systems on the host."""
    sizes = torch.tensor(systems.n_atoms).numpy()
    return int(count_candidates(systems.cell, systems.pbc, sizes, potential.config.atom_cutoff).sum())
