"""The frames that both arms see, and their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastchgnet.data.formats import read_frames
from fastchgnet.data.frame import Frame
from fastchgnet.errors import InputError
from fastchgnet.loss import TARGETS
from fastchgnet.neighbors import graph_sizes
from fastchgnet.prediction import systems_from_frames

ATOM_CUTOFF, BOND_CUTOFF = 6.0, 3.0
"""Cutoffs of chgnet-0.3.0 and of our default model, A."""


Answer = tuple[float, NDArray]
"""What an arm says of a crystal: energy per atom, eV, and forces [n, 3], eV/A."""


class Composition(NamedTuple):
    """What a batch consists of."""

    systems: int
    atoms: int
    edges: int
    short_bonds: int
    angles: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Labelled frames of one batch."""

    frames: Sequence[Frame]
    synthetic: tuple[str, ...]  # labels that were drawn, as some frames lacked them or all were to be
    composition: Composition


class Pool:
    """All frames of a file in an order drawn from a seed; a workload is the first few of them."""

    def __init__(self, path: Path, seed: int) -> None:
        """Read the file.

        Raises:
            InputError: it is missing or unreadable, or a frame in it is no crystal.
        """
        frames = list(read_frames(path))
        for frame in frames:
            frame.check()
        self.path, self.seed = path, seed
        order = np.random.default_rng(seed).permutation(len(frames))
        self._frames = [frames[position] for position in order]

    def workload(self, n_frames: int, *, own_labels: bool = True) -> Workload:
        """Take the first `n_frames`; labels that frames lack, or else all, are drawn from the seed."""
        if n_frames > len(self._frames):
            raise InputError(f"{self.path}: {len(self._frames)} frames, fewer than a batch of {n_frames}")
        rng = np.random.default_rng([self.seed, 1])
        chosen = self._frames[:n_frames]
        if not own_labels:
            chosen = [dataclasses.replace(frame, **dict.fromkeys(TARGETS)) for frame in chosen]
        labelled = [_labelled(frame, rng) for frame in chosen]
        sizes = graph_sizes(systems_from_frames(chosen), ATOM_CUTOFF, BOND_CUTOFF)
        lacking = tuple(name for name in TARGETS if any(_lacks(frame, name) for frame in chosen))
        return Workload(labelled, lacking, Composition(n_frames, *sizes.sum(axis=0).tolist()))


def _lacks(frame: Frame, name: str) -> bool:
    value = getattr(frame, name)
    return value is None or bool(np.isnan(value).any())


def _labelled(frame: Frame, rng: np.random.Generator) -> Frame:
    """Give a frame labels of a plausible size where it has none; times do not depend on them."""
    n_atoms = len(frame.numbers)
    stress = rng.normal(0, 0.01, (3, 3))
    drawn = {
        "energy": n_atoms * rng.normal(-5, 0.5),
        "forces": rng.normal(0, 0.5, (n_atoms, 3)),
        "stress": stress + stress.T,
        "magmoms": np.abs(rng.normal(0, 1, n_atoms)),
    }
    missing = {name: value for name, value in drawn.items() if _lacks(frame, name)}
    return dataclasses.replace(frame, **missing)  # type: ignore[arg-type]
