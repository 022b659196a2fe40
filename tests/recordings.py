"""Recordings without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CalledAgain:
    """Stands for CUDA graphs: a replay calls the function again, and writes where the recorded result is."""

    def __init__(self) -> None:
        self.n_recorded, self.n_replayed = 0, 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.n_recorded += 1
        result = torch.ones((), dtype=torch.bool)

        def replay() -> None:
            self.n_replayed += 1
            result.copy_(function())

        return replay, result
