"""The kernels around the network compile for A100 and H100, without a GPU: frames, graphs, loss, Adam."""

from __future__ import annotations

import json
from typing import Any

import pytest
from compiled import Compiler, run_script

pytest.importorskip("triton")


GRAPH_KERNELS = {"_count_kernel", "_fill_kernel", "_join_kernel", "pad_kernel"}
KERNELS = GRAPH_KERNELS | {"_gather_kernel", "_forward_kernel", "_backward_kernel", "_adam_kernel"}


def test_kernels_compile_without_spills_and_fused_operations() -> None:
    kernels = run_script(__file__)
    assert {(k["name"], k["capability"]) for k in kernels} == {(n, c) for n in KERNELS for c in (80, 90)}
    for kernel in kernels:
        assert kernel["spilled"] == kernel["local"] == 0, kernel
        # distances must be the same bits on every device
        assert kernel["name"] not in GRAPH_KERNELS or not kernel["fused"], kernel
    # a simulation's room is its own: kernels must not be compiled for what numbers are divisible by
    graphs = [(k["name"], k["capability"]) for k in kernels if k["name"] in GRAPH_KERNELS]
    assert len(graphs) == len(set(graphs))


def _compile_all() -> list[dict[str, Any]]:
    """Build a graph up to the launches, which compile only."""
    compiler = Compiler()
    for compiler.capability in (80, 90):
        _call_all()
    return compiler.found


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
    other = Capacity(capacity.systems, 16, 1, 17, 1)
    gpu_neighbors.build_graph(systems.position, systems, 6.0, 3.0, other)
    known = (labels.energy, labels.forces, labels.stress, labels.magmoms)
    given = (*known, *known, batch.n_atoms, batch.volume, 0.1)
    gpu_huber.forward(*given)
    gpu_huber.backward(torch.zeros(3, 4, dtype=torch.float64), *given)
    flat = torch.zeros(400_000)
    gpu_adam.move(flat, flat, flat, flat, flat, flat[0], flat[:3], 1.0)


if __name__ == "__main__":
    print(json.dumps(_compile_all()))
