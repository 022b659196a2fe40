"""Tensors of the host in one buffer, which goes to a device as one copy instead of one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGN = 16
"""Bytes that the place of a tensor is a multiple of: what a vector load takes."""


class Layout(NamedTuple):
    """What tensors lie behind each other in a buffer of bytes."""

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Layout:
        """Lay out tensors in their order."""
        return cls(tuple(t.dtype for t in tensors), tuple(t.shape for t in tensors))

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the tensors that a buffer holds."""
        found, place = [], 0
        for n_bytes, dtype, shape in zip(self._sizes(), *self, strict=True):
            found.append(buffer[place : place + n_bytes].view(dtype).view(shape))
            place += _aligned(n_bytes)
        return found

    def packed(self, tensors: Sequence[Tensor], device: torch.device) -> Tensor:
        """Copy tensors of the host into a new buffer there, which can go to a device while the host goes on.

        The buffer may be dropped once that copy has been launched: pinned memory is not used again before it
        has run.
        """
        n_bytes = sum(map(_aligned, self._sizes()))
        buffer = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for view, tensor in zip(self.views(buffer), tensors, strict=True):
            view.copy_(tensor)
        return buffer

    def _sizes(self) -> list[int]:
        return [shape.numel() * dtype.itemsize for dtype, shape in zip(*self, strict=True)]


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Send tensors of the host to a device without waiting for them to arrive."""
    if device.type == "cpu":
        return list(tensors)
    layout = Layout.of(tensors)
    return layout.views(layout.packed(tensors, device).to(device, non_blocking=True))


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN) * _ALIGN
