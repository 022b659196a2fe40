"""Sums of Huber losses, of absolute errors and of labels present, for all four targets at once.

With predictions p and labels l of a target in the unit of the loss (see `fastchgnet.loss`), d = p - l where
the label is present and 0 elsewhere, in float64:

    huber     sum of d^2 / 2 where |d| < delta, else delta (|d| - delta / 2)
    absolute  sum of |d|
    count     number of labels present

VJP, with a gradient g of huber:  dp = g clip(d, -delta, delta), times what makes p of the prediction:
1 / n_atoms for energies, 1 / GPA for stresses, the sign for magnetic moments. Absolute errors and counts have
no derivative, and nothing has a second one: asking for it raises. Saved: the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastchgnet.graph import Batch, Labels, Output
from fastchgnet.ops._register import define, implement, no_derivative, shape_of
from fastchgnet.ops.gpu import runtime
from fastchgnet.units import GPA


def huber_sums(output: Output, labels: Labels, batch: Batch, delta: float) -> Tensor:
    """Sum over the labels present.

    Args:
        output: predictions for S crystals.
        labels: their labels; NaN means missing, and so does a stress where the volume is NaN.
        batch: their graphs.
        delta: error from which the loss is linear.

    Returns:
        [3, 4] float64: huber, absolute and count of energy, forces, stress and magmoms; only the first row
        has a gradient.
    """
    predicted = output.energy, output.forces, output.stress, output.magmoms
    known = labels.energy, labels.forces, labels.stress, labels.magmoms
    return _huber(*predicted, *known, batch.n_atoms, batch.volume, delta)


def _present(labels: tuple[Tensor, ...], volume: Tensor) -> list[Tensor]:
    """Tell which labels are present."""
    present = [~torch.isnan(label) for label in labels]
    present[2] = present[2] & torch.isfinite(volume)[:, None, None]
    return present


def _differences(inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Return d of each target, zero where the label is missing, and which are present."""
    predicted, known, n_atoms = inputs[:4], inputs[4:8], inputs[8]
    present = _present(known, inputs[9])
    p, q = ([t.double() for t in tensors] for tensors in (predicted, known))
    differences = [(p[0] - q[0]) / n_atoms, p[1] - q[1], (p[2] - q[2]) / GPA, p[3].abs() - q[3].abs()]
    # a prediction that is NaN although its label is present stays one
    return [d.where(there, 0.0) for d, there in zip(differences, present, strict=True)], present


def _forward(
    energy: Tensor,
    forces: Tensor,
    stress: Tensor,
    magmoms: Tensor,
    energy_label: Tensor,
    forces_label: Tensor,
    stress_label: Tensor,
    magmoms_label: Tensor,
    n_atoms: Tensor,
    volume: Tensor,
    delta: float,
) -> Tensor:
    predicted = (energy, forces, stress, magmoms)
    known = (energy_label, forces_label, stress_label, magmoms_label)
    differences, present = _differences((*predicted, *known, n_atoms, volume))
    loss = torch.nn.functional.huber_loss
    huber = [loss(d, torch.zeros_like(d), reduction="sum", delta=delta) for d in differences]
    absolute = [d.abs().sum() for d in differences]
    count = [there.sum().double() for there in present]
    return torch.stack([*huber, *absolute, *count]).view(3, 4)


def _backward(
    grad: Tensor,
    energy: Tensor,
    forces: Tensor,
    stress: Tensor,
    magmoms: Tensor,
    energy_label: Tensor,
    forces_label: Tensor,
    stress_label: Tensor,
    magmoms_label: Tensor,
    n_atoms: Tensor,
    volume: Tensor,
    delta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    predicted = (energy, forces, stress, magmoms)
    known = (energy_label, forces_label, stress_label, magmoms_label)
    differences, _ = _differences((*predicted, *known, n_atoms, volume))
    e, f, s, m = (g * d.clamp(-delta, delta) for g, d in zip(grad[0].unbind(), differences, strict=True))
    found = (e / n_atoms, f, s / GPA, m * magmoms.sign())
    e, f, s, m = (g.to(p.dtype) for g, p in zip(found, predicted, strict=True))
    return e, f, s, m


def _derivative(inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]) -> Sequence[Any]:
    (grad,) = grads
    found = (None,) * 4 if grad is None else _huber_backward(grad.contiguous(), *inputs)
    return (*found, *[None] * 7)


_TARGETS = Output._fields[:4]
_NAMES = (*_TARGETS, *(f"{name}_label" for name in _TARGETS), "n_atoms", "volume")
_INPUTS = ", ".join(f"Tensor {name}" for name in _NAMES) + ", float delta"
_huber = define("huber", f"({_INPUTS}) -> Tensor", _derivative)
_huber_backward = define(
    "huber_backward", f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", no_derivative
)
implement("huber", _forward, runtime.body("huber", "forward", _forward, (torch.float64,)))
implement("huber_backward", _backward, runtime.body("huber", "backward", _backward, (torch.float64,)))
shape_of("huber", lambda energy, *_: energy.new_empty(3, 4, dtype=torch.float64))
shape_of("huber_backward", lambda _, *inputs: tuple(torch.empty_like(p) for p in inputs[:4]))
