"""Magnetic moments of atoms: the absolute value of a linear layer on their features.

With features v[A, D],

    s = w v + b         y = |s|         [A]

VJP, with a gradient G:  t = G sign s,  dv = t w,  dw = t v,  db = t.

Moments are no function of the energy: asking for a second derivative raises. Saved: the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastchgnet.ops._register import define, implement, no_derivative, shape_of
from fastchgnet.ops.gpu import runtime


def magmoms(atom_AD: Tensor, layer: nn.Linear) -> Tensor:
    """Magnetic moment of each atom, mu_B, [A].

    Args:
        atom_AD: features.
        layer: of width one.
    """
    if not runtime.serves(atom_AD):
        # where launches cost little, computing again what autograd would have saved does not pay
        return reference(atom_AD, layer.weight, layer.bias)
    return _magmoms(atom_AD, layer.weight, layer.bias)


def reference(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the op in plain PyTorch."""
    return F.linear(features, weight, bias).squeeze(1).abs()


def _backward(grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = grad[:, None] * F.linear(features, weight, bias).sign()
    return t * weight, t.t() @ features, t.sum(0)


def _derivative(inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]) -> Sequence[Any]:
    (grad,) = grads
    return (None,) * 3 if grad is None else _magmoms_backward(grad.contiguous(), *inputs)


_INPUTS = "Tensor features, Tensor weight, Tensor bias"
_magmoms = define("magmoms", f"({_INPUTS}) -> Tensor", _derivative)
_magmoms_backward = define(
    "magmoms_backward", f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)", no_derivative
)
implement("magmoms", reference, runtime.body("magmom", "forward", reference))
implement("magmoms_backward", _backward, runtime.body("magmom", "backward", _backward))
shape_of("magmoms", lambda features, *_: features.new_empty(len(features)))
shape_of("magmoms_backward", lambda _, *inputs: tuple(torch.empty_like(t) for t in inputs))
