"""The smooth cutoff of pairs: one at zero distance, zero with two derivatives from the cutoff on.

With xi = min(r / rc, 1) and c = p(p+1)(p+2)/2,

    u  = (1 - xi)^3 sum_{k<p} (k+1)(k+2)/2 xi^k
    u' = -c xi^(p-1) (1 - xi)^2                     VJP: dr = G u' / rc

Direct heads are not differentiated by distances, let alone twice: a second derivative raises.
Saved: the distances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops.gpu import runtime


def cutoff_envelope(distance: Tensor, cutoff: float, p: int) -> Tensor:
    """Evaluate the cutoff at distances, A, of any shape."""
    return _cutoff(distance, cutoff, p)


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


def _forward(distance: Tensor, cutoff: float, p: int) -> Tensor:
    return envelope(distance / cutoff, p)


def _backward(grad: Tensor, distance: Tensor, cutoff: float, p: int) -> Tensor:
    return grad * envelope_slope(distance / cutoff, p) / cutoff


_cutoff = torch.library.custom_op("fastchgnet::envelope", _forward, mutates_args=())
_cutoff_backward = torch.library.custom_op("fastchgnet::envelope_backward", _backward, mutates_args=())
_cutoff.register_kernel("cuda")(runtime.body("radial_basis", "envelope", _forward))


@_cutoff.register_fake
def _(distance: Tensor, cutoff: float, p: int) -> Tensor:
    return torch.empty_like(distance)


@_cutoff_backward.register_fake
def _(grad: Tensor, distance: Tensor, cutoff: float, p: int) -> Tensor:
    return torch.empty_like(distance)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    distance, ctx.cutoff, ctx.p = inputs
    ctx.save_for_backward(distance)


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _cutoff_backward(grad, *ctx.saved_tensors, ctx.cutoff, ctx.p), None, None


_cutoff.register_autograd(_derivative, setup_context=_save)
