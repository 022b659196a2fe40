"""Training runs on small crystals with an effective-medium potential: learning, resuming, failing."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.build import bulk
from ase.calculators.emt import EMT

import fastchgnet.cli
from fastchgnet.config import Provenance, RunConfig
from fastchgnet.data.frame import Frame
from fastchgnet.data.store import Store, write_store
from fastchgnet.errors import InputError
from fastchgnet.files import only_process
from fastchgnet.loss import REPORT_UNITS
from fastchgnet.train import Watcher, train
from fastchgnet.train.checkpoint import load_state
from fastchgnet.train.log import read_metrics
from fastchgnet.train.progress import epoch_line
from fastchgnet.weights import load_potential

TINY = {"atom_cutoff": 3.5, "n_radial": 5, "n_angular": 5, "readout_hidden": [16]}


def emt_frames(n_frames: int, seed: int, shift: float = 0.0) -> list[Frame]:
    """Strained and rattled metals and alloys with EMT's energies, forces and stresses."""
    generator = np.random.default_rng(seed)
    frames = []
    for index in range(n_frames):
        symbol, second = generator.choice(["Cu", "Al", "Ni", "Ag"], 2)
        atoms = bulk(symbol, "bcc", a=3.1, cubic=True)
        atoms.symbols[0] = second
        strain = np.eye(3) + generator.normal(scale=0.02, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        atoms.positions += generator.normal(scale=0.1, size=(2, 3))
        atoms.calc = EMT()
        frames.append(
            Frame(
                numbers=atoms.numbers.astype(np.int64),
                positions=atoms.positions,
                cell=atoms.cell.array,
                pbc=atoms.pbc,
                source=f"emt:{index}",
                group=f"crystal-{seed}-{index}",
                energy=atoms.get_potential_energy() + shift * len(atoms),
                forces=atoms.get_forces() if index % 4 else None,
                stress=atoms.get_stress(voigt=False) if index % 3 else None,
            )
        )
    return frames


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stores `train` (20 frames), `val` (6) and `shifted` (20)."""
    folder = tmp_path_factory.mktemp("stores")
    meaning = Provenance(name="emt", functional="EMT", energy_correction="none")
    write_store(emt_frames(20, 0), folder / "train", meaning)
    write_store(emt_frames(6, 1), folder / "val", meaning)
    write_store(emt_frames(20, 0, shift=2.5), folder / "shifted", meaning)
    return folder


def settings(stores: Path, out: Path, **sections: dict) -> dict:
    """Return a configuration of 3 epochs of 4 steps, with sections updated by key."""
    base: dict[str, dict] = {
        "model": TINY,
        "optim": {"learning_rate": 3e-3, "ema_decay": 0.9},
        "data": {"train": str(stores / "train"), "val": str(stores / "val"), "batch_size": 5},
        "train": {"out": str(out), "epochs": 3, "device": "cpu"},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return base


def configure(stores: Path, out: Path, **sections: dict) -> RunConfig:
    return RunConfig.model_validate(settings(stores, out, **sections))


def assert_same_run(first: Path, second: Path) -> None:
    """Two runs ended with the same weights and metrics, bit for bit; only the time they took may differ."""
    for name in ("best", "last"):
        one, other = (
            load_potential(folder / f"{name}.safetensors").state_dict() for folder in (first, second)
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    states = [load_state(folder / "state") for folder in (first, second)]
    assert states[0] is not None and states[1] is not None and states[0][1] == states[1][1]
    assert all(torch.equal(states[0][0][key], states[1][0][key]) for key in states[0][0])
    timeless = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "frames_per_second")}
            for row in read_metrics(f)
        ]
        for f in (first, second)
    ]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="session")
def straight(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert train(configure(stores, folder)).finished
    return folder


class Interrupter(Watcher):
    """Sends this process Ctrl-C after some batches."""

    def __init__(self, n_batches: int) -> None:
        self.remaining = n_batches

    def advance(self, n_frames: int) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("readout", ["conservative", "direct"])
def test_overfits_a_few_crystals(stores: Path, tmp_path: Path, readout: str) -> None:
    config = configure(
        stores,
        tmp_path / "run",
        model={"readout": readout},
        data={"train": str(stores / "val"), "batch_size": 6},
        optim={"learning_rate": 1e-2, "ema_decay": 0.5},
        train={"epochs": 30},
    )
    assert train(config).finished
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["val"]["loss"] < rows[0]["train"]["loss"] / 5
    assert rows[-1]["val"]["magmoms_mmub"] is None


def test_a_run_leaves_what_is_promised(straight: Path, stores: Path) -> None:
    names = {path.name for path in straight.iterdir()}
    weights = {"best.safetensors", "best.safetensors.json", "last.safetensors", "last.safetensors.json"}
    assert names == {"config.yaml", "state", "metrics.jsonl", "tensorboard", *weights}
    assert len(list((straight / "state").iterdir())) == 2
    assert list((straight / "tensorboard").iterdir())
    rows = read_metrics(straight)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 4), (2, 8), (3, 12)]
    assert rows[-1]["learning_rate"] == pytest.approx(3e-5)
    assert set(rows[0]["train"]) == set(rows[0]["val"]) == {"loss", *REPORT_UNITS}
    assert "meV/atom" in epoch_line(rows[0]) and "mu_B" not in epoch_line(rows[0])
    best = json.loads((straight / "best.safetensors.json").read_text())
    losses = [row["val"]["loss"] for row in rows]
    assert best["extra"]["metrics"]["val"]["loss"] == min(losses)
    assert best["provenance"]["functional"] == "EMT"
    assert RunConfig.model_validate(yaml.safe_load((straight / "config.yaml").read_text()))


def test_saved_weights_give_the_validation_errors(straight: Path, stores: Path) -> None:
    """The averaged weights were validated, and they are what was saved."""
    potential = load_potential(straight / "last.safetensors")
    store = Store(stores / "val")
    systems, labels = store.gather(np.arange(len(store)))
    n_atoms = torch.tensor(systems.n_atoms)
    error = ((potential(potential.build_graph(systems)).energy - labels.energy) / n_atoms).abs().mean()
    # One batch here, two there: sums in float32 differ in their order.
    assert read_metrics(straight)[-1]["val"]["energy_mev_per_atom"] == pytest.approx(
        1000 * error.item(), rel=1e-4
    )


@pytest.mark.parametrize("n_batches", [1, 4, 6, 12])
def test_ctrl_c_and_resume_change_no_bit(
    stores: Path, straight: Path, tmp_path: Path, n_batches: int
) -> None:
    config = configure(stores, tmp_path / "run")
    stopped = train(config, watcher=Interrupter(n_batches))
    assert not stopped.finished and stopped.progress.step == n_batches
    with pytest.raises(InputError, match="already holds a run"):
        train(config)
    assert train(config, resume=True).finished
    assert_same_run(tmp_path / "run", straight)
    # A finished run has nothing left to do.
    assert train(config, resume=True).finished
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_can_be_resumed(
    stores: Path, straight: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "run"
    values = settings(stores, out, train={"checkpoint_minutes": 1e-6})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-W", "error", "-m", "fastchgnet", "train", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((out / "state").glob("step-*[3-9].safetensors")):
        time.sleep(0.001)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    progress = load_state(out / "state")
    assert progress is not None and 3 <= progress[1].step < 12, error
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume continues" in error.splitlines()[-1] and "Traceback" not in error
    assert train(RunConfig.model_validate(values), resume=True).finished
    assert_same_run(out, straight)


class Settings(Watcher):
    """Notes whether results could depend on the order in which threads arrive."""

    deterministic = False

    def advance(self, n_frames: int) -> None:
        self.deterministic = torch.are_deterministic_algorithms_enabled()


def test_threads_do_not_decide(stores: Path, tmp_path: Path) -> None:
    """The race is rare and cannot be provoked, so what rules it out is checked instead."""
    watcher = Settings()
    train(configure(stores, tmp_path / "run", train={"epochs": 1}), watcher=watcher)
    assert watcher.deterministic and not torch.are_deterministic_algorithms_enabled()


def test_seeds_decide(stores: Path, straight: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)
    before = torch.random.get_rng_state()
    train(configure(stores, tmp_path / "same"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_run(tmp_path / "same", straight)
    train(configure(stores, tmp_path / "other", train={"seed": 1}))
    losses = [read_metrics(folder)[0]["train"]["loss"] for folder in (tmp_path / "other", straight)]
    assert losses[0] != losses[1]


def test_a_loss_that_is_not_a_number_names_its_frames(stores: Path, tmp_path: Path) -> None:
    config = configure(stores, tmp_path / "run", optim={"learning_rate": 1e30, "warmup_epochs": 0})
    with pytest.raises(InputError) as caught:
        train(config)
    message = str(caught.value)
    assert "is not a number at step 2" in message and "\n" not in message
    frames = message.split("frames ")[1].split(", ")
    assert len(frames) == 5 and set(frames) <= {f"emt:{index}" for index in range(20)}
    state = load_state(tmp_path / "run" / "state")
    assert state is not None and state[1].step == 0
    assert all(tensor.isfinite().all() for tensor in state[0].values())


def test_resuming_refuses_another_run(stores: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(configure(stores, out), watcher=Interrupter(1))
    with pytest.raises(InputError, match=r"another loss\.preset, train\.seed"):
        train(configure(stores, out, loss={"preset": "chgnet"}, train={"seed": 3}), resume=True)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(str(stores / "train"), str(stores / "shifted")))
    with pytest.raises(InputError, match="not the frames that the run"):
        train(configure(stores, out, data={"train": str(stores / "shifted")}), resume=True)


def test_a_run_from_before_a_setting_existed_goes_on(stores: Path, tmp_path: Path, straight: Path) -> None:
    config = configure(stores, tmp_path / "run")
    train(config, watcher=Interrupter(5))
    file = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    del values["optim"]["base_batch_size"]
    file.write_text(yaml.safe_dump(values))
    assert train(config, resume=True).finished
    assert_same_run(tmp_path / "run", straight)


def test_a_rate_scaled_with_the_batch_is_trained_with(stores: Path, tmp_path: Path) -> None:
    # batches of 5 frames
    plain = {"learning_rate": 2 * 5 / 3 * 1e-3, "warmup_epochs": 0.5}
    scaled = plain | {"learning_rate": 2e-3, "base_batch_size": 3}
    for name, optim in (("plain", plain), ("scaled", scaled)):
        assert train(configure(stores, tmp_path / name, optim=optim, train={"epochs": 1})).finished
    assert_same_run(tmp_path / "plain", tmp_path / "scaled")


@pytest.mark.skipif(os.name != "posix", reason="locks are for POSIX")
def test_two_runs_in_one_folder_do_not_mix(stores: Path, tmp_path: Path) -> None:
    config = configure(stores, tmp_path / "run")
    with only_process(tmp_path / "run"), pytest.raises(InputError, match="another process is writing here"):
        train(config)
    assert list((tmp_path / "run").iterdir()) == []
    assert train(config).finished


def test_splits_of_one_store(stores: Path, tmp_path: Path) -> None:
    seed = next(s for s in range(100) if len(Store(stores / "train").split("val", s)))
    data = {"val": None, "split_seed": seed}
    assert train(configure(stores, tmp_path / "run", data=data, train={"epochs": 1})).finished
    seed = next(s for s in range(100) if not len(Store(stores / "train").split("val", s)))
    with pytest.raises(InputError, match="no validation frames"):
        train(configure(stores, tmp_path / "none", data=data | {"split_seed": seed}))


def test_conservative_training_starts_from_direct_weights(stores: Path, tmp_path: Path) -> None:
    first = tmp_path / "direct"
    train(configure(stores, first, model={"readout": "direct"}, train={"epochs": 1}))
    weights = str(first / "last.safetensors")
    start = load_potential(weights)
    finishing = configure(
        stores,
        tmp_path / "finish",
        model={"readout": "conservative"},
        optim={"learning_rate": 1e-12},
        train={"init": weights, "references": "keep", "epochs": 1},
    )
    train(finishing)
    end = load_potential(tmp_path / "finish" / "last.safetensors")
    assert end.config == start.config.model_copy(update={"readout": "conservative"})
    for name, tensor in end.state_dict().items():
        torch.testing.assert_close(tensor, start.state_dict()[name], rtol=1e-5, atol=1e-8)
    with pytest.raises(InputError, match=r"model\.n_radial: not as in the weights"):
        train(configure(stores, tmp_path / "bad", model={"n_radial": 7}, train={"init": weights}))


def test_fine_tuning_shifts_the_references(
    stores: Path, straight: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Energies 2.5 eV higher per atom cost nothing but that shift of every element that occurs."""
    weights = str(straight / "last.safetensors")
    out, optim = tmp_path / "run", {"learning_rate": 1e-12}
    data = {"train": str(stores / "shifted"), "val": str(stores / "shifted")}
    train(configure(stores, out, data=data, optim=optim, train={"init": weights, "epochs": 1}))
    start, end = load_potential(weights), load_potential(out / "last.safetensors")
    systems, labels = Store(stores / "shifted").gather(np.arange(20))
    before, after = (p(p.build_graph(systems)).energy - labels.energy for p in (start, end))
    assert (before / 2).abs().mean() > 2
    assert (after / 2).abs().mean() < 0.1
    absent = start.references == 0
    assert torch.equal(end.references[absent], start.references[absent])
    assert not caplog.records


def test_kept_references_of_another_meaning_are_told(
    straight: Path, stores: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_store(emt_frames(20, 0), tmp_path / "store", Provenance(name="other", functional="PBE"))
    init = {"init": str(straight / "last.safetensors"), "references": "keep", "epochs": 1}
    with caplog.at_level(logging.WARNING):
        train(configure(stores, tmp_path / "run", data={"train": str(tmp_path / "store")}, train=init))
    assert "(EMT, correction none) are kept for data with PBE, correction unknown" in caplog.text


def test_the_command_line_trains_and_refuses(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(stores, tmp_path / "run", train={"epochs": 1})))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastchgnet", "train", str(path), *arguments])
        try:
            fastchgnet.cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    status, out, error = run("--json", "--set", "train.epochs=2")
    assert status == 0 and json.loads(out)["epoch"] == 2 and json.loads(out)["finished"]
    assert "epoch 2: loss" in error and "best.safetensors" in error.splitlines()[-1]
    for arguments, message in (
        ((), "already holds a run"),
        (("--set", "optim.lr=1"), "unknown key optim.lr"),
        (("--set", "train.device=gpu7"), "device gpu7 cannot be used"),
        (("--set", "train.device=meta"), "device meta cannot be used"),
        (("--set", f"data.train={tmp_path}"), "no store here"),
    ):
        elsewhere = ("--set", f"train.out={tmp_path / 'elsewhere'}") if arguments else ()
        status, out, error = run(*arguments, *elsewhere)
        assert status == 2 and message in error and not out
        assert len(error.splitlines()) == 1 and error.startswith("error: ")
