"""Print how far Triton kernels in tf32 are from float64, in all that a benchmark checks on a GPU.

python tests/triton_deviations.py conservative 2

Run as a script, in a process of its own, as `triton_step.py` is: Triton's interpreter takes the kernels. It
rounds factors as they do and multiplies them in float32, so that what tf32 costs is seen, but not what the
functions of a GPU do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton_step  # noqa: F401, registers the bodies for CUDA on the CPU, too

from fastchgnet.bench.correctness import deviations
from fastchgnet.bench.frames import Pool
from fastchgnet.ops.gpu import runtime

FRAMES = Path(__file__).parents[1] / "examples" / "prototypes.xyz"


def main(readout: str, n_frames: str) -> None:
    """Compare the first crystals of the example set."""
    runtime.serves = lambda tensor: True
    workload = Pool(FRAMES, 0).workload(int(n_frames), own_labels=False)
    with runtime.precision("tf32"):
        print(json.dumps(deviations(workload, readout, torch.device("cpu"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
