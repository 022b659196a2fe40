"""Run Triton kernels: on a GPU where there is one, else in Triton's interpreter, on the CPU.

Import this before anything that imports Triton, which decides at its import whether it interprets.
"""

from __future__ import annotations

import math
import os
import sys
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


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever a kernel forgets to write be seen."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = new_empty(self, *size, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", filled)
