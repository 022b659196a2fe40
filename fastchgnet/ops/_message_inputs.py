"""What every body of `fastchgnet.ops.message` takes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

EPS = 1e-5


class Inputs(NamedTuple):
    """What the op takes, in order: five features, five parameters, the index; Any is a Tensor or None."""

    p: Tensor  # [n_i, 2D]
    q: Tensor  # [n_j, 2D]
    r: Tensor  # [n_k, 2D]
    w: Any  # [n_k, D]
    a: Any  # [N, D]
    angle_weight: Any  # [2D, D], called A above
    weight: Any  # [2, D, D]
    bias: Any  # [2, D]
    scale: Any  # [1 or 2, D]; one where core and gate share their norm
    shift: Any  # [1 or 2, D]
    i: Tensor  # [N] ascending
    i_start: Tensor
    j: Tensor
    j_start: Tensor
    j_order: Any
    k: Tensor
    k_start: Tensor
    k_order: Any
