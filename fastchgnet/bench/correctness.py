"""No figure for wrong results: the potential on the device in float32 against float64 on the CPU.

`check` compares energies, forces, stress, magnetic moments and the gradient of the training loss with
respect to every parameter, for both readouts. Checks of single operations belong here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastchgnet.bench.frames import Workload
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Session
from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.errors import InputError
from fastchgnet.graph import Labels, Output
from fastchgnet.loss import tally, total_loss
from fastchgnet.potential import Potential
from fastchgnet.prediction import systems_from_frames
from fastchgnet.units import GPA

N_FRAMES = 8
WEIGHTS = (1.0, 1.0, 0.1, 0.1)

FLOAT32 = {
    "energy_ev_per_atom": 1e-5,
    "forces_ev_per_angstrom": 1e-4,
    "stress_gpa": 1e-3,
    "magmoms_mub": 1e-4,
    "gradient_relative": 1e-3,
}
"""Largest deviations that float32 may have: those allowed against the published model, whose own float32
is no closer to float64; the gradient's is the L2 norm over all parameters, relative."""


NOTE = "Largest deviations of float32 on the device from float64 on the CPU, an untrained potential."


class Result(NamedTuple):
    """What a potential says about a batch, and the gradient of the loss, on the CPU in float64."""

    output: Output
    gradient: Tensor  # [n_parameters]


def check(session: Session) -> list[Row]:
    """Compare both readouts with float64 on the CPU; return a row for each.

    Raises:
        InputError: a deviation is larger than float32 explains, or not a number.
    """
    workload = session.pool.workload(N_FRAMES)
    rows = []
    for readout in ("conservative", "direct"):
        row = session.row("correctness", workload, readout, NOTE)
        found = deviations(workload, readout, session.device)
        rows.append(row | {"deviations": found, "allowed": FLOAT32})
        for name, value in found.items():
            if not value <= FLOAT32[name]:
                raise InputError(
                    f"{session.device}: wrong results, nothing was timed: {name} of the {readout} readout "
                    f"is off by {value:.1e}, {FLOAT32[name]:.0e} is allowed"
                )
    return rows


def deviations(workload: Workload, readout: str, device: torch.device) -> dict[str, float]:
    """Return the largest differences between float32 on the device and float64 on the CPU."""
    exact = evaluate(workload, readout, torch.device("cpu"), torch.float64)
    actual = evaluate(workload, readout, device, torch.float32)
    n_atoms = torch.tensor([len(frame.numbers) for frame in workload.frames])
    pairs = dict(zip(Output._fields, zip(actual.output, exact.output, strict=True), strict=True))
    difference = {name: a.double() - b for name, (a, b) in pairs.items()}
    return {
        "energy_ev_per_atom": _largest(difference["energy"] / n_atoms),
        "forces_ev_per_angstrom": _largest(difference["forces"]),
        "stress_gpa": _largest(difference["stress"] / GPA),
        "magmoms_mub": _largest(difference["magmoms"]),
        "gradient_relative": float((actual.gradient - exact.gradient).norm() / exact.gradient.norm()),
    }


def evaluate(workload: Workload, readout: str, device: torch.device, dtype: torch.dtype) -> Result:
    """Run one forward and backward pass of an untrained potential, the same for every device and dtype."""
    potential = _potential(readout).to(device, dtype).train()
    batch = potential.build_graph(systems_from_frames(workload.frames))
    output = potential(batch)
    sums = tally(output, _labels(workload).to(device), batch)
    total_loss(sums.huber, sums.count, WEIGHTS).backward()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    gradient = torch.cat([g.flatten().cpu().double() for g in gradients])
    return Result(Output(*(value.detach().cpu() for value in output)), gradient)


def _potential(readout: str) -> Potential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ModelConfig.model_validate({"readout": readout})
        made = Potential(config, torch.linspace(-8, -1, 94, dtype=torch.float64), Provenance(name="check"))
        for name, parameter in made.named_parameters():
            if name == "heads.scalars.weight":
                torch.nn.init.normal_(parameter, std=0.5)  # an untrained head is silent
    return made


def _labels(workload: Workload) -> Labels:
    def joined(name: str) -> Tensor:
        values: Sequence = [getattr(frame, name) for frame in workload.frames]
        return torch.cat([torch.as_tensor(value, dtype=torch.float64) for value in values])

    return Labels(
        energy=torch.tensor([frame.energy for frame in workload.frames], dtype=torch.float64),
        forces=joined("forces"),
        stress=joined("stress").view(-1, 3, 3),
        magmoms=joined("magmoms"),
    )


def _largest(difference: Tensor) -> float:
    # A stress that neither has is NaN in both.
    return float(difference[~difference.isnan()].abs().max()) if difference.numel() else 0.0
