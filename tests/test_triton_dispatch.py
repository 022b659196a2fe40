"""Which body an op gets on a GPU, and what is said where it is not the fast one."""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import pytest
import torch

from fastchgnet.ops.gpu import runtime


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of kernels, and nothing known yet about where they work."""
    module: Any = types.ModuleType("fastchgnet.ops.gpu._kernels")
    module.double = lambda x: ("kernel", 2 * x)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(runtime, "_given_up", set())
    runtime._usable_gpu.cache_clear()
    return module


def double(x: torch.Tensor) -> tuple[str, torch.Tensor]:
    return "pytorch", 2 * x


def test_kernels_take_their_types_alone(kernels: types.ModuleType) -> None:
    body = runtime.body("_kernels", "double", double)
    assert body(torch.ones(1))[0] == "kernel"
    assert body(torch.ones(1, dtype=torch.float64))[0] == "pytorch"


def test_a_kernel_that_does_not_compile_is_told_of_once(kernels: Any) -> None:
    calls = []

    def broken(x: torch.Tensor) -> None:
        calls.append(x)
        raise runtime.KernelFailure("double does not compile or start: no such instruction")

    kernels.double = broken
    body = runtime.body("_kernels", "double", double)
    with pytest.warns(RuntimeWarning, match="several times slower: double does not compile.*instruction"):
        assert body(torch.ones(1))[0] == "pytorch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert body(torch.ones(1))[0] == "pytorch"
    assert len(calls) == 1


def test_other_errors_are_not_hidden(kernels: Any) -> None:
    def exhausted(x: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    kernels.double = exhausted
    with pytest.raises(torch.OutOfMemoryError):
        runtime.body("_kernels", "double", double)(torch.ones(1))


@pytest.mark.parametrize(
    ("cuda", "installed", "capability", "said"),
    [
        (None, True, (9, 0), "NVIDIA"),
        ("13.0", False, (9, 0), "Triton is not installed"),
        ("13.0", True, (7, 5), "Tesla T4 is older"),
    ],
)
def test_what_a_gpu_lacks_is_said_once(
    kernels: types.ModuleType,
    cuda: str | None,
    installed: bool,
    capability: tuple[int, int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: "here" if installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    with pytest.warns(RuntimeWarning, match=said):
        assert not runtime._usable(torch.device("cuda:0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not runtime._usable(torch.device("cuda:0"))
    runtime._usable_gpu.cache_clear()


def test_precision_holds_inside_alone() -> None:
    assert runtime.current_precision() == "fp32"
    with pytest.raises(ZeroDivisionError), runtime.precision("tf32"):
        assert runtime.current_precision() == "tf32"
        _ = 1 / 0
    assert runtime.current_precision() == "fp32"
