"""Units: inside the package energies are total eV, lengths A, stress eV/A^3 (positive = tension), mu_B.

Other units exist only in readers, the loss, reports and the importer of published weights. The
constants are ASE's (CODATA), so that a round trip through ASE is exact.
"""

from __future__ import annotations

from ase import units as ase_units

GPA = ase_units.GPa
"""One GPa in eV/A^3."""

MAX_ATOMIC_NUMBER = 94
"""Elements H to Pu, as in the published models."""
