"""The state of an unfinished run: everything that the next step depends on, in two generations.

A state is one safetensors file; its header holds the position in the run and a checksum of both.
It is written beside, synced and renamed, and the one before it is kept, so that a process killed at any
moment, or a damaged file, costs the work since the last good state and no more.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastchgnet.errors import InputError
from fastchgnet.files import write_atomically
from fastchgnet.weights import CHECKSUM, digest

GENERATIONS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """A position in the run."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # epochs finished, validation included
    batch: int = 0  # batches taken of the next epoch
    seconds: float = 0.0  # training time spent on them
    frames: str = ""  # fingerprint of the training frames
    best_loss: float | None = None  # lowest validation loss so far
    best_epoch: int | None = None  # and the number of finished epochs when it was reached


def save_state(folder: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
    """Write a state and remove those older than its predecessor.

    Raises:
        InputError: the disk does not take it; the states that were there remain.
    """
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    position = json.dumps(dataclasses.asdict(progress))
    metadata = {"progress": position, CHECKSUM: digest(on_host, position)}
    path = folder / f"step-{progress.step:010d}.safetensors"
    write_atomically(path, to_safetensors(on_host, metadata))
    for old in _states(folder)[GENERATIONS:]:
        old.unlink()


def load_state(folder: Path) -> tuple[dict[str, Tensor], Progress] | None:
    """Return the newest undamaged state, on the CPU, or None where there has never been one.

    Raises:
        InputError: every state is damaged.
    """
    paths = _states(folder)
    for path in paths:
        try:
            state = _read(path)
        except InputError as error:
            logger.warning("%s; going back to the state before it", error)
            continue
        # A damaged newer state must not count as a generation when the next one is written.
        for newer in paths[: paths.index(path)]:
            newer.unlink()
        return state
    if paths:
        raise InputError(f"{folder}: every saved state is damaged")
    return None


def _states(folder: Path) -> list[Path]:
    """List the states, the newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _read(path: Path) -> tuple[dict[str, Tensor], Progress]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        if metadata[CHECKSUM] != digest(tensors, metadata["progress"]):
            raise InputError(f"{path}: damaged, its checksum does not match")
        return tensors, Progress(**json.loads(metadata["progress"]))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged or not a state of a run ({error})") from error
