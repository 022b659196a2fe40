"""No figure for wrong results: the potential on the device against float64 on the CPU.

`check` compares energies, forces, stress, magnetic moments and the gradient of the training loss with
respect to every parameter, for both readouts, and on a GPU for both precisions of matrix products. Checks of
single operations belong here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastchgnet.bench.frames import Workload
from fastchgnet.bench.rows import Row
from fastchgnet.bench.session import Session
from fastchgnet.errors import InputError
from fastchgnet.graph import Labels, Output
from fastchgnet.loss import tally, total_loss
from fastchgnet.ops.gpu import runtime
from fastchgnet.potential import Potential
from fastchgnet.prediction import systems_from_frames
from fastchgnet.published import load
from fastchgnet.units import GPA

N_FRAMES = 8
WEIGHTS = (1.0, 1.0, 0.1, 0.1)

POLICIES: dict[runtime.Precision, dict[str, float]] = {
    "fp32": {
        "energy_ev_per_atom": 1e-5,
        "forces_ev_per_angstrom": 1e-4,
        "stress_gpa": 1e-3,
        "magmoms_mub": 1e-4,
        "gradient_relative": 1e-3,
    },
    "tf32": {
        "energy_ev_per_atom": 2e-4,
        "forces_mean_ev_per_angstrom": 5e-4,
        "gradient_one_minus_cosine": 1e-3,
    },
}
"""Largest deviations allowed. fp32: as between us and the published model, whose own float32 is no closer to
float64. tf32: far below any error of training."""

NOTE = (
    "Deviations of the device from float64 on the CPU, the largest but where a mean or the gradient over all "
    "parameters is named: published weights, of a direct readout with heads drawn at random."
)


class Result(NamedTuple):
    """What a potential says about a batch, and the gradient of the loss, on the CPU in float64."""

    output: Output
    gradient: Tensor  # [n_parameters]


def check(session: Session) -> Iterator[Row]:
    """Compare both readouts with float64 on the CPU; yield a row for each of them and each precision.

    Raises:
        InputError: behind the last row, where a deviation is larger than its precision explains, or not a
            number.
    """
    # labels that the potential made itself would leave a gradient of nothing but rounding
    workload = session.pool.workload(N_FRAMES, own_labels=False)
    wrong = []
    names: Iterable[runtime.Precision] = POLICIES if session.device.type == "cuda" else ("fp32",)
    for readout in ("conservative", "direct"):
        for name in names:
            row = session.row("correctness", workload, readout, NOTE) | {"precision": name}
            with runtime.precision(name):
                found = deviations(workload, readout, session.device)
            yield row | {"deviations": found, "allowed": POLICIES[name]}
            wrong += [
                f"{quantity} of the {readout} readout in {name} is off by {found[quantity]:.1e}, "
                f"{limit:.0e} is allowed"
                for quantity, limit in POLICIES[name].items()
                if not found[quantity] <= limit
            ]
    if wrong:
        raise InputError(f"{session.device}: wrong results, nothing was timed: {'; '.join(wrong)}")


def deviations(workload: Workload, readout: str, device: torch.device) -> dict[str, float]:
    """Return how far float32 on the device is from float64 on the CPU."""
    exact = evaluate(workload, readout, torch.device("cpu"), torch.float64)
    actual = evaluate(workload, readout, device, torch.float32)
    n_atoms = torch.tensor([len(frame.numbers) for frame in workload.frames])
    pairs = dict(zip(Output._fields, zip(actual.output, exact.output, strict=True), strict=True))
    difference = {name: a.double() - b for name, (a, b) in pairs.items()}
    gradients = actual.gradient, exact.gradient
    return {
        "energy_ev_per_atom": _largest(difference["energy"] / n_atoms),
        "forces_ev_per_angstrom": _largest(difference["forces"]),
        "forces_mean_ev_per_angstrom": float(difference["forces"].abs().mean()),
        "stress_gpa": _largest(difference["stress"] / GPA),
        "magmoms_mub": _largest(difference["magmoms"]),
        "gradient_relative": float((gradients[0] - gradients[1]).norm() / gradients[1].norm()),
        "gradient_one_minus_cosine": float(1 - torch.cosine_similarity(*gradients, dim=0)),
    }


def evaluate(workload: Workload, readout: str, device: torch.device, dtype: torch.dtype) -> Result:
    """Run one forward and backward pass of the same potential on a device, in a precision."""
    potential = _potential(readout).to(device, dtype).train()
    batch = potential.build_graph(systems_from_frames(workload.frames))
    output = potential(batch)
    sums = tally(output, _labels(workload).to(device), batch)
    total_loss(sums.huber, sums.count, WEIGHTS).backward()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    gradient = torch.cat([g.flatten().cpu().double() for g in gradients])
    return Result(Output(*(value.detach().cpu() for value in output)), gradient)


def _potential(readout: str) -> Potential:
    published = load("chgnet-0.3.0", dtype="float64")
    if readout == "conservative":
        return published
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = published.config.model_copy(update={"readout": "direct"})
        made = Potential(config, published.references, published.provenance).double()
        made.model.load_state_dict(published.model.state_dict())
        for name, parameter in made.named_parameters():
            if name == "heads.scalars.weight":
                # an untrained head is silent; forces of the published weights are as large as these
                torch.nn.init.normal_(parameter, std=0.1)
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
