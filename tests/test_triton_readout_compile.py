"""The kernels of the energy readout compile for A100 and H100, without a GPU, and hardly spill.

`python tests/test_triton_readout_compile.py` prints what each takes: registers and spilled bytes of a
thread, shared memory of a program.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from compiled import Compiler, run_script

pytest.importorskip("triton")

KERNELS = {"_forward_kernel", "_backward_kernel"}
MAX_SHARED = 160 * 1024  # bytes that a program may take on an A100
# Bytes of a thread, by whether there is a norm: without one, the pass of a direct step spills on an A100.
# What 256 threads spill then fits the cache beside their shared memory: 160 of 192 KiB.
MAX_SPILLED = {True: 0, False: 640}


def check(capabilities: list[int], norms: list[bool]) -> None:
    kernels = run_script(__file__, capabilities, norms)
    assert {(kernel["name"], kernel["capability"]) for kernel in kernels} == {
        (name, capability) for name in KERNELS for capability in capabilities
    }
    for kernel in kernels:
        assert kernel["spilled"] <= MAX_SPILLED[kernel["has_norm"]], kernel
        assert kernel["shared"] <= MAX_SHARED, kernel


def test_networks_with_a_norm_compile_without_spills() -> None:
    check([90], [True])


@pytest.mark.slow
def test_all_kernels_compile() -> None:
    check([80, 90], [True, False])


def _compile(capabilities: list[int], norms: list[bool]) -> list[dict[str, Any]]:
    """Call the bodies up to the launches, which compile only."""
    import torch
    from test_ops_readout import arguments

    from fastchgnet.ops.gpu import readout

    compiler = Compiler()
    for compiler.capability in capabilities:
        for has_norm in norms:
            compiler.case = {"has_norm": has_norm}
            # as the published networks have them
            inputs = arguments(130, [64] * (3 if has_norm else 2), has_norm, 64, torch.float32)
            given = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in inputs)
            for with_slope in (False, True):
                readout.forward(*given, with_slope)
            # direct readouts have no gradient of the slope
            for by_slope in (None, given[0]):
                readout.backward(True, given[0][:, 0], by_slope, *given)
    return compiler.found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_compile(*json.loads(sys.argv[1]))))
    else:
        for kernel in _compile([80, 90], [True, False]):
            print(*kernel.values(), sep="\t")
