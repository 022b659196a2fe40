"""Compare stresses with energies: what `prepare` does to notice a wrong sign or unit of the stress.

Between two frames of one material, close in shape, the energy changes by the work of stress and forces,

    E2 - E1 = V sigma : strain - sum_i F_i . u_i

(trapezoid rule: means of the two frames; strain from their cells, u_i at fixed cell). For a change of
volume alone that is -dE/dV = pressure. The ratio of the two sides is 1 where the stress is understood,
-1 where its sign is wrong, and about 160 or 1600 off where GPa or kbar were taken for eV/A^3.
"""

from __future__ import annotations

from math import log10

import numpy as np
from numpy.typing import NDArray

from fastchgnet.config import Config
from fastchgnet.data.reading import STRESS_FACTOR, StressSign, StressUnit
from fastchgnet.data.store import Store

MAX_PAIRS = 5_000
MIN_PAIRS = 4
VOLUME_CHANGE = (1e-3, 0.15)
"""Relative change of volume between two frames worth comparing: above the noise, within the linear range."""
MAX_DISPLACEMENT = 0.3
"""Atoms that moved farther than this, A, did work that two forces do not describe."""
MIN_WORK = 1e-4
"""Elastic work below this, eV/atom, is lost in the noise of the energies."""
MIN_AGREEMENT = 0.6
"""Fraction of the pairs that must tell the same before they are believed."""


class PressureCheck(Config):
    """What the comparison found; `advice` is None where nothing speaks against the declared unit and sign."""

    n_pairs: int
    ratio: float | None
    agreement: float | None
    advice: str | None


def check_pressure(store: Store, unit: StressUnit, sign: StressSign) -> PressureCheck:
    """Compare stresses with energies over the frames of each material.

    Args:
        store: The frames.
        unit: Unit the stresses were read in.
        sign: Sign the stresses were read in.
    """
    ratios = np.array([ratio for pair in _pairs(store) if (ratio := _work_ratio(store, pair)) is not None])
    if len(ratios) < MIN_PAIRS:
        return PressureCheck(n_pairs=len(ratios), ratio=None, agreement=None, advice=None)
    ratio = float(np.median(ratios))
    # Half a decade: the units lie a decade apart or more.
    same = (ratios * ratio > 0) & (np.abs(np.log10(np.abs(ratios / ratio))) < 0.5)
    agreement = float(same.mean())
    advice = _advice(ratio, unit, sign) if agreement >= MIN_AGREEMENT else None
    return PressureCheck(n_pairs=len(ratios), ratio=ratio, agreement=agreement, advice=advice)


def _advice(ratio: float, unit: StressUnit, sign: StressSign) -> str | None:
    """Say which unit and sign would bring the ratio to 1; None where the declared ones do."""
    true_unit = min(
        StressUnit, key=lambda other: abs(log10(abs(ratio) * STRESS_FACTOR[unit] / STRESS_FACTOR[other]))
    )
    other_sign = StressSign.COMPRESSION if sign is StressSign.TENSION else StressSign.TENSION
    true_sign = sign if ratio > 0 else other_sign
    if (true_unit, true_sign) == (unit, sign):
        return None
    return (
        f"the stress contradicts the energies: read as {unit}, positive = {sign}, it gives {1 / ratio:.3g} "
        f"times the work that they show. It looks like {true_unit}, positive = {true_sign}: "
        f"pass --stress-unit {true_unit} --stress-sign {true_sign}"
    )


def _pairs(store: Store) -> NDArray[np.int64]:
    """Frames of one material next to each other in volume, with energy and stress, [p, 2]."""
    volumes, n_atoms, groups = store.volumes, store.sizes[:, 0], store.groups
    known = np.flatnonzero(np.isfinite(store.energies) & np.isfinite(store.stresses[:, 0]))
    order = known[np.lexsort((volumes[known], n_atoms[known], groups[known]))]
    first, second = order[:-1], order[1:]
    change = np.abs(volumes[second] - volumes[first]) / volumes[first]
    alike = (groups[first] == groups[second]) & (n_atoms[first] == n_atoms[second])
    alike &= (change > VOLUME_CHANGE[0]) & (change < VOLUME_CHANGE[1])
    pairs = np.stack([first[alike], second[alike]], axis=1)
    return pairs[np.linspace(0, len(pairs) - 1, min(len(pairs), MAX_PAIRS)).astype(np.int64)]


def _work_ratio(store: Store, pair: NDArray[np.int64]) -> float | None:
    """Work by the energies over work by the stress; None where the two frames are not comparable."""
    systems, labels = store.gather(pair)
    n_atoms = systems.n_atoms[0]
    numbers = systems.atomic_number.numpy().reshape(2, n_atoms)
    if (numbers[0] != numbers[1]).any():
        return None
    cells = systems.cell.numpy()
    cell, change = cells.mean(axis=0), cells[1] - cells[0]
    strain = np.linalg.solve(cell, change)
    fractions = systems.position.numpy().reshape(2, n_atoms, 3) @ np.linalg.inv(cells)
    moved = fractions[1] - fractions[0]
    displacement = (moved - np.round(moved)) @ cell
    if np.abs(strain).max() > VOLUME_CHANGE[1] or np.abs(displacement).max() > MAX_DISPLACEMENT:
        return None
    forces = labels.forces.numpy().reshape(2, n_atoms, 3).mean(axis=0)
    internal = float((np.where(displacement == 0, 0.0, forces) * displacement).sum())
    by_energy = float(labels.energy[1] - labels.energy[0]) + internal
    volume = abs(np.linalg.det(cell))
    by_stress = float(volume * (labels.stress.numpy().mean(axis=0) * strain).sum())
    if not np.isfinite(internal) or abs(by_energy) < MIN_WORK * n_atoms or by_stress == 0:
        return None
    return by_energy / by_stress
