"""What tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # threads of processes side by side would wait for each other; before anything imports PyTorch
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def shared_data() -> Path:
    """Find the folder of real DFT data beside the repository; skip the test where there is none."""
    named = os.environ.get("FASTCHGNET_TEST_DATA")
    folders = [Path(named)] if named else [p / "shared" / "data" for p in Path(__file__).resolve().parents]
    for folder in folders:
        if (folder / "dft" / "train.xyz").exists():
            return folder
    pytest.skip("needs the DFT data; set FASTCHGNET_TEST_DATA to its folder")
