"""Several processes train as one: the same gradients and losses, and clear words where one of them ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import ranks
import torch
import yaml
from test_train import TINY

from fastchgnet.config import Provenance, RunConfig
from fastchgnet.data.store import Store, write_store
from fastchgnet.errors import InputError
from fastchgnet.files import only_process
from fastchgnet.loss import tally
from fastchgnet.train import train
from fastchgnet.train.checkpoint import load_state
from fastchgnet.train.log import read_metrics
from fastchgnet.train.ranks import joined
from fastchgnet.train.sampler import Strategy
from fastchgnet.train.setup import Frames

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are for POSIX")

PATIENCE = 9
"""Seconds that a process waits for a missing one; on a busy machine they come seconds after each other."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the stores `train`, 30 frames, and `val`, 7."""
    return ranks.write_stores(tmp_path_factory.mktemp("ranks"))


def configure(folder: Path, out: Path, **sections: dict) -> RunConfig:
    values: dict[str, dict] = {
        "model": TINY | {"bond_cutoff": 2.5},  # few angles: float64 has no compiled bodies
        "optim": {"learning_rate": 3e-3, "ema_decay": 0.9},
        "data": {"train": str(folder / "train"), "val": str(folder / "val"), "batch_size": 8},
        "train": {"out": str(out), "epochs": 3, "device": "cpu", "dtype": "float64"},
    }
    return RunConfig.model_validate({name: one | sections.get(name, {}) for name, one in values.items()})


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def taken(count: int, runs: list, tmp_path: Path) -> list[dict[str, Any]]:
    torch.save(runs, tmp_path / "runs")
    ranks.run(count, "take_steps", tmp_path / "runs", tmp_path / f"found-{count}")
    return torch.load(tmp_path / f"found-{count}", weights_only=False)


def test_the_gradient_is_that_of_one_process(folder: Path, tmp_path: Path) -> None:
    cases = [
        (readout, strategy, dtype, accumulate)
        for readout, strategy, dtype in itertools.product(
            ("conservative", "direct"), get_args(Strategy), ("float64", "float32")
        )
        for accumulate in ((1, 3) if strategy == "lpt" else (1,))
    ]
    configs = [
        configure(
            folder,
            tmp_path / "run",
            model={"readout": readout},
            data={"balance": strategy, "accumulate": accumulate},
            train={"dtype": dtype},
        )
        for readout, strategy, dtype, accumulate in cases
    ]
    batches = [np.arange(3, 15), np.array([7])]  # the second leaves one process without a frame
    found = taken(2, [(config, batches) for config in configs], tmp_path)
    expected: dict[tuple, dict] = {}
    for case, config, of_two in zip(cases, configs, found, strict=True):
        readout, _, dtype, _ = case
        if (readout, dtype) not in expected:  # the same in one process, where nothing is divided
            whole = config.model_copy(update={"data": config.data.model_copy(update={"accumulate": 1})})
            expected[readout, dtype] = ranks.steps(ranks.trainer_for(whole), batches)
        of_one = expected[readout, dtype]
        limit = 1e-10 if dtype == "float64" else 1e-5  # of the same sums in another order
        for mine, other in zip(of_two["gradients"], of_one["gradients"], strict=True):
            assert relative(mine, other) < limit, case
        np.testing.assert_allclose(of_two["losses"], of_one["losses"], rtol=limit)


def test_losses_do_not_depend_on_the_number_of_processes(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches = [rng.permutation(30)[:4] for _ in range(8)]
    config = configure(folder, tmp_path / "run")
    expected = ranks.steps(ranks.trainer_for(config), batches)["losses"]
    assert len(set(expected)) == 8
    for count in (2, 3):
        (found,) = taken(count, [(config, batches)], tmp_path)
        np.testing.assert_allclose(found["losses"], expected, rtol=1e-8)


def test_resuming_within_an_epoch_changes_no_bit(folder: Path, tmp_path: Path) -> None:
    config = configure(folder, tmp_path / "run")
    torch.save([(config, np.array_split(np.random.default_rng(0).permutation(30), 5))], tmp_path / "runs")
    ranks.run(2, "interrupt_an_epoch", tmp_path / "runs")
    state = load_state(tmp_path / "run/state")
    assert state is not None
    fewer = ranks.trainer_for(config, state=state)  # one process goes on with all of both
    np.testing.assert_array_equal(fewer.sums.count, state[0]["sums.count"].sum(0))
    for name in ("sums.count", "potential.references"):
        other = {key: tensor for key, tensor in state[0].items() if key != name}
        with pytest.raises(InputError, match="another version"):
            ranks.trainer_for(config, state=(other, state[1]))


# runs that survive


@pytest.fixture(scope="module")
def straight(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run of one process that was never interrupted."""
    return losses(train_on(1, folder, tmp_path_factory.mktemp("straight") / "run")[1])


def write(folder: Path, out: Path, **sections: dict) -> Path:
    """Write the YAML of a run."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(configure(folder, out, **sections).model_dump(mode="json")))
    return path


def train_on(count: int, folder: Path, out: Path, *arguments: str) -> tuple[list[tuple[int, str, str]], Path]:
    """Run the command line in some processes."""
    command = ["-m", "fastchgnet", "train", str(write(folder, out)), *arguments]
    ended = ranks.finish(ranks.start([command] * count))
    assert [status for status, *_ in ended] == [0] * count, ended
    return ended, out


def losses(out: Path) -> list[float]:
    return [row[kind]["loss"] for row in read_metrics(out) for kind in ("train", "val")]


def wait_for_states(out: Path, *processes: subprocess.Popen) -> None:
    deadline = time.monotonic() + ranks.SECONDS
    while not list((out / "state").glob("step-*[3-9].safetensors")):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.002)


def test_only_the_first_process_prints_and_writes(
    folder: Path, straight: list[float], tmp_path: Path
) -> None:
    ended, out = train_on(3, folder, tmp_path / "run", "--json")
    assert json.loads(ended[0][1])["finished"] and "epoch 3: loss" in ended[0][2]
    assert [text for _, *texts in ended[1:] for text in texts] == [""] * 4
    np.testing.assert_allclose(losses(out), straight, rtol=1e-8)
    names = {path.name for path in out.iterdir()}
    assert {"config.yaml", "state", "metrics.jsonl", "best.safetensors"} < names and ".lock" not in names


def test_processes_may_outnumber_the_frames(tmp_path: Path) -> None:
    for name, count in (("train", 2), ("val", 1)):
        write_store(ranks.uneven_frames(count), tmp_path / name, Provenance(name="metals"))
    ended, out = train_on(3, tmp_path, tmp_path / "three")
    assert "reference energies" in ended[0][2]  # which so few frames do not determine
    assert [text for _, *texts in ended[1:] for text in texts] == [""] * 4
    _, alone = train_on(1, tmp_path, tmp_path / "one")
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-8)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_costs_the_work_since_the_last_state(
    folder: Path, straight: list[float], tmp_path: Path, victim: int
) -> None:
    out = tmp_path / "run"
    path = write(folder, out, train={"checkpoint_minutes": 1e-6, "timeout_minutes": 0.5})
    processes = ranks.start([["-m", "fastchgnet", "train", str(path)]] * 2)
    wait_for_states(out, *processes)
    processes[victim].kill()
    status, _, text = ranks.finish(processes)[1 - victim]
    assert status == 2 and text.splitlines()[-1].startswith("error: ")
    if not victim:  # it holds what processes know of each other, unless a launcher does
        assert "error: lost contact with rank 0 (step " in text
    else:
        assert f"rank 1 (process {processes[1].pid} on " in text and "ended without a word" in text
    state = load_state(out / "state")
    assert state is not None and 0 < state[1].step < 12
    train_on(1, folder, out, "--resume")
    np.testing.assert_allclose(losses(out), straight, rtol=1e-8)


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_process_that_hangs_is_named(folder: Path, tmp_path: Path, victim: int) -> None:
    out = tmp_path / "run"
    path = write(
        folder, out, train={"checkpoint_minutes": 1e-6, "timeout_minutes": PATIENCE / 60, "epochs": 300}
    )
    processes = ranks.start([["-m", "fastchgnet", "train", str(path)]] * 3)
    wait_for_states(out, *processes)
    hung = processes.pop(victim)
    hung.send_signal(signal.SIGSTOP)
    ended = [process.communicate(timeout=ranks.SECONDS) for process in processes]
    hung.kill()
    ranks.finish([hung])
    assert [process.returncode for process in processes] == [2, 2]
    lines = [line for _, text in ended for line in text.splitlines() if line.startswith("error: ")]
    if victim:
        (line,) = lines
        assert f"rank 2 (process {hung.pid} on " in line and f"did not come within {PATIENCE} s" in line
    else:  # it keeps the store, so the others cannot agree on who prints
        assert len(lines) == 2 and all("no answer from rank 0 (" in line for line in lines)
    assert load_state(out / "state") is not None


def test_stopping_by_a_signal_to_one_process_stops_all(
    folder: Path, straight: list[float], tmp_path: Path
) -> None:
    """As SLURM does before it takes a node away, though it asks all of them."""
    out = tmp_path / "run"
    path = write(folder, out, train={"checkpoint_minutes": 1e-6})
    processes = ranks.start([["-m", "fastchgnet", "train", str(path)]] * 2)
    wait_for_states(out, *processes)
    for _ in range(3):
        processes[1].send_signal(signal.SIGTERM)
    ended = ranks.finish(processes)
    assert [status for status, *_ in ended] == [130, 130], ended
    assert "--resume continues" in ended[0][2].splitlines()[-1]
    train_on(3, folder, out, "--resume")
    np.testing.assert_allclose(losses(out), straight, rtol=1e-8)


@pytest.mark.parametrize("absent", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_process_that_does_not_come_is_named(folder: Path, tmp_path: Path, absent: int) -> None:
    path = write(folder, tmp_path / "run", train={"timeout_minutes": PATIENCE / 60})
    commands = [["-m", "fastchgnet", "train", str(path)] for _ in range(3)]
    commands[absent] = ["-c", "pass"]
    ended = ranks.finish(ranks.start(commands))
    assert [status for status, *_ in ended] == [2 * (number != absent) for number in range(3)], ended
    text = "".join(text for *_, text in ended)
    assert f"error: rank {absent} had not come to the start of the run when {PATIENCE} s had passed" in text
    assert "Traceback" not in text


def test_a_process_that_waits_for_others_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    for number in (0, 1):  # who keeps the store, and who waits for it
        for name, value in ranks.environment(number, 2, ranks.free_port()).items():
            monkeypatch.setenv(name, value)
        refused = pytest.raises(InputError, match=f"rank {1 - number} had not come .* this was stopped")
        with refused, joined("cpu", ranks.SECONDS, stop):
            pass


def test_a_folder_in_use_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    config = configure(folder, tmp_path / "run", train={"epochs": 1})
    train(config)
    older, newest = sorted((tmp_path / "run/state").iterdir())
    older.write_bytes(newest.read_bytes())
    newest.write_bytes(newest.read_bytes().replace(b'epoch\\": 1', b'epoch\\": 0'))
    unfinished = tmp_path / "run/state/.step.part"
    unfinished.touch()
    with only_process(tmp_path / "run"), pytest.raises(InputError, match="another process is writing"):
        train(config, resume=True)
    assert newest.exists() and unfinished.exists()
    assert train(config, resume=True).progress.epoch == 1
    assert not newest.exists() and not unfinished.exists()  # as its header was damaged


def test_processes_that_differ_are_refused_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    write_store(ranks.uneven_frames(29), tmp_path / "fewer", Provenance(name="metals"))
    commands = []
    for name, sections in (("a", {}), ("b", {"optim": {"learning_rate": 1e-3}})):
        sections |= {"data": {"train": str(tmp_path / "fewer")}} if name == "b" else {}
        commands.append(["-m", "fastchgnet", "train", str(write(folder, tmp_path / name, **sections))])
    (first, _, text), (second, *silent) = ranks.finish(ranks.start(commands))
    assert (first, second) == (2, 2) and silent == ["", ""]
    assert text == (
        "error: rank 1 differs from rank 0 in optim.learning_rate, the training frames; all processes of a "
        "run need the same configuration, data and versions\n"
    )
    assert not (tmp_path / "a").exists()


def test_an_error_of_one_process_is_told_once(folder: Path, tmp_path: Path) -> None:
    good, bad = (write(folder, tmp_path / name) for name in ("a", "b"))
    bad.write_text(bad.read_text().replace(str(folder / "train"), str(tmp_path / "nothing")))
    (first, _, text), (second, *silent) = ranks.finish(
        ranks.start([["-m", "fastchgnet", "train", str(path)] for path in (good, bad)])
    )
    assert (first, second) == (2, 2) and silent == ["", ""]
    assert text.startswith("error: rank 1: ") and "no store here" in text and len(text.splitlines()) == 1


def test_the_launcher_restarts_what_was_killed(folder: Path, straight: list[float], tmp_path: Path) -> None:
    """torchrun itself, whose processes go on from the last state without being told to."""
    out = tmp_path / "run"
    path = write(folder, out, train={"checkpoint_minutes": 1e-6})
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--standalone"]
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "fastchgnet", "train", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for_states(out, process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "fastchgnet"], capture_output=True, text=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, text = process.communicate(timeout=2 * ranks.SECONDS)
    assert process.returncode == 0, text
    np.testing.assert_allclose(losses(out), straight, rtol=1e-8)


def test_labels_are_counted_as_the_loss_does(folder: Path) -> None:
    frames = Frames(Store(folder / "train"), np.arange(30)[::-1])
    counts = frames.label_counts()
    trainer = ranks.trainer_for(configure(folder, Path("nowhere")))
    for position in range(30):
        systems, labels = frames.gather(np.array([position]))
        batch = trainer.potential.build_graph(systems)
        sums = tally(trainer.potential(batch), labels, batch)
        assert counts[position].tolist() == sums.count.tolist()
    assert (counts.min(0) == 0).all() and counts.sum(0).tolist() == counts[::-1].sum(0).tolist()
