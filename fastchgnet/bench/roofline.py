"""How far a run is from what the arithmetic of the model alone would take.

Counts multiply and add as two operations and leave out heads, norms and everything else that is not a
matrix product. The ceiling is measured: the rate of one large fp32 matrix product in the same process,
on the same threads.
"""

from __future__ import annotations

import statistics

import torch

from fastchgnet.bench.frames import Composition
from fastchgnet.bench.timing import sample

PASSES = {
    ("train", "conservative"): 6,
    ("train", "direct"): 3,
    ("infer", "conservative"): 2,
    ("infer", "direct"): 1,
}
"""Times the forward operations: forward 1, each first derivative 1, backward of that pair 4; direct
training is forward 1 and backward 2."""


def forward_operations(batch: Composition) -> int:
    """Count the operations of one forward pass of the factorised network (default model, 64 features).

    Per atom, bond, edge, short bond and angle: embeddings of 31 basis functions, four atom convolutions
    (64 -> 128 projections, two 64 -> 64 layers per edge, 64 -> 64 out), three bond convolutions and two
    angle updates likewise.
    """
    layer, basis = 2 * 64 * 64, 2 * 31 * 64
    atoms, edges, short, angles = batch.atoms, batch.edges, batch.short_bonds, batch.angles
    bonds = edges // 2
    embeddings = basis * (2 * bonds + short + angles)
    atom_conv = layer * (4 * atoms + 2 * bonds + 2 * edges + atoms)
    bond_conv = layer * (2 * atoms + 4 * short + 4 * angles + short)
    angle_update = layer * (2 * atoms + 4 * short + 2 * angles)
    return embeddings + 4 * atom_conv + 3 * bond_conv + 2 * angle_update


def operations(command: str, readout: str, batch: Composition) -> int:
    """Count the operations of a training step or of an inference."""
    return PASSES[command, readout] * forward_operations(batch)


def measure_ceiling(device: torch.device) -> float:
    """Measure the rate of a large fp32 matrix product, operations per second."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, generator=_generator(device)) for _ in range(2))
    torch.mm(a, b)
    return 2 * n**3 / statistics.median(sample(lambda: torch.mm(a, b), 3, device)[0] for _ in range(5))


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
