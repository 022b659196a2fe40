"""The kernels of messages and sums compile for A100 and H100, without a GPU, and hardly spill.

`python tests/test_triton_compile.py` prints what each takes: registers and spilled bytes of a thread,
shared memory of a program.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

KINDS = ["atom", "bond", "angle", "atom without norm", "shared norm"]
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may take, by compute capability."""
MAX_SPILLED = {"_forward_kernel": 320, "_backward_kernel": 64, "_second_kernel": 256}
"""Bytes of a thread, in tf32. All of a multiprocessor's then fit the cache beside the shared memory."""
MAX_SPILLED_FP32 = 1024
"""Three products for one need more; beyond this the assembler has given up."""


def compiled(kinds: list[str], precisions: list[str], capabilities: list[int]) -> list[dict[str, Any]]:
    # this process may interpret Triton, which is decided when it is imported
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, __file__, json.dumps([kinds, precisions, capabilities])]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


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


def _resources(kernel: Any) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "spilled": int(stack), "shared": kernel.metadata.shared}


def _compile(kinds: list[str], precisions: list[str], capabilities: list[int]) -> list[dict[str, Any]]:
    """Call the ops up to the launches, which compile only."""
    import torch
    from test_ops_message import arguments, detached, flat
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fastchgnet.ops.gpu import message as gpu_message
    from fastchgnet.ops.gpu import message_second, runtime
    from fastchgnet.ops.gpu import segments as gpu_segments

    class NoDriver:
        capability = 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.capability, 32)

        def get_current_device(self) -> int:
            # kernels are kept by device: each target counts as one
            return self.capability

        def get_current_stream(self, device: int) -> int:
            return 0

    found: list[dict[str, Any]] = []
    known: set[str] = set()

    def compile_only(kernel: Any, grid: int, device: torch.device, *args: Any, **options: Any) -> None:
        made = kernel.warmup(*args, grid=(grid,), **options)
        if made.hash not in known:
            known.add(made.hash)
            found.append({"name": kernel.__name__, **case, **_resources(made)})

    runtime.launch = compile_only
    driver.set_active(NoDriver())
    for kind in kinds:
        inputs = detached(flat(arguments(kind, 130, torch.float32, 64)))
        grad = torch.zeros(5 if inputs[3] is not None else 130, 64)
        for precision in precisions:
            for NoDriver.capability in capabilities:
                case = {"kind": kind, "precision": precision, "capability": NoDriver.capability}
                with runtime.precision(precision):
                    gpu_message.forward(*inputs)
                    for with_parameters in (False, True):
                        gpu_message.backward(with_parameters, grad, *inputs)
                    message_second.backward_backward(tuple(inputs[:5]), grad, *inputs)
                for width in (1, 3, 9):
                    rows = torch.zeros(130, width, dtype=torch.float64)
                    gpu_segments.segment_sum(rows, *inputs[11:14])
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_compile(*json.loads(sys.argv[1]))))
    else:
        for kernel in _compile(KINDS, ["tf32", "fp32"], [80, 90]):
            print(*kernel.values(), sep="\t")
