"""The kernels of the geometry, the bases and the pair forces compile for A100 and H100, without a GPU."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from compiled import Compiler, run_script

pytest.importorskip("triton")

MAX_SHARED = 160 * 1024  # bytes that a program may take on an A100


def test_kernels_compile_with_next_to_no_spills() -> None:
    kernels = run_script(__file__)
    assert {kernel["capability"] for kernel in kernels} == {80, 90}
    assert len({(kernel["op"], kernel["name"]) for kernel in kernels}) == 15
    for kernel in kernels:
        # A tile of a second derivative holds functions, gradients and tangents. What two programs spill
        # fits the cache beside their shared memory; half as many rows take a third more instructions.
        most = 288 if kernel["op"] == "of_bond_tables" else 0
        assert kernel["spilled"] <= most, kernel
        assert kernel["shared"] <= MAX_SHARED, kernel


def main() -> None:
    """Print what each kernel that the bodies launch takes on each GPU."""
    compiler = Compiler()
    for compiler.capability in (80, 90):
        for body in (of_geometry, of_heads, of_bond_tables, of_angular_basis, of_pair_forces):
            compiler.case = {"op": body.__name__}
            body()
    print(json.dumps(compiler.found))


def of_geometry() -> None:
    import torch

    from fastchgnet.ops.gpu import geometry

    vector = torch.zeros(8, 3)
    by_outputs = torch.zeros(8, 1), torch.zeros(2, 1), torch.zeros(4, 3)
    index, sign = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int8)
    given = (vector, index, sign, index.view(2, 2))
    geometry.forward(*given)
    for used in list(product([True, False], repeat=3))[:-1]:
        grads = tuple(grad if wanted else None for grad, wanted in zip(by_outputs, used, strict=True))
        geometry.backward(False, grads, *given)
        geometry.backward_backward((vector,), grads, *given)


def of_heads() -> None:
    import torch

    from fastchgnet.ops.gpu import central_pulls, magmom

    message, weight, vector = torch.zeros(8, 64), torch.zeros(2, 64), torch.zeros(8, 3)
    central_pulls.forward(message, weight, vector, 6.0, 8)
    central_pulls.backward(torch.zeros(8, 2, 3), message, weight, vector, 6.0, 8)
    magmom.forward(message, weight[:1], weight[0, :1])
    magmom.backward(vector[:, 0], message, weight[:1], weight[0, :1])


def of_bond_tables() -> None:
    import torch

    from fastchgnet.ops.bond_tables import Inputs
    from fastchgnet.ops.gpu import bond_tables, runtime

    distance = torch.zeros(8, 1)
    for n_tables in (0, 4, 5):
        weight = torch.zeros(128 if n_tables else 64, 31)
        long_weight = torch.zeros(n_tables, 128, 31) if n_tables else None
        given: Any = Inputs(distance, torch.zeros(31), weight, long_weight, 6.0, 8, 3)
        grads = bond_tables.forward(*given)
        bond_tables.backward([()] * 4, False, grads, *given)
        for precision in ("tf32", "fp32"):
            with runtime.precision(precision):
                bond_tables.backward([(distance,), (), (), ()], True, grads, *given)
                if n_tables < 5:  # a direct readout has no second derivative
                    bond_tables.backward_backward((distance,), grads, *given)


def of_angular_basis() -> None:
    import torch

    from fastchgnet.ops.gpu import angular_basis

    vector, grad = torch.zeros(8, 3), torch.zeros(8, 31)
    index = torch.zeros(8, dtype=torch.int64)
    for frequency in (torch.zeros(15), None):
        given = (vector, frequency, index, index, index, index, 31)
        angular_basis.forward(*given)
        for with_parameters in (False, True):
            angular_basis.backward(with_parameters, grad, *given)
        angular_basis.backward_backward((vector,), grad, *given)


def of_pair_forces() -> None:
    import torch

    from fastchgnet.ops.gpu import pair_forces

    vector, virial, volume = torch.zeros(8, 3), torch.zeros(8, 3, 3), torch.zeros(8, dtype=torch.float64)
    index, sign = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int8)
    for pulls in (vector[:, None], torch.zeros(8, 2, 3)):
        pair_forces.forward(pulls, vector, index, index, index, sign, index, index, index, volume)
        pair_forces.backward(pulls, vector, vector, virial, index, index, index, volume)


if __name__ == "__main__":
    main()
