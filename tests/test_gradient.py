"""The gradient in its buffer: in pieces that leave as messages while the backward pass goes on.

A stand-in for the other processes doubles what it is sent, as one with the same gradient would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from step_case import step_case
from torch import Tensor

from fastchgnet.flat import places
from fastchgnet.loss import tally
from fastchgnet.train.gradient import N_MESSAGES, Gradient
from fastchgnet.train.ranks import Ranks


class Message:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.sent = tensor, tensor.clone()

    def wait(self) -> None:
        assert torch.equal(self.tensor, self.sent), "changed after it was sent"
        self.tensor.mul_(2)


class Two(Ranks):
    """This process and one like it."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.messages: list[Message] = []
        self.events: list[str] = []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        yield

    def start_sum(self, tensor: Tensor) -> Any:
        self.events.append("message")
        self.messages.append(Message(tensor))
        return self.messages[-1]

    def places(self) -> list[tuple[int, int]]:
        """First and last element of each message, in the order in which they were sent."""
        return [(m.tensor.storage_offset(), m.tensor.storage_offset() + len(m.tensor)) for m in self.messages]


def leaves(*sizes: int) -> list[Tensor]:
    return [torch.arange(1.0, n + 1).requires_grad_() for n in sizes]


def taken(gradient: Gradient, loss: Tensor, add: bool = False, complete: bool = True) -> None:
    """Take the derivative of 3 * loss."""
    gradient.take(loss[None], torch.tensor([3.0]), add, complete)


SIZES = [(640, 64, 128, 500, 70, 3), (5000, 1, 1), (1, 1, 5000), (7,), (64, 64)]


@pytest.mark.parametrize("sizes", SIZES)
def test_pieces_are_the_buffer(sizes: tuple[int, ...]) -> None:
    parameters = leaves(*sizes)
    gradient = Gradient(parameters, Two())
    pieces = gradient._pieces
    n_elements = len(gradient.values) + len(gradient.numbers)
    assert 1 <= len(pieces) <= min(N_MESSAGES, len(sizes))
    assert [n for piece in pieces for n in piece.parameters] == list(range(len(sizes)))
    assert all(len(piece.parameters) for piece in pieces)
    edges = [(piece.elements.start, piece.elements.stop) for piece in pieces]
    assert [first for first, _ in edges] == [0, *(last for _, last in edges[:-1])]
    assert edges[-1][1] == n_elements and gradient.values.data_ptr() < gradient.numbers.data_ptr()
    starts = places(parameters)
    assert all(starts[piece.parameters[0]] == piece.elements.start for piece in pieces)


def test_one_process_sends_nothing() -> None:
    gradient = Gradient(leaves(100, 100))
    taken(gradient, sum(p.sum() for p in gradient.parameters))
    gradient.wait()
    assert gradient.values[:100].tolist() == [3.0] * 100 and len(gradient._pieces) == 1


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("last_first", [True, False])
def test_messages_leave_in_the_same_order_everywhere(sizes: tuple[int, ...], last_first: bool) -> None:
    """Whatever the order in which a pass comes across the parameters."""
    ranks, parameters = Two(), leaves(*sizes)
    gradient = Gradient(parameters, ranks)
    loss = torch.zeros(())
    for parameter in parameters if last_first else reversed(parameters):
        loss = (loss + 1) * (loss.detach() + 1) + parameter.square().sum() / 2
    expected = torch.autograd.grad(loss, parameters, torch.tensor(3.0), retain_graph=True)
    gradient.numbers[:2] = torch.tensor([5.0, 7.0])
    taken(gradient, loss)
    gradient.wait()
    for view, value in zip(gradient._views, expected, strict=True):
        assert torch.equal(view, 2 * value)
    found = ranks.places()
    # numbers are in the first message, at the end of the buffer
    assert gradient.numbers[:3].tolist() == [10.0, 14.0, 0.0]
    assert found[0][1] == len(gradient.values) + len(gradient.numbers)
    assert [last for _, last in found[1:]] == [first for first, _ in found[:-1]] and found[-1][0] == 0
    ranks.messages.clear()
    gradient.take_nothing()
    assert ranks.places() == found and not gradient.values.any() and gradient.numbers.any()


WORK = ("_DifferentiableBackward", "MmBackward0", "AddmmBackward0")
"""Functions of a backward pass that take time; most others make views."""


@pytest.mark.parametrize("readout", ["conservative", "direct"])
def test_messages_leave_while_the_pass_goes_on(readout: str) -> None:
    """All but the last before it ends, the first one long before."""
    case, ranks = step_case(readout), Two()
    gradient = Gradient(list(case.potential.in_order().values()), ranks)
    sums = tally(case.potential(case.batch), case.labels, case.batch).huber
    functions, todo = set(), [sums.grad_fn]
    while todo:
        function = todo.pop()
        if function is not None and function not in functions:
            functions.add(function)
            todo += [before for before, _ in function.next_functions]

    def note(*_: Any) -> None:
        ranks.events.append("function")

    for function in functions:
        if type(function).__name__ in WORK:
            function.register_hook(note)
    gradient.take(sums, torch.ones_like(sums), add=False, complete=True)
    positions = [n for n, event in enumerate(ranks.events) if event == "message"]
    still_to_come = [ranks.events[n:].count("function") for n in positions]
    assert len(positions) == N_MESSAGES and all(still_to_come[:-1])
    # a fifth of them, or more, are those of the first blocks; the bases are three, of the longest ones
    assert still_to_come[0] > ranks.events.count("function") / 5
    sizes = [last - first for first, last in ranks.places()]
    assert max(sizes) < 1.3 * min(sizes)


def test_parts_add_up_and_the_last_one_sends() -> None:
    ranks, parameters = Two(), leaves(70, 200, 3)
    gradient = Gradient(parameters, ranks)
    gradient._buffer.fill_(17)  # of the step before
    losses = [sum((k + n) * p.square().sum() for n, p in enumerate(parameters)) for k in range(1, 4)]
    for k, loss in enumerate(losses):
        assert not ranks.messages
        taken(gradient, loss, add=k > 0, complete=k == 2)
    gradient.wait()
    assert len(ranks.messages) == len(gradient._pieces) > 1
    for n, (view, parameter) in enumerate(zip(gradient._views, parameters, strict=True)):
        # 2 processes * 3 * the sum over k of (k + n) * 2 p, all of them exact
        assert torch.equal(view, 2 * 3 * (6 + 3 * n) * 2 * parameter.detach())


class Half(torch.autograd.Function):
    """A function of its first argument alone."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return 2 * one

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return 2 * grads[0], None


@pytest.mark.parametrize("used", range(4))
def test_parameters_without_a_derivative_get_zeros(used: int) -> None:
    """Those that the pass does not come across, and those that it has no derivative for."""
    ranks, parameters = Two(), leaves(64, 64, 64, 64)
    gradient = Gradient(parameters, ranks)
    gradient.values.fill_(17)
    taken(gradient, Half.apply(parameters[used], parameters[used - 1]).sum())
    gradient.wait()
    for n, view in enumerate(gradient._views):
        assert view.tolist() == [2 * 3 * 2.0 if n == used else 0.0] * 64
    assert ranks.places()[-1][0] == 0 and len(ranks.messages) == 4
    assert not [p for p in parameters if p._backward_hooks]


def test_an_error_in_the_pass_leaves_no_hooks() -> None:
    ranks, parameters = Two(), leaves(64, 64)
    gradient = Gradient(parameters, ranks)
    loss = (parameters[0] * parameters[1]).sum()
    taken(gradient, loss)
    gradient.wait()
    with pytest.raises(RuntimeError, match="second time"):
        taken(gradient, loss)
    assert not [p for p in parameters if p._backward_hooks]
