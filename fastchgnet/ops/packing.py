"""Put parameters behind each other, as ops read them: without a copy where they lie so in memory.

`fastchgnet.flat.flatten` lays them so. The derivative hands every parameter its part of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops.derivatives import parameters_are_constant


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements of tensors behind each other, [total]; it may share memory with them.

    Args:
        tensors: one at least.
    """
    if torch.is_grad_enabled() and not parameters_are_constant():
        return _Packed.apply(*tensors)
    return _side_by_side(tensors)


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    first, length = tensors[0], sum(t.numel() for t in tensors)
    place, memory = first.storage_offset(), first.untyped_storage().data_ptr()
    for t in tensors:
        if t.storage_offset() != place or t.untyped_storage().data_ptr() != memory or not t.is_contiguous():
            return torch.cat([t.detach().flatten() for t in tensors])
        place += t.numel()
    return first.detach().as_strided((length,), (1,))


class _Packed(torch.autograd.Function):
    """The same in autograd's graph."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.shapes = [t.shape for t in tensors]
        return _side_by_side(tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        parts = grad.split([shape.numel() for shape in ctx.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))
