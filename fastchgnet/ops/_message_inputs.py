"""What every body of `fastchgnet.ops.message` takes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastchgnet.ops.packing import packed

EPS = 1e-5


class MLP(NamedTuple):
    """Parameters of the gated MLP behind the projections, or their gradients; None where it has none such."""

    angle: Any  # [2D, D] on row features
    weight: Any  # [2, D, D] hidden layer of core and gate
    bias: Any  # [2, D]
    scale: Any  # [1 or 2, D] LayerNorm; one where core and gate share it
    shift: Any  # [1 or 2, D]

    def packed(self) -> Tensor | None:
        """Put the parameters that there are one behind the other."""
        parts = [t for t in self if t is not None]
        return packed(parts) if parts else None


class Inputs(NamedTuple):
    """What the op takes, in order: six features, the parameters, the index; Any is a Tensor or None."""

    p: Tensor  # [n_i, 2D]
    q: Tensor  # [n_j, 2D]
    r: Tensor  # [n_r, 2D] of the first segments of k
    r_tail: Any  # [n_k - n_r, 2D] of the others
    w: Any  # [n_k, D]
    a: Any  # [N, D]
    parameters: Any  # [any number] what `MLP.packed` makes
    has_hidden: bool  # weight and bias are among them; the one of angles is where there is an a
    n_norms: int  # rows of scale and of shift
    i: Tensor  # [N] ascending
    i_start: Tensor
    j: Tensor
    j_start: Tensor
    j_order: Any
    k: Tensor
    k_start: Tensor
    k_order: Any

    @property
    def width(self) -> int:
        """D."""
        return self.p.shape[1] // 2

    def halves(self, u_r: Tensor | None, u_tail: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return a direction of r and r_tail: both or none, zeros for one that is missing."""
        if self.r_tail is None or (u_r is None and u_tail is None):
            return u_r, None
        return (
            torch.zeros_like(self.r) if u_r is None else u_r,
            torch.zeros_like(self.r_tail) if u_tail is None else u_tail,
        )

    def unpacked(self, packed: Tensor | None) -> MLP:
        """Return views of the parameters, or of their gradients, that are one behind the other."""
        if packed is None:
            return MLP(None, None, None, None, None)
        d, n = self.width, self.n_norms
        has_angle, has_norm = self.a is not None, n > 0
        shapes = MLP((2 * d, d), (2, d, d), (2, d), (n, d), (n, d))
        present = MLP(has_angle, self.has_hidden, self.has_hidden, has_norm, has_norm)
        sizes = [math.prod(shape) if there else 0 for shape, there in zip(shapes, present, strict=True)]
        parts = zip(packed.split(sizes), shapes, present, strict=True)
        return MLP(*(part.view(shape) if there else None for part, shape, there in parts))
