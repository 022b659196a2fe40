"""Where the batches of a run come from: graphs made on the host, or frames whose graphs the device makes.

A source prepares an item ahead of time, on the host and in a thread; the step sends it to the device and
makes the batch there, with shapes that the item's room alone decides.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.config import RunConfig
from fastchgnet.data.store import Store
from fastchgnet.device_graph import SpareSystems, build_graph, spare_systems
from fastchgnet.graph import Batch, Labels
from fastchgnet.neighbors import build_graph as host_graph
from fastchgnet.padding import pad_labels
from fastchgnet.potential import Potential
from fastchgnet.train.batches import Batches, Division, validation_batches
from fastchgnet.train.resident import ResidentFrames
from fastchgnet.train.rooms import Parts, Room, Rooms, frame_sizes
from fastchgnet.train.setup import Frames

_PLANNED_BATCHES = 5000
"""Batches, from the first of the run on, that decide the shapes; later ones hardly exceed them."""

_PLANNED_FRAMES = 1_000_000
"""Frames in them, at most, unless an epoch has more: dividing and counting them takes a microsecond each."""

_RESIDENT_SHARE = 0.3
"""Most of the device's free memory that the frames of a store may take."""

logger = logging.getLogger(__name__)


Item = tuple[Tensor, ...]
"""What a part of a batch is made from, on the host."""


class Made(NamedTuple):
    """A part of a batch ready for a step."""

    batch: Batch
    labels: Labels
    fits: Tensor  # bool scalar: False where the graphs were too large for the room


class Source(Protocol):
    """Prepare items from positions of frames, and make the parts of batches from items."""

    def room(self, parts: Parts) -> Room | None:
        """Return the shapes that all parts of a batch are given, or None where each has its own."""

    def prepare(self, positions: NDArray[np.int64], room: Room | None) -> Item:
        """Gather what a part with the frames at these positions is made from."""

    def make(self, tensors: Sequence[Tensor], room: Room | None) -> Made:
        """Make the part from its item, which is on the device by now; the host does not wait."""

    def plan(self, division: Division) -> None:
        """Expect batches that are divided in another way from now on."""


class Planning(NamedTuple):
    """What shapes are planned from."""

    sizes: NDArray[np.int64]  # `frame_sizes` of all frames
    batches: Sequence[NDArray[np.int64]]  # as positions in them; others may come
    division: Division

    def rooms(self) -> Rooms:
        """Plan."""
        return Rooms(self.sizes, [self.division(batch) for batch in self.batches])


class HostGraphs:
    """Graphs built by the CPU, in the shapes they have."""

    def __init__(self, frames: Frames, potential: Potential) -> None:
        self.frames, self.potential = frames, potential

    def room(self, parts: Parts) -> None:
        """Leave each part its own shapes."""
        return None

    def prepare(self, positions: NDArray[np.int64], room: Room | None = None) -> Item:
        """Build the graphs."""
        systems, labels = self.frames.gather(positions)
        config = self.potential.config
        return *_tensors(host_graph(systems, config.atom_cutoff, config.bond_cutoff)), *_tensors(labels)

    def make(self, tensors: Sequence[Tensor], room: Room | None) -> Made:
        """Put the tensors together again."""
        n_fields = len(dataclasses.fields(Batch))
        fits = torch.ones((), dtype=torch.bool, device=tensors[0].device)
        return Made(Batch(*tensors[:n_fields]), Labels(*tensors[n_fields:]), fits)

    def plan(self, division: Division) -> None:
        """Do nothing: shapes are those of each part."""


class DeviceGraphs:
    """Graphs built on the device in static shapes, from frames that live there or go there batch by batch.

    Args:
        frames: frames of the run.
        potential: gives cutoffs and device.
        planning: batches to plan shapes for; a batch too large for them goes the way of `HostGraphs`.
        resident: the frames on the device; None where they go there batch by batch.
    """

    def __init__(
        self, frames: Frames, potential: Potential, planning: Planning, resident: ResidentFrames | None
    ) -> None:
        self.frames, self.config, self.device = frames, potential.config, potential.device
        self.planning, self.rooms = planning, planning.rooms()
        self.resident = resident
        self.host = HostGraphs(frames, potential)
        self.warned = False

    def room(self, parts: Parts) -> Room | None:
        """Return the smallest room that holds each of the parts, the same in all processes."""
        room = self.rooms(parts)
        if room is None:
            self._warn(np.concatenate(parts))
        return room

    def prepare(self, positions: NDArray[np.int64], room: Room | None) -> Item:
        """Gather frames, or their numbers."""
        if room is None:
            return self.host.prepare(positions)
        return self._numbers(positions, room) if self.resident else self._frames(positions, room)

    def make(self, tensors: Sequence[Tensor], room: Room | None) -> Made:
        """Gather the frames, where they live on the device, and build their graphs."""
        if room is None:
            return self.host.make(tensors, room)
        if self.resident is not None:
            systems, labels = self.resident.gather(tensors[0], room.capacity.atoms)
        else:
            n_fields = len(dataclasses.fields(SpareSystems))
            systems, labels = SpareSystems(*tensors[:n_fields]), Labels(*tensors[n_fields:])
        cutoffs = self.config.atom_cutoff, self.config.bond_cutoff
        batch, fits = build_graph(systems, *cutoffs, room.capacity, room.n_candidates)
        return Made(batch, labels, fits)

    def plan(self, division: Division) -> None:
        """Plan the shapes anew."""
        self.planning = self.planning._replace(division=division)
        self.rooms = self.planning.rooms()

    def _numbers(self, positions: NDArray[np.int64], room: Room) -> Item:
        """Numbers of the frames in the store, -1 for the fillers."""
        numbers = torch.full((room.capacity.systems,), -1)
        numbers[: len(positions)] = torch.from_numpy(self.frames.indices[positions])
        return (numbers,)

    def _frames(self, positions: NDArray[np.int64], room: Room) -> Item:
        systems, labels = self.frames.gather(positions)
        capacity = room.capacity
        spare = spare_systems(systems, capacity.systems, capacity.atoms)
        return (*_tensors(spare), *_tensors(pad_labels(labels, capacity)))

    def _warn(self, positions: NDArray[np.int64]) -> None:
        if not self.warned:
            logger.warning(
                "a batch, as others may be, is too large for the shapes that were planned; "
                "its graphs are built on the CPU and its step is not recorded; frames %s",
                self.frames.names(positions),
            )
        self.warned = True


def open_sources(
    train: Frames,
    val: Frames,
    potential: Potential,
    config: RunConfig,
    batches: Batches,
    division: Division,
) -> tuple[Source, Source]:
    """Open the sources of a run: graphs are built on the device, unless that is the CPU.

    Batches are those of the training frames, with sizes within the cutoffs of their store.
    """
    if potential.device.type == "cpu":
        return HostGraphs(train, potential), HostGraphs(val, potential)
    of_the_run = itertools.chain.from_iterable(map(batches.epoch, range(config.train.epochs)))
    n_planned = min(_PLANNED_BATCHES, max(len(batches), _PLANNED_FRAMES // config.data.batch_size))
    planned = (
        list(itertools.islice(of_the_run, n_planned)),
        validation_batches(len(val.indices), config.data.batch_size, division),
    )
    cutoffs = potential.config.atom_cutoff, potential.config.bond_cutoff
    resident: dict[Path, ResidentFrames | None] = {}
    sources = []
    for frames, to_plan_for in zip((train, val), planned, strict=True):
        store = frames.store
        if store.path not in resident:
            room_for_it = config.data.resident == "auto" and _fits_device(store, potential.device)
            resident[store.path] = ResidentFrames(store, potential.device) if room_for_it else None
        plan = store.header.plan
        counted = frames is train and cutoffs == (plan.atom_cutoff, plan.bond_cutoff)
        sizes = batches.sizes if counted else frame_sizes(store, frames.indices, *cutoffs)
        planning = Planning(sizes, to_plan_for, division if frames is train else Division(sizes))
        sources.append(DeviceGraphs(frames, potential, planning, resident[store.path]))
    return sources[0], sources[1]


def _fits_device(store: Store, device: torch.device) -> bool:
    """Tell whether the frames take a small part of the device's free memory."""
    n_bytes = sum(array.nbytes for array in store.raw().values())
    free, _ = torch.cuda.mem_get_info(device)
    return n_bytes < _RESIDENT_SHARE * free


def _tensors(record: Batch | Labels | SpareSystems) -> Item:
    """The fields of a dataclass, in their order."""
    return tuple(getattr(record, field.name) for field in dataclasses.fields(record))
