"""The kernels that build graphs compile for A100 and H100, without a GPU."""

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


def test_kernels_compile_without_spills_and_fused_operations() -> None:
    # this process may interpret Triton, which is decided when it is imported
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    found = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    kernels = json.loads(found.stdout)
    names = {"_count_kernel", "_fill_kernel", "_join_kernel", "pad_kernel"}
    assert {(k["name"], k["capability"]) for k in kernels} == {(n, c) for n in names for c in (80, 90)}
    for kernel in kernels:
        assert "STACK:0" in kernel["resources"] and "LOCAL:0" in kernel["resources"], kernel
        assert not kernel["fused"], kernel


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

    from fastchgnet.device_graph import SpareSystems
    from fastchgnet.ops import _neighbors_triton, _triton
    from fastchgnet.padding import Capacity

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
        compiled = kernel.warmup(*args, grid=(grid,), **options)
        found.append({"name": kernel.__name__, "capability": NoDriver.capability, **_describe(compiled)})

    _triton.launch = compile_only
    driver.set_active(NoDriver())
    capacity = Capacity(65, 2048, 8064, 60032, 170048)
    raw = SpareSystems(
        torch.ones(capacity.atoms, dtype=torch.int64),
        torch.zeros(capacity.atoms, 3, dtype=torch.float64),
        torch.zeros(capacity.systems, 3, 3, dtype=torch.float64),
        torch.zeros(capacity.systems, 3, dtype=torch.bool),
        torch.zeros(capacity.systems + 1, dtype=torch.int64),
        torch.zeros((), dtype=torch.int64),
    )
    for NoDriver.capability in (80, 90):
        # kernels are kept for each device, and here all devices are the same one
        for name in ("_count_kernel", "_fill_kernel", "_join_kernel", "pad_kernel"):
            getattr(_neighbors_triton, name).device_caches.clear()
        _neighbors_triton.build_graph(raw.position, raw, 6.0, 3.0, capacity)
    return found


if __name__ == "__main__":
    print(json.dumps(_compile_all()))
