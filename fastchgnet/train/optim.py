"""The optimizer of a run: its schedule, and Adam with clipping and averaging on one flat buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastchgnet.flat import flatten, views
from fastchgnet.ops.gpu import runtime

BETA_MEAN = 0.9
BETA_SQUARE = 0.999
EPS = 1e-8


def learning_rate(step: int, n_steps: int, n_warmup: int, highest: float, final_fraction: float) -> float:
    """Return the learning rate of a step: linear warm-up to the highest, then half a cosine.

    Args:
        step: 0 for the first step.
        n_steps: steps of the whole run; the last one has highest * final_fraction.
        n_warmup: steps before the highest rate is reached.
        highest: highest rate.
        final_fraction: rate of the last step, relative to the highest.
    """
    if step < n_warmup:
        return highest * (step + 1) / (n_warmup + 1)
    progress = (step - n_warmup) / max(1, n_steps - 1 - n_warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return highest * (final_fraction + (1 - final_fraction) * cosine)


def step_sizes(step: int, rate: float, ema_decay: float) -> tuple[float, float, float]:
    """Return what changes from step to step: Adam's step, its scale of the variance, the average's step.

    With g the gradient and k = step + 1, Adam (Kingma and Ba 2015) is

        m = b1 m + (1 - b1) g,  s = b2 s + (1 - b2) g^2
        w = w - rate / (1 - b1^k) * m / (sqrt(s / (1 - b2^k)) + eps)

    The averaged weights move towards w by 1 - decay. Early on the decay is (1 + step) / (10 + step), so that
    the initial weights are soon forgotten; with `ema_decay` 0 the average equals the current weights.

    Args:
        step: 0 for the first step.
        rate: learning rate of the step.
        ema_decay: final decay of the averaged weights, 0 to 1.
    """
    keep = min(ema_decay, (1 + step) / (10 + step))
    variance = 1 / math.sqrt(1 - BETA_SQUARE ** (step + 1))
    return rate / (1 - BETA_MEAN ** (step + 1)), variance, 1 - keep


class Optimizer:
    """Clip, Adam and the running average: a few operations on one flat buffer, none of which the host awaits.

    Parameters become views of the buffers.

    Args:
        current: parameters that are trained, by name, in the order of their use.
        average: those that hold their running averages.
        clip_norm: norm to which a longer gradient is shortened, if any.

    Attributes:
        parameters: those that are trained, in this order.
    """

    def __init__(
        self,
        current: Mapping[str, nn.Parameter],
        average: Mapping[str, nn.Parameter],
        clip_norm: float | None,
    ) -> None:
        self.names, self.parameters = list(current), list(current.values())
        self.clip_norm = clip_norm
        self.weights = flatten(self.parameters)
        self.average = flatten([average[name] for name in self.names])
        self.mean = torch.zeros_like(self.weights)
        self.square = torch.zeros_like(self.weights)

    @torch.no_grad()
    def update(self, gradient: Tensor, sizes: Tensor, norm: Tensor) -> None:
        """Take a step.

        Args:
            gradient: in the layout of the weights, flat.
            sizes: `step_sizes` of this step, [3], on the device.
            norm: scalar that the norm of the gradient is written to.
        """
        torch.linalg.vector_norm(gradient, out=norm)
        move = _move_on_gpu if runtime.serves(self.weights) else _move
        buffers = gradient, self.weights, self.average, self.mean, self.square
        move(*buffers, norm, sizes, self.clip_norm)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on beside the weights, by parameter."""
        return {
            f"{kind}.{name}": view
            for kind, buffer in (("mean", self.mean), ("square", self.square))
            for name, view in zip(self.names, views(buffer, self.parameters), strict=True)
        }


def _move(
    gradient: Tensor,
    weights: Tensor,
    average: Tensor,
    mean: Tensor,
    square: Tensor,
    norm: Tensor,
    sizes: Tensor,
    clip_norm: float | None,
) -> None:
    """Clip a gradient that has this norm, and change the other buffers as `step_sizes` says."""
    if clip_norm is not None:
        gradient = gradient * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    size, variance, follow = sizes.to(weights.dtype).unbind()
    mean.lerp_(gradient, 1 - BETA_MEAN)
    square.mul_(BETA_SQUARE).addcmul_(gradient, gradient, value=1 - BETA_SQUARE)
    root = square.sqrt().mul_(variance).add_(EPS)
    weights.sub_((mean / root).mul_(size))
    average.lerp_(weights, follow)


_move_on_gpu = runtime.body("adam", "move", _move)
