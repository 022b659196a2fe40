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

VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])
"""Rows and columns of a symmetric matrix in Voigt order, ASE's: xx yy zz yz xz xy."""

MATRIX_FROM_VOIGT = [0, 5, 4, 5, 1, 3, 4, 3, 2]
"""Places in Voigt order of the nine numbers of the matrix."""
