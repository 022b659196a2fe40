"""What bonds do to their ends in a direct readout: pulls along the bond, of strengths read from features.

With the features m[D] of a bond, its vector r e from its centre to its neighbour, |e| = 1, and the envelope u
of `fastchgnet.ops.envelope`,

    s_n = w_n m         f_n = s_n u(r) e            n < 2, the force and what makes the virial

VJP, with gradients F_n of f_n:

    t_n = u(r) F_n e    dm = sum over n of t_n w_n      dw_n = sum over bonds of t_n m

Heads are trained on forces, and not on derivatives of these: a second derivative raises, and so does one by
the vector. Saved: the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops._register import define, implement, no_derivative, shape_of
from fastchgnet.ops.envelope import envelope
from fastchgnet.ops.gpu import runtime


def central_pulls(
    message: Tensor, weight: Tensor, vector: Tensor, cutoff: float, p: int
) -> tuple[Tensor, Tensor]:
    """Read the strengths of pulls, and let them act along bonds.

    Args:
        message: [U, D] features of bonds.
        weight: [2, D].
        vector: [U, 3] from centres to neighbours, A.
        cutoff: A; from it on there is no pull.
        p: of the envelope.

    Returns:
        pulls [U, 2, 3], and the directions of bonds [U, 3].
    """
    return _central_pulls(message, weight, vector, cutoff, p)


def reference(
    message: Tensor, weight: Tensor, vector: Tensor, cutoff: float, p: int
) -> tuple[Tensor, Tensor]:
    """Compute the op in plain PyTorch, differentiable to any order."""
    distance = vector.norm(dim=1, keepdim=True)
    unit = vector / distance
    pull = envelope(distance / cutoff, p) * unit
    return (message @ weight.t())[:, :, None] * pull[:, None, :], unit


def _backward(
    by_pulls: Tensor, message: Tensor, weight: Tensor, vector: Tensor, cutoff: float, p: int
) -> tuple[Tensor, Tensor]:
    distance = vector.norm(dim=1, keepdim=True)
    pull = envelope(distance / cutoff, p) / distance * vector
    strength = (by_pulls * pull[:, None, :]).sum(2)
    return strength @ weight, strength.t() @ message


def _derivative(inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]) -> tuple[Any, ...]:
    message, weight, vector, cutoff, p = inputs
    if needed[2]:
        raise NotImplementedError("heads have no derivative by bond vectors")
    by_pulls = message.new_zeros(len(message), 2, 3) if grads[0] is None else grads[0].contiguous()
    return *_central_pulls_backward(by_pulls, message, weight, vector, cutoff, p), None, None, None


_INPUTS = "Tensor message, Tensor weight, Tensor vector, float cutoff, int p"
_central_pulls = define("central_pulls", f"({_INPUTS}) -> (Tensor, Tensor)", _derivative)
_central_pulls_backward = define(
    "central_pulls_backward", f"(Tensor by_pulls, {_INPUTS}) -> (Tensor, Tensor)", no_derivative
)
implement("central_pulls", reference, runtime.body("central_pulls", "forward", reference))
implement("central_pulls_backward", _backward, runtime.body("central_pulls", "backward", _backward))
shape_of(
    "central_pulls",
    lambda message, weight, vector, *_: (message.new_empty(len(message), 2, 3), torch.empty_like(vector)),
)
shape_of(
    "central_pulls_backward",
    lambda by_pulls, message, weight, *_: (torch.empty_like(message), torch.empty_like(weight)),
)
