"""What a script has set for its own networks does not change ours: default device, autocast and others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from crystals import crystals, potential
from frames import labelled_frames
from numpy.typing import NDArray

import fastchgnet
from fastchgnet.config import ModelConfig, Provenance, RunConfig
from fastchgnet.data.store import Store, write_store
from fastchgnet.device import own_settings
from fastchgnet.evaluate import evaluate
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.potential import Potential
from fastchgnet.sim.md.ensemble import Settings as Dynamics
from fastchgnet.sim.relax import Settings as Relaxation
from fastchgnet.train import train
from fastchgnet.weights import load_potential, save_potential

SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))
MODEL, DIRECT, STORE = "model.safetensors", "direct.safetensors", "store"

Numbers = NDArray[np.float64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with models and a store."""
    folder = tmp_path_factory.mktemp("settings")
    save_potential(potential(SMALL), folder / MODEL)
    save_potential(potential(SMALL.model_copy(update={"readout": "direct"})), folder / DIRECT)
    write_store(list(labelled_frames(8)), folder / STORE, Provenance(name="store"))
    return folder


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def all_of_them() -> Iterator[None]:
    with default_device(), default_dtype(torch.float16), torch.autocast("cpu"), torch.inference_mode():
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "default device": default_device,
    "a default device in a block": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "all": all_of_them,
}


def flat(*values: object) -> Numbers:
    return np.concatenate([np.ravel(np.asarray(value, dtype=np.float64)) for value in values])


def predicted(folder: Path) -> Numbers:
    models = (fastchgnet.load(folder / name) for name in (MODEL, DIRECT))
    rows = [row for model in models for row in fastchgnet.predict(model, crystals())]
    return flat(*(values for r in rows for values in (r.energies, r.forces, r.stress, r.magmoms)))


def calculated(folder: Path) -> Numbers:
    atoms, found = crystals()[1], []
    atoms.calc = fastchgnet.FastCHGNetCalculator(folder / MODEL, device="cpu")
    for _ in range(3):
        found += [atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()]
        atoms.positions[0, 0] += 0.2
    return flat(*found)


def relaxed(folder: Path) -> Numbers:
    rows = fastchgnet.relax(fastchgnet.load(folder / MODEL), crystals(), Relaxation(max_steps=4))
    return flat(*(values for row in rows for values in (row.energies, row.positions, row.cell)))


def moved(folder: Path) -> Numbers:
    found = []
    for settings in (
        Dynamics(ensemble="nve"),
        Dynamics(ensemble="nvt", thermostat="langevin"),
        Dynamics(ensemble="npt"),
    ):
        model = fastchgnet.load(folder / MODEL)
        dynamics = fastchgnet.MolecularDynamics(model, crystals()[:2], [300.0, 600.0], settings)
        dynamics.run(3)
        for row in dynamics.snapshots():
            found += [row.energy, row.kinetic, row.conserved, row.pressure, row.atoms.positions]
    return flat(*found)


def evaluated(folder: Path) -> Numbers:
    store = Store(folder / STORE)
    found = evaluate(fastchgnet.load(folder / MODEL), store, np.arange(len(store)))
    return flat(*(values for sample in found.samples.values() for values in sample.prediction))


def new_weights(folder: Path) -> Numbers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Potential(SMALL, torch.zeros(94, dtype=torch.float64, device="cpu"), Provenance(name="new"))
    assert made.dtype == torch.float32
    return flat(*(values.detach() for values in made.state_dict().values()))


def trained(folder: Path) -> Numbers:
    with TemporaryDirectory() as out:
        config = {
            "model": SMALL.model_dump(),
            "data": {"train": folder / STORE, "batch_size": 4, "val": folder / STORE},
            "train": {"out": Path(out) / "run", "epochs": 1, "device": "cpu"},
        }
        train(RunConfig.model_validate(config))
        model = load_potential(Path(out) / "run" / "last.safetensors")
    return flat(*(values.detach() for values in model.state_dict().values()))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("numbers", [predicted, calculated, relaxed, moved, evaluated, new_weights, trained])
def test_settings_of_a_script_change_nothing(
    folder: Path, numbers: Callable[[Path], Numbers], setting: str
) -> None:
    expected = numbers(folder)
    with SETTINGS[setting]():
        before = described()
        found = numbers(folder)
        assert described() == before
    np.testing.assert_array_equal(found, expected)


def described() -> tuple[object, ...]:
    return (
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("readout", ["conservative", "direct"])
def test_gradients_of_a_loss_under_autocast_are_those_without(readout: str) -> None:
    """As torch asks, `backward` is called outside."""

    def gradients(setting: AbstractContextManager[object]) -> list[torch.Tensor | None]:
        model = potential(SMALL.model_copy(update={"readout": readout})).train()
        with setting:
            output = model(model.build_graph(systems_from_atoms(crystals())))
            loss = output.energy.sum() + output.forces.square().sum()
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(contextlib.nullcontext())
    found = gradients(torch.autocast("cpu", torch.bfloat16))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_whether_gradients_are_recorded_stays() -> None:
    recorded = own_settings(torch.is_grad_enabled)
    for setting in (contextlib.nullcontext, torch.no_grad):
        with setting(), torch.autocast("cpu"):
            assert recorded() == torch.is_grad_enabled()
