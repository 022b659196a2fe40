"""Run Triton kernels: on a GPU where there is one, else in Triton's interpreter, on the CPU.

Import this before anything that imports Triton, which decides at its import whether it interprets.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before tests/interpreted.py could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")


def _accept_numpy_2_4() -> None:
    """Let loops end at a computed number: triton 3.6 turns arrays of one element into int, numpy no more."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_index_too(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_index_too


if DEVICE == "cpu":
    _accept_numpy_2_4()
