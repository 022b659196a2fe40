"""Recordings without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CalledAgain:
    """Stands for CUDA graphs: a replay calls the function again, and writes where the recorded result is.

    Args:
        n_results: length of the function's result; None where it is a truth value.
        fails: recording is not possible.
    """

    def __init__(self, n_results: int | None = None, fails: bool = False) -> None:
        self.n_results, self.fails = n_results, fails
        self.n_recorded, self.n_replayed = 0, 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.n_recorded += 1
        result = torch.ones((), dtype=torch.bool)
        if self.n_results is not None:
            result = torch.zeros(self.n_results, dtype=torch.float64)

        def replay() -> None:
            self.n_replayed += 1
            result.copy_(function())

        return replay, result
