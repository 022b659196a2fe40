"""The trainer's whole step through the Triton bodies of everything, against the PyTorch ones in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_step import trainer_step

from fastchgnet.bench.correctness import POLICIES

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: object) -> Any:
    """Run a script in a process of its own; return what it prints."""
    command = [sys.executable, str(ROOT / "tests" / script), *map(str, arguments)]
    # it interprets, also where there is a GPU
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["conservative", "direct"])
def test_tf32_costs_no_more_than_it_may(readout: str) -> None:
    found = run("triton_deviations.py", readout, 2)
    for quantity, limit in POLICIES["tf32"].items():
        assert found[quantity] <= limit, quantity
    assert found["energy_ev_per_atom"] > 1e-6, "nothing was rounded"


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["conservative", "direct"])
def test_a_step_of_kernels_is_that_of_pytorch(readout: str, tmp_path: Path) -> None:
    counts = run("triton_step.py", readout, 2, tmp_path / "found.pt")
    # otherwise PyTorch bodies were compared with themselves
    launched = {name.split(".")[0] for names in counts.values() for name in names if "::" not in name}
    assert {"frames", "neighbors", "neighbors_pad", "message", "projection", "readout", "adam"} <= launched
    assert run("triton_step.py", readout, 1, tmp_path / "one.pt") == counts, "the same for any batch"

    case = trainer_step(readout, 2, tmp_path, torch.float64)
    case.take()
    made = torch.load(tmp_path / "found.pt")
    for name, tensor in case.found().items():
        expected, found = tensor.double(), made[name].double()
        # float32 makes 1e-5 of it
        assert (found - expected).norm() <= 1e-4 * expected.norm(), name
