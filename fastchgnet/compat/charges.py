"""chgnet's oxidation states from magnetic moments."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from ase.data import chemical_symbols

from fastchgnet.compat.structures import require_pymatgen
from fastchgnet.errors import InputError
from fastchgnet.sim.charges import ChargeTable

if TYPE_CHECKING:
    from pymatgen.core import Structure

logger = logging.getLogger(__name__)

FIXED = {"Li": 1.0, "O": -2.0}
RANGES = {"Mn": {(0.5, 1.5): 2, (1.5, 2.5): 3, (2.5, 3.5): 4, (3.5, 4.2): 3, (4.2, 5.0): 2}}


def solve_charge_by_mag(
    structure: Structure,
    default_ox: Mapping[str, float] | None = None,
    ox_ranges: Mapping[str, Mapping[tuple[float, float], int]] | None = None,
) -> Structure | None:
    """Decorate a structure with oxidation states; None, and a warning, where a site has none.

    Args:
        structure: of pymatgen, with the site property final_magmom or magmom; it is left alone.
        default_ox: oxidation state by element; Li +1 and O -2 unless given.
        ox_ranges: by element, oxidation state by the range of moments, mu_B, the upper end excluded; Mn
            unless given.

    Raises:
        InputError: no magnetic moments, or no pymatgen.
    """
    require_pymatgen()
    fixed, ranges = default_ox or FIXED, ox_ranges or RANGES
    properties = structure.site_properties
    magmoms = properties.get("final_magmom", properties.get("magmom"))
    bare = structure.copy()
    bare.remove_oxidation_states()
    numbers = [site.specie.Z for site in bare]
    if magmoms is None:
        if not ranges.keys().isdisjoint(chemical_symbols[number] for number in numbers):
            raise InputError("structure has neither of the site properties final_magmom and magmom")
        magmoms = [0.0] * len(numbers)
    rows = {
        element: [(*limits, state) for limits, state in states.items()] for element, states in ranges.items()
    }
    moments = np.array(magmoms, dtype=float)  # where there is none, NaN
    charges = ChargeTable.model_validate({"fixed": fixed, "ranges": rows}).assign(numbers, moments)
    if charges is None:
        warnings.warn("Failed to solve oxidation state", stacklevel=2)
        return None
    logger.info("solved oxidation states, total charge %g", charges.sum())
    bare.add_oxidation_state_by_site(charges.tolist())
    return bare
