"""Run Triton kernels: on a GPU where there is one, else in Triton's interpreter, on the CPU.

Import this before anything that imports Triton, which decides at its import whether it interprets.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before tests/interpreted.py could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from watched import ANY_NUMBER, watch  # noqa: E402, Triton decides at its import whether it interprets


def _patch_once() -> None:
    """Patch the language once for the functions of a module that a launch calls, not for every call of one.

    Each time looks at all that the language has, which took half the time of a kernel of many functions.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set[int]()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:  # at the end of a launch
            super().restore()
            patched.clear()

    def patch_once(function: Any) -> Scope:
        module = id(function.__globals__)
        if module in patched:
            return Scope()
        patched.add(module)
        return patch(function)

    interpreter._patch_lang, interpreter._LangPatchScope = patch_once, Scope


def _mend() -> None:
    """Work around what the interpreters of triton 3.6 and 3.7 do wrong, and compilers do right."""
    from triton import language
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch, to_tensor = interpreter._patch_lang_tensor, TritonSemantic.to_tensor

    # 3.6: a loop that ends at a computed number makes an int of an array, which numpy 2.4 refuses
    def patch_index_too(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    # 3.7: a constant times a tensor is a constant that is a tensor, which functions refuse
    def unwrap(self: Any, x: Any, *args: Any, **options: Any) -> Any:
        return to_tensor(self, x.value if isinstance(x, language.constexpr) else x, *args, **options)

    interpreter._patch_lang_tensor, TritonSemantic.to_tensor = patch_index_too, unwrap
    _patch_once()


if DEVICE == "cpu":
    _mend()
    watch()


@contextmanager
def without_syncs() -> Iterator[None]:
    """Let what makes the host wait for the GPU fail inside."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        torch.cuda.set_sync_debug_mode("error")  # warns that it does not find everything
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever a kernel forgets to write be seen."""

    def spoil(owner: Any, name: str) -> None:
        make = getattr(owner, name)

        def filled(*args: Any, **options: Any) -> Tensor:
            made = make(*args, **options)
            return made.copy_(torch.tensor(math.nan if made.is_floating_point() else ANY_NUMBER))

        monkeypatch.setattr(owner, name, filled)

    spoil(torch, "empty")
    spoil(torch, "empty_like")
    spoil(Tensor, "new_empty")
