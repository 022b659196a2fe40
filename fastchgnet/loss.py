"""Huber losses on energy per atom, forces, stress and magnetic moments, where labels are present.

For every target, d is prediction minus label in the unit of the loss:

    energy   eV/atom, one per crystal        forces   eV/A, three per atom
    stress   GPa, nine per crystal           magmoms  mu_B, | |m_predicted| - |m_label| |, one per atom

    h(d)  = d^2 / 2 where |d| < delta, else delta (|d| - delta / 2)
    L     = sum over targets of  weight * (sum of h over the labels present) / (number of them)

`tally` sums, `total_loss` divides: whoever holds a part of a batch can add up the counts in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastchgnet.graph import Batch, Labels, Output
from fastchgnet.ops.huber import huber_sums

TARGETS = ("energy", "forces", "stress", "magmoms")
"""The order of every tensor of four below."""

REPORT_UNITS = {
    "energy_mev_per_atom": 1000.0,
    "forces_mev_per_angstrom": 1000.0,
    "stress_gpa": 1.0,
    "magmoms_mmub": 1000.0,
}
"""Reported name of each target, in the order of TARGETS, and its factor from the unit of the loss."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over the labels present, on the device of the predictions."""

    sums: Tensor  # [3, 4] float64: Huber losses, absolute errors and labels of every target, see `huber_sums`

    @property
    def huber(self) -> Tensor:
        """Huber losses, [4], which alone have a gradient."""
        return self.sums[0]

    @property
    def absolute(self) -> Tensor:
        """Absolute errors, [4], in the unit of the loss."""
        return self.sums[1].detach()

    @property
    def count(self) -> Tensor:
        """Labels, [4]."""
        return self.sums[2].detach()

    def __add__(self, other: Tally) -> Tally:
        """Join the sums of two sets of crystals."""
        return Tally(self.sums + other.sums)

    def add_(self, other: Tally) -> None:
        """Join the sums of more crystals to these, in place and without a gradient."""
        self.sums.add_(other.sums.detach())

    def zero_(self) -> None:
        """Forget all crystals, in place."""
        self.sums.zero_()

    def as_dict(self) -> dict[str, Tensor]:
        """Name the sums."""
        return {"huber": self.huber, "absolute": self.absolute, "count": self.count}

    def report(self) -> dict[str, float | None]:
        """Compute the mean absolute errors under the names of REPORT_UNITS; None without any label."""
        errors = (self.absolute / self.count).tolist()
        return {
            name: error * factor if n_labels else None
            for (name, factor), error, n_labels in zip(
                REPORT_UNITS.items(), errors, self.count.tolist(), strict=True
            )
        }


def empty_tally(device: torch.device | str = "cpu") -> Tally:
    """Return the tally of no crystals."""
    return Tally(torch.zeros(3, len(TARGETS), dtype=torch.float64, device=device))


def tally(output: Output, labels: Labels, batch: Batch, delta: float = 0.1) -> Tally:
    """Sum Huber losses and absolute errors over the labels present, without waiting for the device.

    A label is missing where it is NaN, and the stress also where a crystal is not periodic in three
    directions and so has none. A prediction that is NaN although its label is present makes the sum NaN.

    Args:
        output: predictions for S crystals with A atoms.
        labels: labels of the same crystals.
        batch: the graphs the predictions belong to.
        delta: error from which the loss grows linearly, in the unit of each target.
    """
    return Tally(huber_sums(output, labels, batch, delta))


def coefficients(count: Tensor, weights: Tensor) -> Tensor:
    """Return the derivative of the loss by `Tally.sums`, [3, 4]: zero but for those of h.

    Args:
        count: [4] labels of the whole batch.
        weights: [4] one per target, on the same device.
    """
    return torch.nn.functional.pad((weights / count.clamp(min=1))[None], (0, 0, 0, 2))


def total_loss(huber: Tensor, count: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Weigh the mean Huber loss of each target; a target without labels adds exactly zero.

    Args:
        huber: [4] sums of this part of the batch.
        count: [4] labels of the whole batch.
        weights: one per target, in the order of TARGETS.
    """
    # A tensor of the weights would be copied to the device, and the host would wait for that.
    means = (huber / count.clamp(min=1)).unbind()
    return torch.stack([weight * mean for weight, mean in zip(weights, means, strict=True)]).sum()
