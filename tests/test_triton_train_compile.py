"""The kernels around the network compile for A100 and H100, without a GPU: frames, graphs, loss, Adam."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


GRAPH_KERNELS = {"_count_kernel", "_fill_kernel", "_join_kernel", "pad_kernel"}
KERNELS = GRAPH_KERNELS | {"_gather_kernel", "_forward_kernel", "_backward_kernel", "_adam_kernel"}


def test_kernels_compile_without_spills_and_fused_operations() -> None:
    # this process may interpret Triton, which is decided when it is imported
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    found = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    kernels = json.loads(found.stdout)
    assert {(k["name"], k["capability"]) for k in kernels} == {(n, c) for n in KERNELS for c in (80, 90)}
    for kernel in kernels:
        assert "STACK:0" in kernel["resources"] and "LOCAL:0" in kernel["resources"], kernel
        # distances must be the same bits on every device
        assert kernel["name"] not in GRAPH_KERNELS or not kernel["fused"], kernel


def _describe(compiled: Any) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    return {"resources": dump.stdout, "fused": "fma.rn.f64" in compiled.asm["ptx"]}


def _compile_all() -> list[dict[str, Any]]:
    """Build a graph up to the launches, which compile only."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fastchgnet.ops.gpu import runtime

    class NoDriver:
        capability = 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    found = []

    def compile_only(kernel: Any, grid: int, device: torch.device, *args: Any, **options: Any) -> None:
        # kernels are kept for each device, and here all devices are the same one
        kernel.device_caches.clear()
        compiled = kernel.warmup(*args, grid=(grid,), **options)
        found.append({"name": kernel.__name__, "capability": NoDriver.capability, **_describe(compiled)})

    runtime.launch = compile_only
    driver.set_active(NoDriver())
    for NoDriver.capability in (80, 90):
        _call_all()
    return found


def _call_all() -> None:
    import torch

    from fastchgnet.data.layout import ARRAYS
    from fastchgnet.ops.gpu import adam as gpu_adam
    from fastchgnet.ops.gpu import frames as gpu_frames
    from fastchgnet.ops.gpu import huber as gpu_huber
    from fastchgnet.ops.gpu import neighbors as gpu_neighbors
    from fastchgnet.padding import Capacity

    capacity = Capacity(65, 2048, 8064, 60032, 170048)
    types = {"<f4": "float32", "<f8": "float64", "<i8": "int64", "|u1": "uint8", "|b1": "bool"}
    arrays = {
        name: torch.zeros(9, *ARRAYS[name].row, dtype=getattr(torch, types[ARRAYS[name].dtype]))
        for name in gpu_frames.Frames._fields
    }
    numbers = torch.zeros(capacity.systems, dtype=torch.int64)
    systems, labels = gpu_frames.gather(numbers, arrays, capacity.atoms)
    batch, _ = gpu_neighbors.build_graph(systems.position, systems, 6.0, 3.0, capacity)
    known = (labels.energy, labels.forces, labels.stress, labels.magmoms)
    given = (*known, *known, batch.n_atoms, batch.volume, 0.1)
    gpu_huber.forward(*given)
    gpu_huber.backward(torch.zeros(3, 4, dtype=torch.float64), *given)
    flat = torch.zeros(400_000)
    gpu_adam.move(flat, flat, flat, flat, flat, flat[0], flat[:3], 1.0)


if __name__ == "__main__":
    print(json.dumps(_compile_all()))
