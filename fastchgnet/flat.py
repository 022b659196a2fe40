"""Parameters side by side in flat buffers: what is done to all of them is one operation, or one message."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGN = 64
"""Elements that the place of a parameter in a buffer is a multiple of: vector loads want 16 bytes."""


def places(parameters: Sequence[Tensor]) -> list[int]:
    """Return the first element of each parameter in a buffer, and the length of the buffer."""
    found = [0]
    for parameter in parameters:
        found.append(found[-1] + math.ceil(parameter.numel() / _ALIGN) * _ALIGN)
    return found


def views(buffer: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of a buffer that belongs to each parameter, in its shape."""
    return [
        buffer[place : place + parameter.numel()].view_as(parameter)
        for place, parameter in zip(places(parameters), parameters, strict=False)
    ]


def flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Move parameters into one buffer, into which they become views."""
    first = parameters[0]
    buffer = torch.zeros(places(parameters)[-1], dtype=first.dtype, device=first.device)
    for parameter, view in zip(parameters, views(buffer, parameters), strict=True):
        view.copy_(parameter.detach())
        parameter.data = view
    return buffer
