"""The gradient of a batch: summed over the parts of the batch, and over the processes that share it.

It lies in one flat buffer, which a few messages sum over the processes. A message leaves as soon as its piece
of the gradient is there, the last layers first, while the backward pass goes on to the first ones. Messages
leave in the same order everywhere. A few numbers travel behind the gradient, with the first message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastchgnet.flat import places, views
from fastchgnet.train.ranks import ALONE, Ranks

N_MESSAGES = 4
"""In which a gradient is summed: all but the last are hidden behind the backward pass."""

_N_NUMBERS = 64
"""Room for numbers that travel with the gradient, as much as an aligned place."""


class _Piece(NamedTuple):
    """Parameters whose gradients are one message."""

    parameters: range
    elements: slice


class Gradient:
    """The gradient by some parameters.

    Args:
        parameters: in the order of their use.
        ranks: processes over which it is summed.

    Attributes:
        values: the gradient, flat, in the layout of `fastchgnet.flat`.
        numbers: [64] what travels with it, summed as well.
    """

    def __init__(self, parameters: Sequence[Tensor], ranks: Ranks = ALONE) -> None:
        self.parameters, self.ranks = list(parameters), ranks
        first, length = self.parameters[0], places(self.parameters)[-1]
        self._buffer = torch.zeros(length + _N_NUMBERS, dtype=first.dtype, device=first.device)
        self.values, self.numbers = self._buffer[:length], self._buffer[length:]
        self._views = views(self._buffer, self.parameters)
        self._pieces = _pieces(self.parameters, len(self._buffer), N_MESSAGES if ranks.count > 1 else 1)
        self._messages: list[Any] = []

    def take(self, sums: Tensor, by_sums: Tensor, add: bool, complete: bool) -> None:
        """Put the derivative of a loss into the buffer.

        Args:
            sums: what the loss is a linear function of.
            by_sums: its derivative by them.
            add: to what is there, which the parts before have put there.
            complete: this is the last part: sum over the processes. `wait` waits for that.
        """
        send = complete and self.ranks.count > 1
        filling = _Filling(self, add, send)
        hooked = self.parameters if send else []
        handles = [parameter.register_hook(filling.hook(n)) for n, parameter in enumerate(hooked)]
        try:
            found = torch.autograd.grad(sums, self.parameters, by_sums, materialize_grads=True)
        finally:
            for handle in handles:
                handle.remove()
        filling.finish(found)
        self._messages = filling.messages

    def take_nothing(self) -> None:
        """Take part in the sum over the processes without a share in the batch."""
        self.values.zero_()
        self._messages = [self._send(piece) for piece in reversed(self._pieces)]

    def wait(self) -> None:
        """Wait until the sum over the processes is in the buffer; on a GPU, what is launched next waits."""
        with self.ranks.waiting():
            for message in self._messages:
                message.wait()
        self._messages = []

    def _send(self, piece: _Piece) -> Any:
        return self.ranks.start_sum(self._buffer[piece.elements])


class _Filling:
    """A backward pass that fills the buffer from the end."""

    def __init__(self, gradient: Gradient, add: bool, send: bool) -> None:
        self.gradient, self.add, self.send = gradient, add, send
        self.found: dict[int, Tensor] = {}
        self.todo = list(gradient._pieces)
        self.messages: list[Any] = []

    def hook(self, number: int) -> Any:
        """Return what takes the gradient by one parameter when it is complete."""

        def take(gradient: Tensor | None) -> None:
            if gradient is None:  # no function on the way has one: `finish` fills in zeros
                return
            self.found[number] = gradient.detach()
            while self.todo and all(n in self.found for n in self.todo[-1].parameters):
                self._fill(self.todo.pop())

        return take

    def finish(self, found: Sequence[Tensor]) -> None:
        """Fill the rest, some of which the pass may not have come across."""
        self.found = dict(enumerate(found))
        while self.todo:
            self._fill(self.todo.pop())

    @torch.no_grad()
    def _fill(self, piece: _Piece) -> None:
        targets = [self.gradient._views[n] for n in piece.parameters]
        put = torch._foreach_add_ if self.add else torch._foreach_copy_
        put(targets, [self.found[n] for n in piece.parameters])
        if self.send:
            self.messages.append(self.gradient._send(piece))


def _pieces(parameters: Sequence[Tensor], n_elements: int, count: int) -> list[_Piece]:
    """Cut the buffer into about even pieces between parameters; the last takes the numbers, too."""
    starts = places(parameters)
    edges = {0, len(parameters)}
    for k in range(1, count):
        edges.add(min(range(len(starts)), key=lambda n: abs(starts[n] - k * starts[-1] / count)))
    cuts = sorted(edges)
    ends = [*(starts[n] for n in cuts[1:-1]), n_elements]
    return [
        _Piece(range(first, last), slice(starts[first], end))
        for first, last, end in zip(cuts, cuts[1:], ends, strict=False)
    ]
