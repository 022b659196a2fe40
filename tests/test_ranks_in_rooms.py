"""Two processes in static shapes are one process on graphs of the host, and record all or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from ranks_in_rooms import Case
from test_ranks import configure, relative

from fastchgnet.config import RunConfig

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are started as on POSIX")

BATCHES = [
    np.arange(3, 15),
    np.array([7]),
    np.arange(3, 15)[::-1].copy(),
    np.array([4, 11, 19]),
    np.array([7]),
]
"""Those of one frame leave a process nothing but fillers."""

RUNS = [
    # readout, frames on the device, parts, processes that cannot record
    ({"readout": "conservative"}, True, 1, ()),
    ({"readout": "conservative"}, False, 3, ()),
    ({"readout": "direct"}, False, 1, (1,)),
    ({"readout": "direct", "heads": "paper"}, True, 1, ()),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks.write_stores(tmp_path_factory.mktemp("rooms"))


def run_of(folder: Path, model: dict, n_parts: int) -> RunConfig:
    return configure(folder, folder / "run", model=model, data={"accumulate": n_parts})


@pytest.fixture(scope="module")
def taken(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What came of each run in two processes, and what these printed."""
    cases = [Case(run_of(folder, model, n), BATCHES, *rest) for model, resident, n, fails in RUNS
             for rest in [(resident, fails)]]  # fmt: skip
    torch.save(cases, folder / "cases")
    command = ["ranks_in_rooms.py", str(folder / "cases"), str(folder / "found")]
    ended = ranks.finish(ranks.start([command] * 2))
    assert [status for status, *_ in ended] == [0, 0], ended
    return torch.load(folder / "found", weights_only=False), [text for *_, text in ended]


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_steps_in_rooms(taken: tuple[list[dict[str, Any]], list[str]], folder: Path, number: int) -> None:
    found = taken[0][number]
    expected = ranks.steps(ranks.trainer_for(run_of(folder, RUNS[number][0], 1)), BATCHES)
    for mine, other in zip(found["gradients"], expected["gradients"], strict=True):
        assert relative(mine, other) < 1e-10  # the same sums in another order, in float64
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-10)
    assert torch.equal(*found["weights"]) and max(found["empty"]) >= 1
    if not RUNS[number][-1]:
        one, other = found["recordings"]
        # the first step in each room is taken as it is
        assert one == other and one[0] and one[1] == len(BATCHES) - found["rooms"]


def test_what_one_process_cannot_record_none_records(taken: tuple[list[dict[str, Any]], list[str]]) -> None:
    (number,) = [n for n, run in enumerate(RUNS) if run[-1]]
    assert [n_replayed for _, n_replayed in taken[0][number]["recordings"]] == [0, 0]
    line = "steps cannot be recorded and run one by one: rank 1: operation not permitted"
    assert all(line in text for text in taken[1])
