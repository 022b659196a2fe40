"""The learning rate over a run, and the average of the weights along it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from fastchgnet.config import OptimConfig


def learning_rate(step: int, n_steps: int, n_warmup: int, config: OptimConfig) -> float:
    """Return the learning rate of a step: linear warm-up to the highest, then half a cosine.

    Args:
        step: 0 for the first step.
        n_steps: steps of the whole run; the last one has learning_rate * final_fraction.
        n_warmup: steps before the highest rate is reached.
        config: highest rate and final fraction.
    """
    if step < n_warmup:
        return config.learning_rate * (step + 1) / (n_warmup + 1)
    progress = (step - n_warmup) / max(1, n_steps - 1 - n_warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * cosine)


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the current ones by 1 - decay.

    Early on the decay is (1 + step) / (10 + step), so that the initial weights are soon forgotten. With
    decay 0 the average equals the current weights.

    Args:
        average: module with the averaged weights, changed in place.
        current: module of the same kind.
        decay: final decay per step, 0 to 1.
        step: 0 for the first step.
    """
    keep = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(current.parameters()), 1 - keep)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Shorten the gradient to `max_norm` where it is longer; return the norm it had, on the device."""
    parameters = list(parameters)
    if max_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
