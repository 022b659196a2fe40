"""The kernels of the geometry compile for A100 and H100, without a GPU."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from compiled import run_script
from test_triton_bases_compile import MAX_SHARED, _compiled

pytest.importorskip("triton")


def test_kernels_compile_without_spills() -> None:
    kernels = run_script(__file__)
    assert {kernel["capability"] for kernel in kernels} == {80, 90}
    assert len({kernel["name"] for kernel in kernels}) == 3
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= MAX_SHARED, kernel


def main() -> None:
    """Print what each kernel that the bodies launch takes on each GPU."""
    import torch

    from fastchgnet.ops.gpu import geometry, runtime

    found = []

    def launch(kernel: Any, grid: int, device: torch.device, *args: Any, **options: Any) -> None:
        found.extend(_compiled(kernel, args, options, capability) for capability in (80, 90))

    runtime.launch = launch
    vector = torch.zeros(8, 3)
    by_outputs = torch.zeros(8, 1), torch.zeros(2, 1), torch.zeros(4, 3)
    index, sign = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int8)
    given = (vector, index, sign, index.view(2, 2))
    geometry.forward(*given)
    for used in list(product([True, False], repeat=3))[:-1]:
        grads = tuple(grad if wanted else None for grad, wanted in zip(by_outputs, used, strict=True))
        geometry.backward(False, grads, *given)
        geometry.backward_backward((vector,), grads, *given)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
