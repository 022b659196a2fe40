"""What every family of three ops has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
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
    nothing = [None] * family.n_onto
    targets = [*plain[: family.n_derivatives], *plain[: family.n_features]]
    onto = [None if t is None else torch.randn_like(t) for t in targets]
    for with_parameters in (False, True):
        for before in (nothing, onto):
            torch.library.opcheck(family.backward, [with_parameters, *grads, *plain, *before])
    cotangents = [None if t is None else torch.randn_like(t) for t in plain[: family.n_features]]
    torch.library.opcheck(family.backward_backward, [*cotangents, *grads, *plain])
    _check_sums(*(family.backward(True, *grads, *plain, *before) for before in (nothing, onto)), onto)


def _check_sums(alone: Any, summed: Any, onto: Sequence[Tensor | None]) -> None:
    if isinstance(alone, Tensor):
        alone, summed = (alone,), (summed,)
    n = len(alone)
    for one, both, before, more in zip_longest(alone, summed, onto[:n], onto[n:]):
        if before is not None:
            expected = before if more is None else before + more
            torch.testing.assert_close(both, expected + one if one.shape == before.shape else expected)
