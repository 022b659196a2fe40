"""One labelled crystal on the host: what readers yield and what the store takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import gcd

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray
from vesin import NeighborList

from fastchgnet.errors import InputError
from fastchgnet.units import MAX_ATOMIC_NUMBER

MIN_DISTANCE = 0.3
"""Atoms closer than this, A, are a broken file and not a crystal."""

MIN_VOLUME = 0.5
"""Volume of a crystal for each atom, A^3; hydrogen at the pressures inside Jupiter has more.

An atom in a cell that is hardly longer than MIN_DISTANCE would have a hundred thousand neighbours.
"""

MIN_VOLUME_RATIO = 1e-4
"""Smallest volume of the periodic cell, relative to the product of its edges, that is not flat.

A flatter three-dimensional cell of ordinary edges has a lattice vector shorter than MIN_DISTANCE.
"""

MAX_ASYMMETRY = 0.01
"""Largest |stress - stress^T| relative to max |stress|; files round each component on its own."""


MAX_LABEL = 1e12
"""Larger numbers, in eV, A and mu_B, are a broken file; float32, in which they are stored, ends at 3e38."""

MAX_LENGTH = 1e4
"""Longest periodic lattice vector, and widest extent along an open axis, A.

Beyond it float32 is coarser than 1e-3 A, and the cells of the neighbour search become too many.
"""

MAX_POSITION = 1e6
"""Farthest from the origin, A; beyond it float64 is coarser than 1e-10 A, which wrapping would lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A crystal and its labels, in internal units; a missing label is NaN (scalar) or None (array)."""

    numbers: NDArray[np.int64]  # [n] atomic numbers
    positions: NDArray[np.float64]  # [n, 3] A
    cell: NDArray[np.float64]  # [3, 3] rows are the lattice vectors, A
    pbc: NDArray[np.bool_]  # [3]
    source: str  # "file:frame"; names the frame in every message
    group: str  # the material; splits never cut through one
    config_type: str = "default"
    energy: float = field(default=float("nan"))  # total, eV
    forces: NDArray[np.float64] | None = None  # [n, 3] eV/A
    stress: NDArray[np.float64] | None = None  # [3, 3] eV/A^3, positive = tension
    magmoms: NDArray[np.float64] | None = None  # [n] mu_B

    def check(self) -> None:
        """Raise InputError, naming the frame and the reason, where no crystal can look like this."""
        if flaw := self.flaw():
            raise InputError(f"{self.source}: {flaw}")

    def flaw(self) -> str | None:
        """Say why no crystal can look like this."""
        return self._malformed() or self._unphysical()

    def _malformed(self) -> str | None:
        n = len(self.numbers)
        if n == 0:
            return "no atoms"
        unknown = self.numbers[(self.numbers < 1) | (self.numbers > MAX_ATOMIC_NUMBER)]
        if len(unknown):
            return f"unknown element Z = {unknown[0]}; known are 1 to {MAX_ATOMIC_NUMBER}"
        if self.pbc.shape != (3,):
            return f"pbc has shape {self.pbc.shape}, expected (3,)"
        for name, value, shape in (
            ("positions", self.positions, (n, 3)),
            ("cell", self.cell, (3, 3)),
            ("forces", self.forces, (n, 3)),
            ("stress", self.stress, (3, 3)),
            ("magmoms", self.magmoms, (n,)),
        ):
            if value is None:
                continue
            if value.shape != shape:
                return f"{name} have shape {value.shape}, expected {shape}"
            if not np.isfinite(value).all():
                return f"{name} contain NaN or infinity"
            if np.abs(value).max() > MAX_LABEL:
                return f"{name} contain numbers above {MAX_LABEL:g}"
        if np.isinf(self.energy):
            return "energy is infinite"
        if abs(self.energy) > MAX_LABEL:
            return f"energy is above {MAX_LABEL:g} eV"
        return None

    def _unphysical(self) -> str | None:
        if _flat(self.cell[self.pbc]):
            return "the cell has no volume although it is periodic"
        if reason := _too_large(self.positions, self.cell, self.pbc):
            return reason
        volume = abs(np.linalg.det(self.cell)) / len(self.numbers)
        if self.pbc.all() and volume < MIN_VOLUME:
            return f"{volume:.3g} A^3 for each atom, the least is {MIN_VOLUME} A^3"
        i, j, distance = _closest(self.positions, self.cell, self.pbc)
        if distance < MIN_DISTANCE:
            return f"atoms {i} and {j} overlap: {distance:.3f} A apart, the least is {MIN_DISTANCE} A"
        if self.stress is None:
            return None
        if np.abs(self.stress - self.stress.T).max() > MAX_ASYMMETRY * np.abs(self.stress).max():
            return "the stress is not symmetric"
        return None


_SYMBOLS = dict(enumerate(chemical_symbols))


def reduced_formula(numbers: Iterable[int]) -> str:
    """Write a composition with the smallest whole numbers, elements in alphabetical order."""
    counts = Counter(_SYMBOLS.get(number, f"Z{number}") for number in numbers)
    divisor = gcd(*counts.values())
    return "".join(
        symbol + (str(count // divisor) if count > divisor else "")
        for symbol, count in sorted(counts.items())
    )


def periodic_box(cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Replace the vectors of axes without periodicity by unit vectors orthogonal to the periodic ones.

    Files may leave those vectors zero or dependent; with these the box [3, 3] can always be inverted.
    """
    if pbc.all():
        return cell
    box = np.array(cell)
    n_periodic = int(pbc.sum())
    box[~pbc] = np.linalg.svd(cell[pbc])[2][n_periodic:] if n_periodic else np.eye(3)
    return box


def _flat(vectors: NDArray[np.float64]) -> bool:
    """Tell whether the lattice vectors [k, 3] span no volume (area, length)."""
    lengths = np.linalg.norm(vectors, axis=1)
    if (lengths < MIN_DISTANCE).any():
        return True
    unit = vectors / lengths[:, None]
    return bool(np.linalg.det(unit @ unit.T) < MIN_VOLUME_RATIO**2)


def _too_large(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> str | None:
    """Say which length no crystal has."""
    if np.abs(positions).max() > MAX_POSITION:
        return f"an atom is farther than {MAX_POSITION:g} A from the origin"
    if np.linalg.norm(cell[pbc], axis=1).max(initial=0) > MAX_LENGTH:
        return f"a lattice vector is longer than {MAX_LENGTH:g} A"
    if not pbc.all():
        along_open_axes = (positions @ np.linalg.inv(periodic_box(cell, pbc)))[:, ~pbc]
        if np.ptp(along_open_axes, axis=0).max() > MAX_LENGTH:
            return f"the atoms are more than {MAX_LENGTH:g} A apart along an axis that is not periodic"
    return None


def _closest(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> tuple[int, int, float]:
    """Find two atoms less than MIN_DISTANCE apart, images included; (0, 0, inf) where there are none."""
    box = periodic_box(cell, pbc)
    inverse = np.linalg.inv(box)
    heights = 1 / np.linalg.norm(inverse, axis=0)
    n = len(positions)
    # The nearest image in fractional coordinates is the nearest in space for pairs this close as long
    # as they are closer than half of each height; a neighbour list is slower, but knows no such limit.
    if n > 64 or (heights[pbc] < 2.1 * MIN_DISTANCE).any():
        # vesin's cells have the size of the cutoff: a cutoff of MIN_DISTANCE would make millions.
        neighbors = NeighborList(cutoff=2.0, full_list=False)
        centers, others, distances = neighbors.compute(positions, box, pbc, "ijd")
    else:
        centers, others = np.triu_indices(n, k=1)
        fractions = positions @ inverse
        apart = fractions[others] - fractions[centers]
        apart[:, pbc] -= np.round(apart[:, pbc])
        distances = np.linalg.norm(apart @ box, axis=1)
    if len(distances) == 0 or distances.min() >= MIN_DISTANCE:
        return 0, 0, float("inf")
    nearest = int(distances.argmin())
    return int(centers[nearest]), int(others[nearest]), float(distances[nearest])
