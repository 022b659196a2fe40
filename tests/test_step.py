"""Steps on padded batches whose graphs the device builds, recorded or in halves, are the steps they replace.

Everything here runs on the CPU; a stand-in for CUDA graphs calls the function again on the same tensors.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recordings import CalledAgain
from test_train import configure, emt_frames
from torch import Tensor

from fastchgnet.config import Provenance, RunConfig
from fastchgnet.data.store import Store, write_store
from fastchgnet.errors import InputError
from fastchgnet.graph import Labels
from fastchgnet.record import Recorder
from fastchgnet.train import loop
from fastchgnet.train.batches import Batches, Division, validation_batches
from fastchgnet.train.loop import Trainer
from fastchgnet.train.resident import ResidentFrames
from fastchgnet.train.rooms import Room, Rooms, frame_sizes
from fastchgnet.train.sampler import Strategy
from fastchgnet.train.setup import Frames, blank_potential
from fastchgnet.train.source import DeviceGraphs, HostGraphs, Planning, Source, open_sources
from fastchgnet.train.step import Outcome, Steps

CPU = torch.device("cpu")
CUTOFFS = (3.5, 3.0)
N_RESULTS = len(Outcome._fields)
# fp64: the same sums in another order, over some steps of Adam, which divides by small numbers
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    for name, n_frames, seed in (("train", 20, 0), ("val", 6, 1)):
        write_store(emt_frames(n_frames, seed), folder / name, Provenance(name="emt"))
    return folder


@pytest.fixture
def config(stores: Path, tmp_path: Path) -> RunConfig:
    return configure(stores, tmp_path / "run", train={"dtype": "float64"})


def everything(store: Store) -> Frames:
    return Frames(store, np.arange(len(store)))


def planning_for(frames: Frames, batches: Sequence[np.ndarray], n_parts: int = 1) -> Planning:
    sizes = frame_sizes(frames.store, frames.indices, *CUTOFFS)
    return Planning(sizes, batches, Division(sizes, n_parts=n_parts))


@pytest.fixture
def make_trainer(config: RunConfig, stores: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Make trainers with a source of one's choice."""

    def make(choice: str, **sections: dict) -> Trainer:
        train, val = (everything(Store(stores / name)) for name in ("train", "val"))

        def open_sources(*given: object) -> tuple[Source, Source]:
            host = [HostGraphs(frames, given[2]) for frames in (train, val)]  # type: ignore[arg-type]
            if choice == "host":
                return host[0], host[1]
            resident = ResidentFrames(train.store, CPU) if choice == "resident" else None
            planning = planning_for(train, batches_of(config), n_parts)
            return DeviceGraphs(train, given[2], planning, resident), host[1]  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "open_sources", open_sources)
        n_parts = sections.get("data", {}).get("accumulate", 1)
        changed = {name: getattr(config, name).model_copy(update=new) for name, new in sections.items()}
        trainer = Trainer(config.model_copy(update=changed), train, val, CPU, None)
        trainer.potential.train()
        return trainer

    return make


def batches_of(config: RunConfig, epoch: int = 0) -> list[np.ndarray]:
    return random_batches(20, config.data.batch_size, epoch)


def random_batches(n_frames: int, batch_size: int, epoch: int) -> list[np.ndarray]:
    return list(Batches(np.ones((n_frames, 4), np.int64), batch_size, 0, "sequential").epoch(epoch))


def advance(trainer: Trainer, batches: Sequence[np.ndarray]) -> None:
    for item in trainer.load(list(batches)):
        trainer.step(item)
        trainer.progress = dataclasses.replace(trainer.progress, step=trainer.progress.step + 1)
    trainer.check()


def assert_same_state(found: Trainer, expected: Trainer) -> None:
    for name in ("weights", "average", "mean", "square"):
        one, other = getattr(found.optimizer, name), getattr(expected.optimizer, name)
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE * other.abs().max().item())
    for name, total in found.sums.as_dict().items():
        torch.testing.assert_close(total, getattr(expected.sums, name), rtol=TOLERANCE, atol=1e-12)


@pytest.mark.parametrize("choice", ["resident", "sent"])
@pytest.mark.parametrize("readout", ["conservative", "direct"])
def test_recorded_steps_are_those_on_graphs_of_the_host(
    make_trainer: Callable[..., Trainer], config: RunConfig, choice: str, readout: str
) -> None:
    model = {"readout": readout}
    expected, found = (make_trainer(name, model=model) for name in ("host", choice))
    record = CalledAgain(N_RESULTS)
    steps = found.take_step
    found.take_step = Steps(steps.step, steps.source, steps.division, steps.weigh, record)
    batches = batches_of(config) + batches_of(config, epoch=1)
    for trainer in (expected, found):
        advance(trainer, batches)
    assert_same_state(found, expected)
    rooms = {found.take_step.prepare(batch).room for batch in batches}
    assert None not in rooms
    assert record.n_recorded == len(rooms) and record.n_replayed == len(batches) - len(rooms)


def test_a_batch_without_a_room_is_taken_as_it_is(
    make_trainer: Callable[..., Trainer], config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    batches = [np.arange(5), np.arange(5, 17), np.arange(3, 20)]
    expected, found = (make_trainer(name) for name in ("host", "resident"))
    for trainer in (expected, found):
        advance(trainer, batches)
    assert_same_state(found, expected)
    (warning,) = caplog.messages
    assert "too large for the shapes" in warning and warning.endswith("emt:16")


def out_of_memory_above(trainer: Trainer, n_systems: int) -> None:
    """Let the potential of a trainer run out of memory on larger batches."""

    def check(module: object, inputs: tuple) -> None:
        if inputs[0].n_systems > n_systems:
            raise torch.OutOfMemoryError("no more")

    trainer.potential.register_forward_pre_hook(check)


@pytest.mark.parametrize("choice", ["host", "resident"])
def test_out_of_memory_halves_the_batch_once(
    make_trainer: Callable[..., Trainer], config: RunConfig, choice: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected, found = (make_trainer(name) for name in ("host", choice))
    out_of_memory_above(found, 4)  # halves of 5 are 3 and 2, and a filler
    for trainer in (expected, found):
        advance(trainer, batches_of(config))
    assert_same_state(found, expected)
    (warning,) = caplog.messages
    assert "out of memory on 5 frames" in warning
    out_of_memory_above(found, 1)
    with pytest.raises(InputError, match="5 frames, taken in 2 parts; choose a larger"):
        advance(found, batches_of(config))


@pytest.mark.parametrize(("choice", "n_parts"), [("host", 7), ("resident", 7), ("sent", 2)])
def test_a_batch_taken_in_parts_is_the_same_batch(
    make_trainer: Callable[..., Trainer], config: RunConfig, choice: str, n_parts: int
) -> None:
    """Recorded, too, and where frames are too few for all parts."""
    expected, found = make_trainer("host"), make_trainer(choice, data={"accumulate": n_parts})
    steps, record = found.take_step, CalledAgain(N_RESULTS)
    found.take_step = Steps(steps.step, steps.source, steps.division, steps.weigh, record)
    batches = batches_of(config) + batches_of(config, epoch=1)
    for trainer in (expected, found):
        advance(trainer, batches)
    assert_same_state(found, expected)
    sizes = [len(part) for part in steps.division(batches[0])]
    assert len(sizes) == n_parts and sum(sizes) == 5 and max(sizes) < 5
    assert bool(record.n_replayed) == (choice != "host")


def test_a_store_that_counts_too_little_is_told(
    make_trainer: Callable[..., Trainer], config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer("resident")
    source = trainer.take_step.source
    assert isinstance(source, DeviceGraphs)
    room = source.rooms.rooms[-1]
    small = Room(room.capacity._replace(long_bonds=room.capacity.long_bonds // 4), room.n_candidates)
    monkeypatch.setattr(source, "rooms", lambda parts: small)
    with pytest.raises(InputError, match="larger than their store says; prepare it again; frames emt:"):
        advance(trainer, batches_of(config))


def test_resident_frames_are_those_of_the_store(stores: Path) -> None:
    store = Store(stores / "train")
    resident = ResidentFrames(store, CPU)
    order = [7, 3, 3, 19, 0]
    systems, labels = store.gather(np.array(order))
    spare, spare_labels = resident.gather(torch.tensor([*order, -1, -1]), n_atoms=13)
    assert spare.n_systems == 5 and spare.start.tolist() == [0, 2, 4, 6, 8, 10, 10, 10]
    for name in ("atomic_number", "position", "cell", "pbc"):
        wanted = getattr(systems, name)
        assert torch.equal(getattr(spare, name)[: len(wanted)], wanted), name
        assert getattr(spare, name).dtype == wanted.dtype
    for field in dataclasses.fields(Labels):
        wanted, found = getattr(labels, field.name), getattr(spare_labels, field.name)
        torch.testing.assert_close(found[: len(wanted)], wanted, rtol=0, atol=0, equal_nan=True)
        assert found[len(wanted) :].isnan().all() and len(found) == (7 if len(wanted) == 5 else 13)


# rooms


def test_rooms_hold_what_they_were_planned_for() -> None:
    sizes = np.random.default_rng(0).lognormal(3, 0.8, (300, 1)).astype(np.int64) * [1, 68, 4, 60, 400]
    batches = [batch for epoch in range(10) for batch in random_batches(300, 7, epoch)]
    rooms = Rooms(sizes, [[batch] for batch in batches])
    chosen = [rooms([batch]) for batch in batches]
    assert set(chosen) == set(rooms.rooms) and 3 < len(rooms.rooms) <= 5
    taken = [sum(room == one for room in chosen) / len(chosen) for one in rooms.rooms]
    assert taken[0] >= 0.25 and taken[-1] <= 0.05 + 1 / len(chosen)
    assert rooms([np.arange(300)]) is None
    division = Division(sizes, n_ranks=2).halved()
    parts = [division(batch) for batch in batches]
    for batch, four in zip(batches, parts, strict=True):
        assert len(four) == 4 and sorted(np.concatenate(four)) == sorted(batch)
    quarters = Rooms(sizes, parts)
    assert all(quarters(four) for four in parts)
    # one room for all parts of a batch, even for one without frames, is that of the largest
    assert quarters([parts[0][0], np.array([], dtype=np.int64)]) in quarters.rooms
    assert 2 * quarters.rooms[-1].n_candidates < rooms.rooms[-1].n_candidates


@pytest.mark.parametrize("balance", ["sequential", "lpt"])
def test_a_run_has_room_for_every_batch(config: RunConfig, stores: Path, balance: Strategy) -> None:
    train, val = (everything(Store(stores / name)) for name in ("train", "val"))
    data = config.data.model_copy(update={"resident": "off", "balance": balance})
    config = config.model_copy(update={"data": data})
    sizes = frame_sizes(train.store, train.indices, 6.0, 3.0)
    batches = Batches(sizes, data.batch_size, config.train.seed, balance)
    elsewhere = blank_potential(config, train, CPU).to("meta")  # any device that is not the CPU
    division = Division(sizes, balance)
    sources = open_sources(train, val, elsewhere, config, batches, division)
    assert all(isinstance(source, DeviceGraphs) for source in sources)
    for epoch in range(config.train.epochs):
        assert all(sources[0].room([batch]) for batch in batches.epoch(epoch))
    assert all(sources[1].room([part]) for part in validation_batches(6, data.batch_size, division))


def test_rooms_for_frames_without_angles() -> None:
    rooms = Rooms(np.array([[1, 0, 0, 0, 1]] * 6), [[np.arange(3)], [np.arange(3, 6)]])
    assert rooms([np.arange(3)]) == rooms.rooms[-1] and len(rooms.rooms) == 1


def test_sizes_are_counted_where_the_cutoffs_are_others(stores: Path) -> None:
    frames = everything(Store(stores / "train"))
    plan = frames.store.header.plan
    stored = frame_sizes(frames.store, frames.indices, plan.atom_cutoff, plan.bond_cutoff)
    assert stored[:, :4].tolist() == frames.store.sizes.tolist()
    smaller = frame_sizes(frames.store, frames.indices, 3.5, 2.8)
    assert (smaller <= stored).all() and (smaller.sum(0)[1:] < stored.sum(0)[1:]).all()


def test_closed_steps_keep_no_recording(make_trainer: Callable[..., Trainer], config: RunConfig) -> None:
    trainer, kept = make_trainer("resident"), []

    def record(function: Callable[[], Tensor]) -> Any:
        kept.append(weakref.ref((made := CalledAgain(N_RESULTS)(function))[0]))
        return made

    trainer.take_step._recorder = Recorder(trainer.take_step._in_room, CPU, record)
    advance(trainer, batches_of(config)[:1] * 2)
    assert kept[0]() is not None
    trainer.take_step.close()
    assert kept[0]() is None


# with a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("resident", ["auto", "off"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("readout", ["conservative", "direct"])
def test_captured_steps_on_a_gpu(
    stores: Path, tmp_path: Path, resident: str, dtype: str, readout: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The same as launched one by one, bit for bit, and as on the CPU, but for rounding."""
    frames = everything(Store(stores / "train"))
    weights = {}
    for name, device, capture in (
        ("cpu", "cpu", "off"),
        ("eager", "cuda", "off"),
        ("captured", "cuda", "auto"),
    ):
        config = configure(
            stores,
            tmp_path / name,
            model={"readout": readout},
            data={"resident": resident},
            train={"dtype": dtype, "capture": capture, "device": device},
        )
        trainer = Trainer(config, frames, frames, torch.device(device), None)
        trainer.potential.train()
        advance(trainer, batches_of(config) + batches_of(config, epoch=1))
        weights[name] = trainer.optimizer.weights.cpu()
    assert not caplog.messages
    assert torch.equal(weights["captured"], weights["eager"])
    if dtype == "float64":
        # graphs of the two builders differ in the order of their sums
        torch.testing.assert_close(weights["captured"], weights["cpu"], rtol=1e-7, atol=1e-9)
