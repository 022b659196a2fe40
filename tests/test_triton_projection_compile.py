"""The kernels of updates and projections compile for A100 and H100, without a GPU.

`python tests/test_triton_projection_compile.py` prints what each takes: registers and spilled bytes of a
thread, shared memory of a program.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from compiled import Compiler, run_script

pytest.importorskip("triton")

KINDS = ["first atoms", "atoms", "last atoms", "first bonds", "bonds", "last bonds"]
SIZES = [2000, 8000]
MAX_SHARED = 80 * 1024
"""Bytes that a program may take: two run at once, on an A100 too."""
MAX_SPILLED = {"_forward_kernel": 0, "_backward_kernel": 104, "_weigh_kernel": 0, "_sum_kernel": 0}
"""Bytes of a thread: 104 with Triton 3.6, 96 with 3.7, of all threads of a multiprocessor a tenth of its
cache."""


def check(kinds: list[str], sizes: list[int], capabilities: list[int]) -> None:
    kernels = run_script(__file__, kinds, sizes, capabilities)
    assert {kernel["name"] for kernel in kernels} == MAX_SPILLED.keys()
    assert {(k["kind"], k["n"], k["capability"]) for k in kernels} == {
        (kind, n, capability) for kind in kinds for n in sizes for capability in capabilities
    }
    for kernel in kernels:
        assert kernel["shared"] <= MAX_SHARED, kernel
        assert kernel["spilled"] <= MAX_SPILLED[kernel["name"]], kernel


def test_the_kernels_of_the_last_atoms_compile() -> None:
    check(["last atoms"], [2000], [80, 90])


@pytest.mark.slow
def test_all_kernels_compile() -> None:
    check(KINDS, SIZES, [80, 90])


def _compile(kinds: list[str], sizes: list[int], capabilities: list[int]) -> list[dict[str, Any]]:
    """Call the op up to the launches, which compile only."""
    import torch
    from test_ops_projection import arguments

    from fastchgnet.ops.gpu import projection, runtime
    from fastchgnet.ops.projection import MAX_PARTS, _forward

    compiler = Compiler()
    # as many multiprocessors as an H100 has
    runtime._n_multiprocessors = lambda device: 132
    for kind in kinds:
        for n in sizes:
            given = arguments(kind, n, torch.float32, 64)
            given = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
            grads = [None if t is None else torch.zeros_like(t) for t in _forward(*given)]
            grads += [None] * (1 + MAX_PARTS - len(grads))
            for compiler.capability in capabilities:
                compiler.case = {"kind": kind, "n": n}
                projection.forward(*given)
                for onto in ([()] * 5, [() if t is None else (t, t) for t in given[:5]]):
                    for with_parameters in (False, True):
                        projection.backward(onto, with_parameters, grads, *given)
                projection.backward_backward(given[:3], grads, *given)
    return compiler.found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_compile(*json.loads(sys.argv[1]))))
    else:
        for kernel in _compile(KINDS, SIZES, [80, 90]):
            print(*kernel.values(), sep="\t")
