"""Count the kernels of a training step without a GPU, in Triton's interpreter.

python benchmarks/kernel_counts.py --out benchmarks/results/kernels.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fastchgnet.bench.kernels import COUNTED
from fastchgnet.bench.rows import Row, environment

N_FRAMES = 2
LABEL = "counted under Triton's interpreter, no GPU"
NOTE = (
    "One step of the trainer as replayed from a recording: frames that live on the device, graphs built "
    "there, static shapes, one process. Names with :: are PyTorch's operators, without those that only "
    "allocate or return a view, counted as one kernel where they are not known to be several; names with a "
    "dot are our own launches. Libraries may choose two kernels for a product: this is an estimate. "
    "tests/test_triton_model.py compares the step's gradient and new weights with float64, and its counts "
    "with those of half the batch."
)
SCRIPT = Path(__file__).parents[1] / "tests" / "triton_step.py"


def row(readout: str) -> Row:
    """Take a step in a process of its own."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), readout, str(N_FRAMES), f"{folder}/found.pt"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    parts = json.loads(done.stdout)
    return {
        "command": COUNTED,
        "readout": readout,
        "label": LABEL,
        "note": NOTE,
        "frames": N_FRAMES,
        "kernels": sum(n for names in parts.values() for n in names.values()),
        "parts": parts,
        "environment": environment(torch.device("cpu")),
    }


def main() -> None:
    """Write a row for each readout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [row(readout) for readout in ("conservative", "direct")]
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print({found["readout"]: found["kernels"] for found in rows})


if __name__ == "__main__":
    main()
