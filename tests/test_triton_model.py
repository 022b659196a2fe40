"""A whole training step through the Triton bodies of all ops, against the PyTorch ones in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from step_case import step_case

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["conservative", "direct"])
def test_a_step_of_kernels_is_that_of_pytorch(readout: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "triton_step.py"
    out = tmp_path / "gradients.pt"
    command = [sys.executable, str(script), readout, str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout)
    # otherwise PyTorch bodies were compared with themselves
    assert {"_forward_kernel", "_backward_kernel", "_sum_kernel", "_weigh_kernel"} <= kernels.keys()

    expected = step_case(readout, torch.float64).gradients()
    for one, other in zip(torch.load(out), expected, strict=True):
        error = (one - other).norm() / other.norm().clamp(min=1e-12)
        # float32 makes 1e-5 of it
        assert error < 1e-4 or other.norm() == 0 == one.norm()
