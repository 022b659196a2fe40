"""The kernels of the bases and of the pair forces compile for A100 and H100, without a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
from compiled import resources, run_script

pytest.importorskip("triton")

MAX_SHARED = 160 * 1024  # bytes that a program may take on an A100


def test_kernels_compile_with_next_to_no_spills() -> None:
    kernels = run_script(__file__)
    assert {kernel["capability"] for kernel in kernels} == {80, 90}
    assert len({kernel["name"] for kernel in kernels}) == 13
    for kernel in kernels:
        # a tile of a second derivative holds functions, gradients and tangents: 24 bytes with triton 3.6
        most = 24 if "bond_tables" in kernel["name"] else 0
        assert kernel["spilled"] <= most, kernel
        assert kernel["shared"] <= MAX_SHARED, kernel


def _signature(value: Any) -> Any:
    import torch

    types = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int8: "*i8"}
    if value is None:
        return "constexpr"
    if isinstance(value, tuple):
        found = map(_signature, value)
        return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
    if isinstance(value, torch.Tensor):
        return types[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _constants(value: Any, path: tuple[int, ...]) -> dict[tuple[int, ...], None]:
    """Where None stands among the arguments."""
    if isinstance(value, tuple):
        return {at: None for n, part in enumerate(value) for at in _constants(part, (*path, n))}
    return {path: None} if value is None else {}


def _compiled(kernel: Any, args: tuple, options: dict[str, Any], capability: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = dict(zip(names, map(_signature, args), strict=False))
    constants: dict[tuple[int, ...], Any] = _constants(args, ())
    for n, name in enumerate(names):
        if name in options:
            signature[name], constants[(n,)] = "constexpr", options[name]
    made = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={k: v for k, v in options.items() if k not in names},
    )
    return {"name": f"{kernel.__module__}.{kernel.__name__}", "capability": capability, **resources(made)}


def main() -> None:
    """Print what each kernel that the bodies launch takes on each GPU."""
    import torch

    from fastchgnet.ops.bond_tables import Inputs
    from fastchgnet.ops.gpu import angular_basis as gpu_angular_basis
    from fastchgnet.ops.gpu import bond_tables as gpu_bond_tables
    from fastchgnet.ops.gpu import central_pulls as gpu_central_pulls
    from fastchgnet.ops.gpu import magmom as gpu_magmom
    from fastchgnet.ops.gpu import pair_forces as gpu_pair_forces
    from fastchgnet.ops.gpu import runtime

    found = []

    def launch(kernel: Any, grid: int, device: torch.device, *args: Any, **options: Any) -> None:
        found.extend(_compiled(kernel, args, options, capability) for capability in (80, 90))

    runtime.launch = launch
    vector, distance, grad = torch.zeros(8, 3), torch.zeros(8, 1), torch.zeros(8, 31)
    index, sign = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int8)
    message, weight = torch.zeros(8, 64), torch.zeros(2, 64)
    gpu_central_pulls.forward(message, weight, vector, 6.0, 8)
    gpu_central_pulls.backward(torch.zeros(8, 2, 3), message, weight, vector, 6.0, 8)
    gpu_magmom.forward(message, weight[:1], distance[:1, 0])
    gpu_magmom.backward(distance[:, 0], message, weight[:1], distance[:1, 0])
    for n_tables in (0, 4, 5):
        weight = torch.zeros(128 if n_tables else 64, 31)
        long_weight = torch.zeros(n_tables, 128, 31) if n_tables else None
        given: Any = Inputs(distance, torch.zeros(31), weight, long_weight, 6.0, 8, 3)
        grads = gpu_bond_tables.forward(*given)
        for onto, with_parameters in (([()] * 4, False), ([(distance,), (), (), ()], True)):
            gpu_bond_tables.backward(onto, with_parameters, grads, *given)
        if n_tables < 5:  # a direct readout has no second derivative
            gpu_bond_tables.backward_backward((distance,), grads, *given)
    for frequency in (torch.zeros(15), None):
        given = (vector, frequency, index, index, index, index, 31)
        gpu_angular_basis.forward(*given)
        for with_parameters in (False, True):
            gpu_angular_basis.backward(with_parameters, grad, *given)
        gpu_angular_basis.backward_backward((vector,), grad, *given)
    volume = torch.zeros(8, dtype=torch.float64)
    for pulls in (vector[:, None], torch.zeros(8, 2, 3)):
        gpu_pair_forces.forward(pulls, vector, index, index, index, sign, index, index, index, volume)
        grads = vector, torch.zeros(8, 3, 3)
        gpu_pair_forces.backward(pulls, vector, *grads, index, index, index, volume)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
