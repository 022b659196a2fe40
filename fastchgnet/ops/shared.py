"""Tensors that several ops read."""

from __future__ import annotations

from torch import Tensor


class Shared:
    """A tensor that ops read in turn: each puts there what the next one is to read.

    That is the same numbers as an output of the op before. So its gradient comes to that op, which adds its
    own in the kernel that computes it; otherwise autograd would add up the gradients of all readers.

    Args:
        tensor: what the first one reads.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
