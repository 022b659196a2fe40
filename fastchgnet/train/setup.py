"""What a run starts from: its frames, its device, its potential."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.config import DataConfig, ModelConfig, Provenance, RunConfig
from fastchgnet.data.store import Store
from fastchgnet.errors import InputError
from fastchgnet.graph import Labels, Systems
from fastchgnet.potential import Potential
from fastchgnet.published import PUBLISHED, weights_path
from fastchgnet.references import References, fit_references
from fastchgnet.units import MAX_ATOMIC_NUMBER
from fastchgnet.weights import load_potential, read_header

_FINISHING = {"readout", "heads"}
"""What a run may change of the model it starts from: pre-train direct, finish conservative."""

logger = logging.getLogger(__name__)


class Frames(NamedTuple):
    """Some frames of a store."""

    store: Store
    indices: NDArray[np.int64]

    def fingerprint(self) -> str:
        """Hash which frames these are and what they hold."""
        digest = hashlib.sha256(np.ascontiguousarray(self.indices, dtype="<i8").tobytes())
        for name, info in sorted(self.store.header.arrays.items()):
            digest.update(f"{name} {info.sha256} ".encode())
        return digest.hexdigest()

    def gather(self, positions: NDArray[np.int64]) -> tuple[Systems, Labels]:
        """Read the frames at `positions` of `indices`, in that order."""
        return self.store.gather(self.indices[positions])

    def label_counts(self) -> NDArray[np.int64]:
        """Count the labels of each frame, [n, 4], as `Store.label_counts`."""
        return self.store.label_counts()[self.indices]

    def names(self, positions: NDArray[np.int64]) -> str:
        """Name the frames at `positions` in one line."""
        return ", ".join(map(str, self.store.ids(self.indices[positions])))

    def chunks(self, size: int) -> Iterator[tuple[Systems, Labels]]:
        """Read all frames in order, about `size` at a time."""
        for part in np.array_split(np.arange(len(self.indices)), math.ceil(len(self.indices) / size)):
            yield self.gather(part)


def open_frames(config: DataConfig) -> tuple[Frames, Frames]:
    """Open the training and the validation frames: two stores, or two splits of one.

    Raises:
        InputError: a folder is no store, or damaged, or one of the two has no frames.
    """
    store = Store.verified(config.train)
    if config.val is None:
        train, val = (Frames(store, store.split(name, config.split_seed)) for name in ("train", "val"))
    else:
        other = Store.verified(config.val)
        train, val = Frames(store, np.arange(len(store))), Frames(other, np.arange(len(other)))
    for name, frames in (("training", train), ("validation", val)):
        if not len(frames.indices):
            raise InputError(f"{frames.store.path}: no {name} frames; give a store of them, or more groups")
    return train, val


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Make equal steps equal bit for bit on a CPU, whatever its threads do, and leave a GPU its speed.

    Without this the gradient of indexing adds rows in the order in which threads arrive.
    """
    settings: Any = torch.utils.deterministic  # a module whose attribute is made at run time
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    if device.type == "cpu":
        # `use_deterministic_algorithms` would load the compiler, too, and leave a setting of that behind
        torch.set_deterministic_debug_mode("error")
        settings.fill_uninitialized_memory = False  # finds mistakes, costs time, changes no result
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


def resolve(config: RunConfig) -> RunConfig:
    """Fill in the model of the weights that the run starts from, and where they are.

    Raises:
        InputError: there are no such weights, or the model section contradicts them in more than the
            readout.
    """
    if config.train.init is None:
        return config
    path = weights_path(config.train.init)
    start = read_header(path).config
    asked = {field: getattr(config.model, field) for field in config.model.model_fields_set}
    differing = sorted(field for field, value in asked.items() if value != getattr(start, field))
    if set(differing) - _FINISHING:
        fields = ", ".join(f"model.{field}" for field in differing if field not in _FINISHING)
        raise InputError(f"{fields}: not as in the weights of train.init, {config.train.init}")
    model = ModelConfig(**{**start.model_dump(), **asked})
    # a resumed run may be started from another folder
    init = config.train.init if config.train.init in PUBLISHED else str(path.absolute())
    train = config.train.model_copy(update={"init": init})
    return config.model_copy(update={"model": model, "train": train})


def blank_potential(config: RunConfig, train: Frames, device: torch.device) -> Potential:
    """Build the potential of a resolved run with the seed's initial weights and no reference energies."""
    data, init = train.store.header.provenance, config.train.init
    provenance = Provenance(
        name=config.train.out.name,
        functional=data.functional,
        energy_correction=data.energy_correction,
        source=f"trained on {data.name}" + (f", from {init}" if init else ""),
        licence=read_header(weights_path(init)).provenance.licence if init else "",
    )
    # The caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        references = torch.zeros(MAX_ATOMIC_NUMBER, dtype=torch.float64)
        potential = Potential(config.model, references, provenance)
    return potential.to(device=device, dtype=getattr(torch, config.train.dtype))


def first_potential(config: RunConfig, train: Frames, device: torch.device) -> Potential:
    """Build the potential with which a new run starts, reference energies included.

    With `init`, weights of the same name are taken over and reference energies are shifted to fit what
    that model leaves of the training energies; where a shift is undetermined they stay as they were.

    Raises:
        InputError: no training frame has an energy, or `init` cannot be loaded.
    """
    potential = blank_potential(config, train, device)
    if config.train.init is not None:
        start = load_potential(weights_path(config.train.init)).to(device)
        weights = {name: t for name, t in start.state_dict().items() if name in potential.state_dict()}
        potential.load_state_dict(weights, strict=False)
        _warn_of_other_energies(config, start.provenance, potential.provenance)
    if config.train.references == "fit":
        fitted = _fit(config, potential, train)
        potential.references += fitted.energies.to(device)
    return potential


def _fit(config: RunConfig, potential: Potential, train: Frames) -> References:
    """Fit the references to the energies, or to what a model that already knows something leaves."""
    if config.train.init is None:
        return fit_references((systems, labels.energy) for systems, labels in train.chunks(65_536))
    potential.eval()
    return fit_references(_remainders(potential, train, config.data.batch_size))


@torch.no_grad()
def _remainders(potential: Potential, train: Frames, size: int) -> Iterator[tuple[Systems, Tensor]]:
    for systems, labels in train.chunks(size):
        predicted = potential(potential.build_graph(systems)).energy.cpu()
        yield systems, labels.energy - predicted


def _warn_of_other_energies(config: RunConfig, start: Provenance, data: Provenance) -> None:
    """Warn where kept reference energies belong to energies of another meaning."""
    kinds = [(p.functional, p.energy_correction) for p in (start, data)]
    if config.train.references == "keep" and kinds[0] != kinds[1]:
        logger.warning(
            "reference energies of %s (%s, correction %s) are kept for data with %s, correction %s; "
            "train.references: fit would adapt them",
            start.name,
            *kinds[0],
            *kinds[1],
        )
