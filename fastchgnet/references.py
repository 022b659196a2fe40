"""Reference energies: the part of the energies that is linear in the composition.

The model predicts what is left. Per-atom energies are fitted to atomic fractions, as chgnet's AtomRef
does: min over e of  sum over crystals of (E / n - sum over elements of (n_z / n) e_z)^2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from ase.data import chemical_symbols
from torch import Tensor

from fastchgnet.errors import InputError
from fastchgnet.graph import Systems
from fastchgnet.units import MAX_ATOMIC_NUMBER

_RANK_TOLERANCE = 1e-10
"""Relative singular value below which a combination of elements is undetermined.

Rounding of the fractions leaves 1e-15; an element in one crystal of ten million still has 1e-6.
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class References:
    """Energy per atom of each element, and what the data could not determine."""

    energies: Tensor  # [94] float64, eV; index is Z - 1, zero for absent elements
    absent: tuple[str, ...]  # elements in no crystal
    inseparable: tuple[tuple[str, ...], ...]  # groups of elements of which only combinations are known


def fit_references(chunks: Iterable[tuple[Systems, Tensor]]) -> References:
    """Fit one energy per element by least squares; of several equally good solutions take the shortest.

    A warning names the elements whose energies the crystals cannot tell apart, such as two that always
    occur in the same proportion.

    Args:
        chunks: crystals and their energies [S] (total, eV), in pieces that fit in memory; a crystal
            whose energy is NaN is left out.

    Raises:
        InputError: no crystal has an energy.
    """
    # The triangular factor of all rows so far stands for them exactly, in 95 x 95 numbers.
    factor = torch.zeros(0, MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    for systems, energy in chunks:
        factor = torch.linalg.qr(torch.cat([factor, _rows(systems, energy)]), mode="r").R
    matrix, target = factor[:, :-1], factor[:, -1]
    present = matrix.any(dim=0).nonzero()[:, 0]
    if not len(present):
        raise InputError("no crystal has an energy, so that reference energies cannot be fitted")
    left, singular, right = torch.linalg.svd(matrix[:, present], full_matrices=False)
    known = singular > _RANK_TOLERANCE * singular[0]
    energies = torch.zeros(MAX_ATOMIC_NUMBER, dtype=torch.float64)
    energies[present] = right[known].T @ ((left[:, known].T @ target) / singular[known])
    symbols = [chemical_symbols[z + 1] for z in present.tolist()]
    groups = tuple(tuple(symbols[i] for i in group) for group in _entangled(right[known]))
    if groups:
        named = "; ".join(", ".join(group) for group in groups)
        logger.warning("only combinations of these reference energies are determined: %s", named)
    absent = tuple(s for s in chemical_symbols[1 : MAX_ATOMIC_NUMBER + 1] if s not in symbols)
    return References(energies, absent, groups)


def _rows(systems: Systems, energy: Tensor) -> Tensor:
    """Return [S, 95]: atomic fractions and energy per atom of the crystals that have one."""
    n_atoms = torch.tensor(systems.n_atoms, dtype=torch.float64)
    cell = systems.atom_system * MAX_ATOMIC_NUMBER + systems.atomic_number - 1
    counts = torch.bincount(cell, minlength=systems.n_systems * MAX_ATOMIC_NUMBER)
    fractions = counts.view(-1, MAX_ATOMIC_NUMBER) / n_atoms[:, None]
    rows = torch.cat([fractions, (energy.double() / n_atoms)[:, None]], dim=1)
    return rows[~torch.isnan(energy)]


def _entangled(determined: Tensor) -> list[list[int]]:
    """Group the columns that an orthonormal basis of the determined combinations does not separate."""
    missing = torch.eye(determined.shape[1], dtype=torch.float64) - determined.T @ determined
    linked = [set(row.nonzero()[:, 0].tolist()) for row in missing.abs() > 1e-6]
    groups: list[set[int]] = []
    for links in filter(None, linked):
        touching = [group for group in groups if group & links]
        groups = [group for group in groups if not group & links] + [links.union(*touching)]
    return sorted(map(sorted, groups))
