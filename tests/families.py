"""What every family of three ops has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops._register import Family


def accept_all_three(family: Family, inputs: Sequence[Any], grads: Sequence[Any] | None = None) -> None:
    """Let the library check forward, backward and its backward; and backward that adds to what there is.

    Args:
        family: the ops.
        inputs: of the forward one.
        grads: gradients of its outputs; drawn, if there are none.
    """
    torch.library.opcheck(family.forward, tuple(inputs))
    plain = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
    if grads is None:
        made = family(*plain)
        made = (made,) if family.n_outputs == 1 else made
        grads = [torch.randn_like(t) if t.numel() else None for t in made]
    nothing = [None] * family.n_derivatives
    onto = [None if t is None else torch.randn_like(t) for t in plain[: family.n_derivatives]]
    for with_parameters in (False, True):
        for before in (nothing, onto):
            torch.library.opcheck(family.backward, [with_parameters, *grads, *plain, *before])
    cotangents = [None if t is None else torch.randn_like(t) for t in plain[: family.n_features]]
    torch.library.opcheck(family.backward_backward, [*cotangents, *grads, *plain])
    _check_sums(*(family.backward(True, *grads, *plain, *before) for before in (nothing, onto)), onto)


def _check_sums(alone: Any, summed: Any, onto: Sequence[Tensor | None]) -> None:
    if isinstance(alone, Tensor):
        alone, summed = (alone,), (summed,)
    for one, both, before in zip(alone, summed, onto, strict=True):
        if before is not None:
            torch.testing.assert_close(both, before + one if one.shape == before.shape else before)
