"""Compile Triton kernels without a GPU, and tell what each takes.

A test that does so runs itself as a script: the process of the tests may interpret Triton, which is decided
when that is imported.
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


def run_script(file: str, *args: Any) -> list[dict[str, Any]]:
    """Run a test file as a script that compiles, with arguments as JSON, and return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    command = [sys.executable, file, *([json.dumps(args)] if args else [])]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, its bytes of stack, to which registers spill, and shared bytes of a program."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "spilled": stack, "local": local, "shared": kernel.metadata.shared}


class Compiler:
    """Takes the place of all launches, and of the driver: bodies run up to the launches, which compile only.

    Attributes:
        capability: of the GPU to compile for, 80 for an A100 and 90 for an H100.
        case: what to note beside each kernel.
        found: a row for each kernel.
    """

    def __init__(self) -> None:
        from triton.runtime import driver

        from fastchgnet.ops.gpu import runtime

        self.capability = 0
        self.case: dict[str, Any] = {}
        self.found: list[dict[str, Any]] = []
        runtime.launch = self._launch
        driver.set_active(self)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # kernels are kept by device: each target counts as one
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def _launch(self, kernel: Any, grid: int, device: Any, *args: Any, **options: Any) -> None:
        made = kernel.warmup(*args, grid=(grid,), **options)
        row = {"name": kernel.__name__, "capability": self.capability, **self.case, **resources(made)}
        row["fused"] = "fma.rn.f64" in made.asm["ptx"]
        row["hash"] = made.hash
        if row not in self.found:
            self.found.append(row)
