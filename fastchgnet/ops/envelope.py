"""The smooth cutoff of pairs: one at zero distance, zero with two derivatives from the cutoff on.

With xi = min(r / rc, 1) and c = p(p+1)(p+2)/2,

    u  = (1 - xi)^3 sum_{k<p} (k+1)(k+2)/2 xi^k
    u' = -c xi^(p-1) (1 - xi)^2
"""

from __future__ import annotations

import torch
from torch import Tensor


def envelope(xi: Tensor, p: int) -> Tensor:
    """Evaluate u(xi) in plain PyTorch, differentiable to any order.

    u = 1 - (p+1)(p+2)/2 xi^p + p(p+2) xi^(p+1) - p(p+1)/2 xi^(p+2), which the FastCHGNet paper's Eqs. 12
    and 13 misprint, in the exactly equal form (1-xi)^3 sum_{k<p} (k+1)(k+2)/2 xi^k. The polynomial cancels
    near the cutoff: there it errs by 1e-5 in fp32, this form by 4e-7.
    """
    xi = xi.clamp(max=1.0)
    series = torch.full_like(xi, p * (p + 1) / 2)
    for k in range(p - 2, -1, -1):
        series = series * xi + (k + 1) * (k + 2) / 2
    return (1 - xi) ** 3 * series


def envelope_slope(xi: Tensor, p: int) -> Tensor:
    """Evaluate u'(xi)."""
    xi = xi.clamp(max=1.0)
    return -p * (p + 1) * (p + 2) / 2 * xi ** (p - 1) * (1 - xi) ** 2
