"""Radial and angular bases with their parameters; the mathematics stands with the ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastchgnet.graph import Index
from fastchgnet.ops.angular_basis import angular_basis
from fastchgnet.ops.bond_tables import bond_tables


class RadialBasis(nn.Module):
    """Smooth radial Bessel functions with learnable frequencies (sRBF in Eq. 2; Gasteiger et al. 2020)."""

    def __init__(self, n_radial: int, cutoff: float, envelope_p: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.envelope_p = envelope_p
        self.frequency = nn.Parameter(
            math.pi * torch.arange(1, n_radial + 1, dtype=torch.get_default_dtype())
        )

    def forward(
        self, distance: Tensor, weight: Tensor, long_weight: Tensor | None = None, n_short: int = 0
    ) -> tuple[Tensor, ...]:
        """Expand distances [U, 1], A, into [U, n_radial], and apply linear layers to that.

        See `fastchgnet.ops.bond_tables`.

        Args:
            distance: of bonds, short ones first.
            weight: [D, n_radial] of a layer on all bonds; where there is `long_weight`, [2D, n_radial],
                of one on short bonds and one on all.
            long_weight: [n, K, n_radial] of n layers on long bonds.
            n_short: how many bonds are short.
        """
        return bond_tables(
            distance, self.frequency, weight, long_weight, self.cutoff, self.envelope_p, n_short
        )


class FourierBasis(nn.Module):
    """Fourier series in the angle with learnable frequencies (FT in Eq. 2), as the published weights need.

    Has a cusp at collinear angles: acos, and frequencies that are no longer integers after training.
    """

    def __init__(self, n_angular: int) -> None:
        super().__init__()
        order = (n_angular - 1) // 2
        self.n_angular = 1 + 2 * order
        self.frequency = nn.Parameter(torch.arange(1, order + 1, dtype=torch.get_default_dtype()))

    def forward(self, short_K3: Tensor, by_i: Index, by_j: Index) -> Tensor:
        """Expand angles between short edges, A, into [T, n_angular]: 1, sines, cosines."""
        return angular_basis(short_K3, self.frequency, self.n_angular, by_i, by_j)


class ChebyshevBasis(nn.Module):
    """cos(n angle) = T_n(cos angle), n < n_angular: smooth everywhere, no acos, no parameters."""

    def __init__(self, n_angular: int) -> None:
        super().__init__()
        self.n_angular = n_angular

    def forward(self, short_K3: Tensor, by_i: Index, by_j: Index) -> Tensor:
        """Expand angles between short edges, A, into [T, n_angular], as the Fourier series."""
        return angular_basis(short_K3, None, self.n_angular, by_i, by_j)
