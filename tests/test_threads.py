"""Compiled bodies on PyTorch's threads, on threads of their own, and in forked processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastchgnet.ops.cpu import native

EVALUATE = """
import os, sys, torch
torch.set_num_threads(2)
sys.path.insert(0, sys.argv[1])
from crystals import CONSERVATIVE, crystals, potential
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.ops.cpu import native

model = potential(CONSERVATIVE).float()
batch = model.build_graph(systems_from_atoms(crystals()))

def forces():
    return model(batch).forces

expected = forces()
assert native.n_threads(len(batch.edge_center)) == 2, "the test needs enough edges for two threads"
"""

FORK = """
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as PyTorch's own operations need in a forked process
    os._exit(0 if torch.equal(forces(), expected) else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(forces(), expected)
"""

NEW_THREADS = """
native.library().use_pool(None, None, None)
assert torch.equal(forces(), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("what", [FORK, NEW_THREADS], ids=["forked", "new threads"])
def test_the_same_bits_on_all_kinds_of_threads(what: str) -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler")
    command = [sys.executable, "-c", EVALUATE + what, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
