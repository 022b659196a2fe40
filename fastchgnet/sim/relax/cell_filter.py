"""The coordinates in which crystals relax: those of ASE's `FrechetCellFilter`, for many systems at once.

With the cell C0 at the start (rows are lattice vectors), the logarithm U of the deformation and n atoms:

    F = exp(U)     cell = C0 F^T     r_i = z_i F^T     coordinates: z_i and n U
    force on z_i:  f_i F
    force on n U:  L(U^T, W F^-T) / n     W = -V (stress + pressure)     L(X, Y) = d/dt exp(X + t Y) at t = 0

and L(X, Y) is a block of exp([[X, Y], [0, X]]). A fixed cell is one none of whose components is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastchgnet.errors import InputError
from fastchgnet.sim.relax.fire import Vector
from fastchgnet.units import VOIGT

Kind = Literal["full", "fixed", "hydrostatic", "constant-volume", "components"]

COMPONENTS = ("xx", "yy", "zz", "yz", "xz", "xy")
"""Components of the strain in Voigt order."""


class CellMode(NamedTuple):
    """How cells may change."""

    kind: Kind
    components: tuple[str, ...] = COMPONENTS  # of the strain that may change

    @classmethod
    def of(cls, text: str) -> CellMode:
        """Read full, fixed, hydrostatic, constant-volume, or components of the strain such as xx,yy,xy.

        Raises:
            InputError: it is none of these.
        """
        kinds = get_args(Kind)[:-1]
        names = text.split(",")
        if text in kinds:
            return cls(text, () if text == "fixed" else COMPONENTS)  # type: ignore[arg-type]
        if not set(names) <= set(COMPONENTS):
            some = "components of the strain that may change, as xx,yy,xy"
            raise InputError(f"cell {text!r}: choose {', '.join(kinds)}, or {some}")
        return cls("components", tuple(name for name in COMPONENTS if name in names))

    def free(self) -> Tensor:
        """Which components of the deformation may change, [3, 3] float64, 0 or 1."""
        free = torch.zeros(3, 3, dtype=torch.float64)
        for name, row, column in zip(COMPONENTS, *VOIGT, strict=True):
            free[row, column] = free[column, row] = float(name in self.components)
        return free


class Geometry(NamedTuple):
    """Where S crystals of A atoms are."""

    position: Tensor  # [A, 3] float64, A
    cell: Tensor  # [S, 3, 3] float64, A
    deformation: Tensor  # [S, 3, 3] F


@dataclass(frozen=True, slots=True)
class CellFilter:
    """From coordinates to crystals and from forces on crystals to forces on coordinates."""

    kind: Kind
    pressure: float  # eV/A^3
    start: Tensor  # [S, 3, 3] the cells that coordinates are measured from, float64, A
    free: Tensor  # [S, 3, 3] which components of the deformation may change, 0 or 1; all 0: a fixed cell
    n_atoms: Tensor  # [S] float64
    atom_system: Tensor  # [A]

    def coordinates(self, position: Tensor) -> Vector:
        """Return the coordinates of the cells at the start and of positions [A, 3] in them."""
        return Vector(position, torch.zeros_like(self.start))

    def geometry(self, coordinates: Vector) -> Geometry:
        """Return the crystals that have these coordinates."""
        deformation = self._deformation(coordinates)
        transposed = deformation.mT
        position = (coordinates.atoms[:, None] @ transposed.index_select(0, self.atom_system))[:, 0]
        return Geometry(position, self.start @ transposed, deformation)

    def force(self, coordinates: Vector, geometry: Geometry, forces: Tensor, stress: Tensor) -> Vector:
        """Return the force on the coordinates.

        Args:
            coordinates: where the crystals are.
            geometry: what `geometry` made of them.
            forces: [A, 3] eV/A.
            stress: [S, 3, 3] eV/A^3; may be NaN where cells are fixed.
        """
        deformation = geometry.deformation
        atoms = (forces[:, None] @ deformation.index_select(0, self.atom_system))[:, 0]
        if not self.may_change:
            return Vector(atoms, torch.zeros_like(self.start))
        one = torch.eye(3, dtype=stress.dtype, device=stress.device)
        volume = torch.linalg.det(geometry.cell).abs()[:, None, None]
        virial = -volume * ((stress + stress.mT) / 2 + self.pressure * one)
        if self.kind == "hydrostatic":
            virial = _trace(virial) / 3 * one
        virial = torch.where(self.free > 0, virial, 0.0)
        force = _frechet(self._logarithm(coordinates).mT, torch.linalg.solve(deformation, virial.mT).mT)
        if self.kind == "constant-volume":
            force = force - _trace(force) / 3 * one
        return Vector(atoms, force / self.n_atoms[:, None, None])

    def allowed(self, coordinates: Vector) -> Vector:
        """Take from the deformation what is not free, as ASE does: F becomes 1 + free * (F - 1)."""
        if self.kind != "components":
            return coordinates
        one = torch.eye(3, dtype=self.start.dtype, device=self.start.device)
        deformation = one + self.free * (self._deformation(coordinates) - one)
        return Vector(coordinates.atoms, log_matrix(deformation) * self.n_atoms[:, None, None])

    @property
    def may_change(self) -> bool:
        """Whether any cell may change."""
        return self.kind != "fixed"

    def _logarithm(self, coordinates: Vector) -> Tensor:
        """U, [S, 3, 3]."""
        return coordinates.cells / self.n_atoms[:, None, None]

    def _deformation(self, coordinates: Vector) -> Tensor:
        """F, [S, 3, 3]."""
        if not self.may_change:
            return torch.eye(3, dtype=self.start.dtype, device=self.start.device).expand_as(self.start)
        return torch.linalg.matrix_exp(self._logarithm(coordinates))


def _trace(matrix: Tensor) -> Tensor:
    """Traces of matrices [S, 3, 3], [S, 1, 1]."""
    return matrix.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def _frechet(point: Tensor, direction: Tensor) -> Tensor:
    """Derivative of the matrix exponential at `point` in a `direction`, [S, 3, 3] all."""
    # directions are scaled to one: the more of its argument the exponential halves, the less exact it is
    size = torch.linalg.matrix_norm(direction)[:, None, None].clamp(min=torch.finfo(direction.dtype).tiny)
    zero = torch.zeros_like(point)
    block = torch.cat([torch.cat([point, direction / size], 2), torch.cat([zero, point], 2)], 1)
    return torch.linalg.matrix_exp(block)[:, :3, 3:] * size


def log_matrix(matrix: Tensor) -> Tensor:
    """Return the logarithms of matrices [S, 3, 3] near one.

    The eighth root R is so near to one that log R = 2 artanh((R - 1)(R + 1)^-1) takes few terms.
    """
    one = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
    root = _square_root(_square_root(_square_root(matrix)))
    ratio = torch.linalg.solve(root + one, root - one)
    square = ratio @ ratio
    total = power = ratio
    for n in range(3, 21, 2):
        power = power @ square
        total = total + power / n
    return 16 * total


def _square_root(matrix: Tensor) -> Tensor:
    """Return square roots of matrices near one by the iteration of Denman and Beavers."""
    root = matrix
    inverse = torch.eye(3, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    for _ in range(8):  # the number of right digits doubles each time
        root, inverse = (root + torch.linalg.inv(inverse)) / 2, (inverse + torch.linalg.inv(root)) / 2
    return root
