"""The optimizer of a run: its schedule, and Adam with clipping and averaging on one flat buffer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastchgnet.ops.gpu import runtime

BETA_MEAN = 0.9
BETA_SQUARE = 0.999
EPS = 1e-8

_ALIGN = 64
"""Elements that the place of a parameter in the buffer is a multiple of: vector loads want 16 bytes."""


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

    The parameters of both modules become views into its buffers, so they must stay on their device and in
    their precision from then on.

    Args:
        current: module that is trained.
        average: module of the same kind that holds the running average of its weights.
        clip_norm: norm to which a longer gradient is shortened, if any.
    """

    def __init__(self, current: nn.Module, average: nn.Module, clip_norm: float | None) -> None:
        self.parameters = list(current.parameters())
        self.clip_norm = clip_norm
        self.weights = _flatten(self.parameters)
        self.average = _flatten(list(average.parameters()))
        self.gradient = torch.zeros_like(self.weights)
        self.gradients = _views(self.gradient, self.parameters)
        self.mean = torch.zeros_like(self.weights)
        self.square = torch.zeros_like(self.weights)

    @torch.no_grad()
    def take(self, gradients: Sequence[Tensor], add: bool = False) -> None:
        """Put gradients, one for each parameter, into the buffer, or add them to what is there."""
        if add:
            torch._foreach_add_(self.gradients, list(gradients))
        else:
            torch._foreach_copy_(self.gradients, list(gradients))

    @torch.no_grad()
    def update(self, sizes: Tensor) -> Tensor:
        """Take a step with the gradient in the buffer and return the norm it had, on the device.

        Args:
            sizes: `step_sizes` of this step, [3], on the device and in the precision of the weights.
        """
        norm = torch.linalg.vector_norm(self.gradient)
        move = _move_on_gpu if self.weights.is_cuda else _move
        buffers = self.gradient, self.weights, self.average, self.mean, self.square
        move(*buffers, norm, sizes, self.clip_norm)
        return norm

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on beside the weights."""
        return {"mean": self.mean, "square": self.square}


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
    size, variance, follow = sizes.unbind()
    mean.lerp_(gradient, 1 - BETA_MEAN)
    square.mul_(BETA_SQUARE).addcmul_(gradient, gradient, value=1 - BETA_SQUARE)
    root = square.sqrt().mul_(variance).add_(EPS)
    weights.sub_((mean / root).mul_(size))
    average.lerp_(weights, follow)


_move_on_gpu = runtime.body("adam", "move", _move)


def _places(parameters: Sequence[Tensor]) -> list[int]:
    """First element of each parameter in the buffer, and the length of the buffer."""
    places = [0]
    for parameter in parameters:
        places.append(places[-1] + math.ceil(parameter.numel() / _ALIGN) * _ALIGN)
    return places


def _views(buffer: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The part of the buffer that belongs to each parameter, in its shape."""
    places = _places(parameters)[:-1]
    return [
        buffer[place : place + parameter.numel()].view_as(parameter)
        for place, parameter in zip(places, parameters, strict=True)
    ]


def _flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Move parameters into one buffer, into which they become views."""
    first = parameters[0]
    buffer = torch.zeros(_places(parameters)[-1], dtype=first.dtype, device=first.device)
    for parameter, view in zip(parameters, _views(buffer, parameters), strict=True):
        view.copy_(parameter.detach())
        parameter.data = view
    return buffer
