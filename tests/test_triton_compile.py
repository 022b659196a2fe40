"""The kernels of messages and sums compile for A100 and H100, without a GPU, and hardly spill.

`python tests/test_triton_compile.py` prints what each takes: registers and spilled bytes of a thread,
shared memory of a program.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from compiled import Compiler, run_script

pytest.importorskip("triton")

KINDS = ["atom", "bond", "angle", "atom without norm", "shared norm"]
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may take, by compute capability."""
MAX_SPILLED = {"_forward_kernel": 320, "_backward_kernel": 64, "_second_kernel": 320}
"""Bytes of a thread, in tf32. All of an H100 multiprocessor's then fit the cache beside the shared memory."""
MAX_SPILLED_FP32 = 1024
"""Three products for one need more; beyond this the assembler has given up."""


def compiled(kinds: list[str], precisions: list[str], capabilities: list[int]) -> list[dict[str, Any]]:
    return run_script(__file__, kinds, precisions, capabilities)


def check(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        assert kernel["shared"] <= MAX_SHARED[kernel["capability"]], kernel
        allowed = MAX_SPILLED.get(kernel["name"], 0)
        if allowed and kernel["precision"] == "fp32":
            allowed = MAX_SPILLED_FP32
        assert kernel["spilled"] <= allowed, kernel


def test_the_kernels_of_atoms_compile() -> None:
    kernels = compiled(["atom"], ["tf32"], [90])
    names = {"_forward_kernel", "_backward_kernel", "_second_kernel", "_sum_kernel"}
    assert {kernel["name"] for kernel in kernels} == names
    check(kernels)


@pytest.mark.slow
def test_all_kernels_compile() -> None:
    kernels = compiled(KINDS, ["tf32", "fp32"], [80, 90])
    assert {(k["kind"], k["precision"], k["capability"]) for k in kernels} == {
        (kind, precision, capability)
        for kind in KINDS
        for precision in ("tf32", "fp32")
        for capability in (80, 90)
    }
    check(kernels)


def _compile(kinds: list[str], precisions: list[str], capabilities: list[int]) -> list[dict[str, Any]]:
    """Call the ops up to the launches, which compile only."""
    import torch
    from test_ops_message import arguments, detached, flat

    from fastchgnet.ops.gpu import message as gpu_message
    from fastchgnet.ops.gpu import message_second, runtime
    from fastchgnet.ops.gpu import segments as gpu_segments

    compiler = Compiler()
    for kind in kinds:
        inputs = detached(flat(arguments(kind, 130, torch.float32, 64)))
        grad = torch.zeros(5 if inputs[4] is not None else 130, 64)
        for precision in precisions:
            for compiler.capability in capabilities:
                compiler.case = {"kind": kind, "precision": precision}
                with runtime.precision(precision):
                    gpu_message.forward(*inputs)
                    for with_parameters in (False, True):
                        gpu_message.backward([()] * 7, with_parameters, grad, *inputs)
                    gpu_message.backward(
                        [() if t is None else (t, t) for t in inputs[:7]], True, grad, *inputs
                    )
                    message_second.backward_backward(tuple(inputs[:6]), grad, *inputs)
                for width in (1, 3, 9):
                    rows = torch.zeros(130, width, dtype=torch.float64)
                    gpu_segments.segment_sum(rows, *inputs[11:14])
    return compiler.found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_compile(*json.loads(sys.argv[1]))))
    else:
        for kernel in _compile(KINDS, ["tf32", "fp32"], [80, 90]):
            print(*kernel.values(), sep="\t")
