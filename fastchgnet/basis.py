"""Radial and angular bases and the cutoff envelope, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def envelope(xi: Tensor, p: int) -> Tensor:
    """Evaluate the smooth cutoff u(xi): one at zero, zero with two derivatives from xi = 1 on.

    u = 1 - (p+1)(p+2)/2 xi^p + p(p+2) xi^(p+1) - p(p+1)/2 xi^(p+2), which the FastCHGNet paper's Eqs. 12
    and 13 misprint, in the exactly equal form (1-xi)^3 sum_{k<p} (k+1)(k+2)/2 xi^k. The polynomial cancels
    near the cutoff: there it errs by 1e-5 in fp32, this form by 4e-7.
    """
    xi = xi.clamp(max=1.0)
    series = torch.full_like(xi, p * (p + 1) / 2)
    for k in range(p - 2, -1, -1):
        series = series * xi + (k + 1) * (k + 2) / 2
    return (1 - xi) ** 3 * series


class RadialBasis(nn.Module):
    """Smooth radial Bessel functions with learnable frequencies (sRBF in Eq. 2; Gasteiger et al. 2020)."""

    def __init__(self, n_radial: int, cutoff: float, envelope_p: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.envelope_p = envelope_p
        self.frequency = nn.Parameter(
            math.pi * torch.arange(1, n_radial + 1, dtype=torch.get_default_dtype())
        )

    def forward(self, distance: Tensor) -> Tensor:
        """Expand distances [U, 1], A, into [U, n_radial]."""
        xi = distance / self.cutoff
        amplitude = math.sqrt(2 / self.cutoff) * envelope(xi, self.envelope_p) / distance
        return amplitude * torch.sin(self.frequency * xi)


class FourierBasis(nn.Module):
    """Fourier series in the angle with learnable frequencies (FT in Eq. 2), as the published weights need.

    Has a cusp at collinear angles: acos, and frequencies that are no longer integers after training.
    """

    def __init__(self, n_angular: int) -> None:
        super().__init__()
        order = (n_angular - 1) // 2
        self.frequency = nn.Parameter(torch.arange(1, order + 1, dtype=torch.get_default_dtype()))

    def forward(self, unit_i: Tensor, unit_j: Tensor) -> Tensor:
        """Expand the angles between unit vectors, [T, 3] each, into [T, n_angular]: 1, sines, cosines."""
        # Published weights know the angle as acos(k cos), whose derivative is finite at collinear angles.
        # There float32 cannot tell cos from 1; sqrt(1 - k^2 cos^2) from the cross product is exact, and
        # forces of crystals with straight bonds err by 3e-6 eV/A instead of 1e-4.
        k = 1 - 1e-6
        cross = torch.linalg.cross(unit_i, unit_j)
        sine = (k**2 * cross.square().sum(1) + (1 - k**2)).sqrt()
        phase = torch.atan2(sine, k * (unit_i * unit_j).sum(1))[:, None] * self.frequency
        constant = torch.full_like(phase[:, :1], 1 / math.sqrt(2))
        return torch.cat([constant, phase.sin(), phase.cos()], dim=1) / math.sqrt(math.pi)


class ChebyshevBasis(nn.Module):
    """cos(n angle) = T_n(cos angle), n < n_angular: smooth everywhere, no acos, no parameters."""

    def __init__(self, n_angular: int) -> None:
        super().__init__()
        self.n_angular = n_angular

    def forward(self, unit_i: Tensor, unit_j: Tensor) -> Tensor:
        """Expand the angles between unit vectors, [T, 3] each, into [T, n_angular], as the Fourier series."""
        cosine = (unit_i * unit_j).sum(1)
        terms = torch.stack([torch.ones_like(cosine), cosine], dim=1)
        while terms.shape[1] < self.n_angular:
            # T_{m+n} = 2 T_m T_n - T_{m-n} with m the highest order known: the orders double each time
            top = terms[:, -1:]
            terms = torch.cat([terms, 2 * top * terms[:, 1:] - terms[:, :-1].flip(1)], dim=1)
        constant = terms[:, :1] / math.sqrt(2)
        return torch.cat([constant, terms[:, 1 : self.n_angular]], dim=1) / math.sqrt(math.pi)
