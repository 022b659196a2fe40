"""The script that reads the machine code of kernels."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

# not imported here: files behind this one have it interpret
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "kernel_code.py"

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_0:
        /*0020*/                   FFMA R4, R4, R5, R6 ;
        /*0030*/              @!P0 FMUL R4, R4, 2 ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0048*/               @P4 BRA `(.L_x_0) ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/               @P3 BRA `(.L_x_2) ;
        /*0080*/                   STG.E [R2.64], R4 ;
.L_x_2:
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_branches_back_make_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    code = runpy.run_path(str(SCRIPT))["read"](LISTING)
    assert code.by_depth == {0: 5, 1: 3, 2: 4}
    assert code.in_loops == {"arithmetic": 2, "global": 1, "barriers": 1}


@pytest.mark.slow
def test_all_kernels_of_a_step_are_described() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(SCRIPT), str(ROOT / "examples" / "prototypes.xyz"), "direct", "1"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    heads, _, *rows = [line.strip("| ").split(" | ") for line in found.stdout.splitlines()]
    assert all(len(row) == len(heads) for row in rows)
    names = {row[0] for row in rows}
    assert {"message._forward_kernel", "bond_tables._backward_kernel", "adam._adam_kernel"} <= names
    products = {row[0]: int(row[heads.index("products")]) for row in rows}
    assert products["message._backward_kernel"] > 0 and products["pair_forces._forward_kernel"] == 0
