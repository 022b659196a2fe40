"""One labelled crystal on the host: what readers yield and what the store takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastchgnet.errors import InputError
from fastchgnet.units import MAX_ATOMIC_NUMBER

MIN_DISTANCE = 0.3
"""Atoms closer than this, A, are a broken file and not a crystal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A crystal and its labels, in internal units; a missing label is NaN (scalar) or None (array)."""

    numbers: NDArray[np.int64]  # [n] atomic numbers
    positions: NDArray[np.float64]  # [n, 3] A
    cell: NDArray[np.float64]  # [3, 3] rows are the lattice vectors, A
    pbc: NDArray[np.bool_]  # [3]
    source: str  # "file:index" or the data set's own id; names the frame in every message
    group: str  # the material; splits never cut through one
    config_type: str = "default"
    energy: float = field(default=float("nan"))  # total, eV
    forces: NDArray[np.float64] | None = None  # [n, 3] eV/A
    stress: NDArray[np.float64] | None = None  # [3, 3] eV/A^3, positive = tension
    magmoms: NDArray[np.float64] | None = None  # [n] mu_B

    def check(self) -> None:
        """Raise InputError, naming the frame and the reason, where no crystal can look like this."""
        reason = self._flaw()
        if reason:
            raise InputError(f"{self.source}: {reason}")

    def _flaw(self) -> str | None:
        n = len(self.numbers)
        if n == 0:
            return "no atoms"
        if self.numbers.min() < 1 or self.numbers.max() > MAX_ATOMIC_NUMBER:
            bad = self.numbers[(self.numbers < 1) | (self.numbers > MAX_ATOMIC_NUMBER)][0]
            return f"unknown element Z = {bad}; known are 1 to {MAX_ATOMIC_NUMBER}"
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
        if np.isinf(self.energy):
            return "energy is infinite"
        return None
