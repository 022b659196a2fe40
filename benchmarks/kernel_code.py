"""What the kernels of a training step are made of, compiled for a GPU that is not here.

python benchmarks/kernel_code.py FRAMES.xyz [direct] [64]

A line for each kernel: its launches in a step, their programs, warps of a program, registers and spilled
bytes of a thread, programs that a multiprocessor holds, and what a warp executes outside loops, in loops, and
in loops inside these, once through; of all that is in loops the arithmetic, special functions, matrix
products, accesses to shared and to global memory, and barriers. Where programs take one of several tables,
the code for all of them is counted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from compile_kernels import set_up, take_step

from fastchgnet.bench.frames import Pool
from fastchgnet.ops.gpu import runtime

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS, SHARED, WARPS, PROGRAMS = 65_536, 228 * 1024, 64, 32  # of a multiprocessor of an H100
KINDS = {
    "arithmetic": ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX"),
    "special": ("MUFU",),
    "products": ("HMMA", "HGMMA"),
    "shared": ("LDS", "STS", "LDSM"),
    "global": ("LDG", "STG"),
    "barriers": ("BAR",),
}


class Code(NamedTuple):
    """Instructions of a kernel; by how many loops they are in, and of those in loops by kind."""

    by_depth: Counter[int]
    in_loops: Counter[str]


def read(listing: str) -> Code:
    """Read what nvdisasm prints: a loop is from a label to the last branch back to it."""
    labels: dict[str, int] = {}
    ends: dict[str, int] = {}
    names: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*)", line):
            target = re.search(r"\.L_x_\d+", found[2])
            # the last branch of a program leads to itself
            if found[1] == "BRA" and target and labels.get(target[0], len(names)) < len(names):
                ends[target[0]] = len(names)
            names.append(found[1])
    by_depth, in_loops = Counter[int](), Counter[str]()
    for n, name in enumerate(names):
        depth = sum(labels[label] <= n <= end for label, end in ends.items())
        by_depth[depth] += 1
        if depth:
            in_loops.update(kind for kind, members in KINDS.items() if name in members)
    return Code(by_depth, in_loops)


def _run(tool: str, *arguments: str) -> str:
    found = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return found.stdout


def describe(kernel: Any) -> list[Any]:
    """Return a line of a compiled kernel, from its warps on."""
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, code = _run("cuobjdump", "-res-usage", file.name), read(_run("nvdisasm", "-c", file.name))
    registers, spilled = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    rounded = -(-registers // 8) * 8  # given in eights, and a KiB of shared memory is the system's
    at_once = min(REGISTERS // (32 * warps * rounded), SHARED // (shared + 1024), WARPS // warps, PROGRAMS)
    depths = [code.by_depth[n] for n in range(3)]
    return [warps, registers, spilled, at_once, *depths, *(code.in_loops[kind] for kind in KINDS)]


def main(file: str, readout: str = "direct", n_frames: str = "64") -> None:
    """Print what a step in tf32 launches, in the order of its first launches."""
    launches: dict[tuple[str, int, str], Any] = {}
    counts: Counter[tuple[str, int, str]] = Counter()

    def launch(kernel: Any, grid: int, device: Any, *args: Any, **options: Any) -> None:
        made = kernel.warmup(*args, grid=(grid,), **options)
        name = f"{kernel.fn.__module__.split('.')[-1]}.{kernel.__name__}"
        launches[name, grid, made.hash] = made
        counts[name, grid, made.hash] += 1

    set_up(launch)
    runtime.current_precision = lambda: "tf32"
    with tempfile.TemporaryDirectory() as folder:
        take_step(Pool(Path(file), 0), int(n_frames), readout, Path(folder))
    heads = ["kernel", "launches", "programs", "warps", "registers", "spilled", "at once"]
    print("|", " | ".join([*heads, "outside", "in loops", "in loops in loops", *KINDS]), "|")
    print("| --- |" + " ---: |" * (9 + len(KINDS)))
    for key, made in launches.items():
        print("|", " | ".join(map(str, [key[0], counts[key], key[1], *describe(made)])), "|")


if __name__ == "__main__":
    main(*sys.argv[1:])
