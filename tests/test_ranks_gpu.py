"""Two GPUs train as one: recorded steps whose messages NCCL carries, and runs that end.

Also the script of each process. Nothing here runs where there are fewer than two GPUs.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import ranks
import torch
import yaml
from test_ranks import configure, relative

from fastchgnet.config import RunConfig
from fastchgnet.data.store import Store
from fastchgnet.train.checkpoint import load_state
from fastchgnet.train.log import read_metrics
from fastchgnet.train.loop import Trainer
from fastchgnet.train.ranks import ALONE, Ranks, joined
from fastchgnet.train.setup import Frames

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

SECONDS = 600
"""For processes that compile kernels first."""


class Case(NamedTuple):
    """A run and what is particular about it."""

    readout: str
    dtype: str
    resident: str
    n_parts: int

    def config(self, folder: Path, capture: str) -> RunConfig:
        return configure(
            folder,
            folder / "run",
            model={"readout": self.readout},
            data={"resident": self.resident, "accumulate": self.n_parts},
            train={"device": "cuda", "dtype": self.dtype, "capture": capture},
        )


CASES = [
    Case("conservative", "float64", "auto", 1),
    Case("conservative", "float32", "off", 1),
    Case("direct", "float32", "auto", 2),
    Case("direct", "float64", "off", 1),
]

LIMITS = {"float64": 1e-9, "float32": 2e-3}
"""Of gradients: sums in another order; factors that are rounded to 10 bits may go either way."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks.write_stores(tmp_path_factory.mktemp("gpus"))


def finish(processes: Sequence[subprocess.Popen], seconds: float = SECONDS) -> list[tuple[int, str]]:
    """Wait, and return how each ended: status and errors; those that hang are killed and fail the test."""
    return [(status, text) for status, _, text in ranks.finish(processes, seconds)]


def start(arguments: Sequence[str]) -> list[subprocess.Popen]:
    """Start two processes as a launcher would; warnings of libraries are theirs to print."""
    return ranks.start([arguments] * 2, warnings="default")


# in the processes


def steps(config: RunConfig, device: torch.device, together: Ranks) -> dict[str, Any]:
    """Take steps on batches of three epochs, and on single frames: a process gets nothing but fillers."""
    store = Store(config.data.train)
    frames = Frames(store, np.arange(len(store)))
    trainer = Trainer(config, frames, frames, device, None, together)
    trainer.align()
    trainer.potential.train()
    batches = [batch for epoch in range(3) for batch in trainer.batches.epoch(epoch)]
    batches += [np.array([n]) for n in (7, 8, 7)]
    found = ranks.steps(trainer, batches)
    found["gradients"] = [gradient.cpu() for gradient in found["gradients"]]
    found["weights"] = trainer.optimizer.weights.cpu()
    taking = trainer.take_step
    found["n_recorded"] = len(taking._recorder._recordings)
    found["roomless"] = any(taking.source.room(taking.division(batch)) is None for batch in batches)
    taking.close()
    return found


def main(folder: Path) -> None:
    """Take the steps of all cases, recorded and not; write what came of them in each process."""
    with joined("cuda", SECONDS, threading.Event()) as (together, device):
        assert device.index == together.number == torch.cuda.current_device()
        found = {
            (number, capture): steps(case.config(folder, capture), device, together)
            for number, case in enumerate(CASES)
            for capture in ("auto", "off")
        }
        torch.save(found, folder / f"found-{together.number}")


@pytest.fixture(scope="module")
def taken(folder: Path) -> list[dict[tuple[int, str], dict[str, Any]]]:
    """What came of the steps in each of two processes, which have ended in order."""
    ended = finish(start([__file__, str(folder)]))
    assert [status for status, _ in ended] == [0, 0], ended
    assert not any("recorded" in text or "fused" in text for _, text in ended), ended
    return [torch.load(folder / f"found-{number}", weights_only=False) for number in range(2)]


# the tests


@pytest.mark.parametrize("number", range(len(CASES)))
def test_both_processes_have_the_same_weights(taken: list, number: int) -> None:
    one, other = (found[number, "auto"] for found in taken)
    assert torch.equal(one["weights"], other["weights"]) and one["losses"] == other["losses"]
    assert one["n_recorded"] == other["n_recorded"] >= 1 and not one["roomless"]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_recorded_steps_are_those_launched_one_by_one(taken: list, number: int) -> None:
    """Bit for bit: a sum over two processes has one order."""
    recorded, plain = (taken[0][number, capture] for capture in ("auto", "off"))
    assert plain["n_recorded"] == 0
    assert recorded["losses"] == plain["losses"]
    assert torch.equal(recorded["weights"], plain["weights"])


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_are_one(taken: list, number: int, folder: Path) -> None:
    case, found = CASES[number], taken[0][number, "auto"]
    whole = case._replace(n_parts=1).config(folder, "auto")
    expected = steps(whole, torch.device("cuda", 0), ALONE)
    n_compared = None if case.dtype == "float64" else 3  # weights drift apart with the steps
    pairs = list(zip(found["gradients"], expected["gradients"], strict=True))[:n_compared]
    assert max(relative(mine, other) for mine, other in pairs) < LIMITS[case.dtype]
    losses = (np.array(one["losses"])[:n_compared] for one in (found, expected))
    np.testing.assert_allclose(*losses, rtol=LIMITS[case.dtype])


def write(folder: Path, out: Path, **train: Any) -> Path:
    config = configure(folder, out, train={"device": "cuda", "dtype": "float32", **train})
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def test_a_run_ends(folder: Path, tmp_path: Path) -> None:
    """NCCL waits for recordings of its messages to go before its links end."""
    path = write(folder, tmp_path / "run")
    ended = finish(start(["-m", "fastchgnet", "train", str(path)]))
    assert [status for status, _ in ended] == [0, 0], ended
    assert len(read_metrics(tmp_path / "run")) == 3 and "epoch 3: loss" in ended[0][1]


def test_the_rest_of_a_run_ends_where_a_process_was_killed(folder: Path, tmp_path: Path) -> None:
    """Though it waits for a recorded message, of which no library knows how long it takes."""
    path = write(folder, tmp_path / "run", epochs=3000, checkpoint_minutes=1e-6, timeout_minutes=0.5)
    processes = start(["-m", "fastchgnet", "train", str(path)])
    deadline = time.monotonic() + SECONDS
    # late enough that steps are recorded
    while not list((tmp_path / "run" / "state").glob("step-*[3-9][0-9].safetensors")):
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.05)
    processes[1].kill()
    (status, text), _ = finish(processes, 120)  # four times its patience
    assert status == 2 and "rank 1" in [line for line in text.splitlines() if "error: " in line][-1]
    assert load_state(tmp_path / "run" / "state") is not None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
