"""Gated messages: values, first and second derivatives, and what does not exist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastchgnet.graph import Index
from fastchgnet.ops import _message_torch, message
from fastchgnet.ops._register import feature_derivatives
from fastchgnet.ops.cpu import native
from fastchgnet.ops.message import MLP, Inputs, Rows, messages, reference

D = 4
KINDS = ["atom", "bond", "angle", "atom without norm", "shared norm"]


def index(segment: Tensor, n: int, is_sorted: bool) -> Index:
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(segment, minlength=n).cumsum(0)])
    return Index(segment, start, None if is_sorted else segment.argsort(stable=True))


def arguments(kind: str, n_rows: int = 11, dtype: torch.dtype = torch.float64, width: int = D) -> tuple:
    """Return (tables, weight, rows, mlp, index) of a kind of message."""
    torch.manual_seed(0)
    n = (5, 3, 4)
    random = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    i = index(torch.randint(n[0], (n_rows,)).sort().values, n[0], is_sorted=True)
    rows = Rows(i, *(index(torch.randint(k, (n_rows,)), k, is_sorted=False) for k in n[1:]))
    weighted, has_rows, hidden = kind != "angle", kind in ("bond", "angle"), kind != "angle"
    n_norms = {"atom without norm": 0, "shared norm": 1}.get(kind, 2)
    mlp = MLP(
        random(2 * width, width) if has_rows else None,
        random(2, width, width) if hidden else None,
        random(2, width) if hidden else None,
        random(n_norms, width) if n_norms else None,
        random(n_norms, width) if n_norms else None,
    )
    tables = tuple(random(k, 2 * width) for k in n)
    return (
        tables,
        random(n[2], width) if weighted else None,
        random(n_rows, width) if has_rows else None,
        mlp,
        rows,
    )


def flat(given: tuple) -> list[Tensor | None]:
    tables, weight, rows_ND, mlp, (i, j, k) = given
    return [
        *tables,
        weight,
        rows_ND,
        *mlp,
        i.segment,
        i.start,
        j.segment,
        j.start,
        j.order,
        k.segment,
        k.start,
        k.order,
    ]


def present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None and t.requires_grad]


@pytest.mark.parametrize("n_rows", [0, 1, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_reference(kind: str, n_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(_message_torch, "ROWS", 3)
    given = arguments(kind, n_rows)
    leaves = present(flat(given))
    ours, expected = messages(*given), reference(Inputs(*flat(given)))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize("n_rows", [0, 1, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_of_the_reference(kind: str, n_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(_message_torch, "ROWS", 3)
    given = arguments(kind, n_rows)
    inputs = flat(given)
    leaves, features = present(inputs), present(inputs[:5])

    def second(output: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        grad = torch.randn_like(output).requires_grad_()
        with feature_derivatives():
            first = torch.autograd.grad(output, features, grad, create_graph=True)
        # neither linear nor the same for all of them
        loss = sum(((k + 1) * f).tanh().square().sum() for k, f in enumerate(first)) + output.square().sum()
        return torch.autograd.grad(loss, [grad, *leaves])

    torch.testing.assert_close(
        second(messages(*given)), second(reference(Inputs(*inputs))), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    given = arguments(kind, 5, width=2)
    inputs = flat(given)
    leaves = present(inputs)

    def call(*values: Tensor) -> Tensor:
        supply = iter(values)
        return message._family(*(next(supply) if t is not None and t.requires_grad else t for t in inputs))

    assert torch.autograd.gradcheck(call, leaves)
    n_features = len(present(inputs[:5]))

    def first(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        with feature_derivatives():
            return torch.autograd.grad(call(*values), values[:n_features], grad, create_graph=True)

    grad = torch.randn_like(call(*leaves)).requires_grad_()
    assert torch.autograd.gradcheck(first, (grad, *leaves))


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_accepts_all_three_ops(kind: str) -> None:
    inputs = flat(arguments(kind))
    family = message._family
    torch.library.opcheck(family.forward, inputs)
    grad = torch.randn_like(family(*inputs))
    detached = [None if t is None else t.detach() for t in inputs]
    torch.library.opcheck(family.backward, [False, grad, *detached])
    torch.library.opcheck(family.backward, [True, grad, *detached])
    cotangents = [None if t is None else torch.randn_like(t) for t in detached[:5]]
    torch.library.opcheck(family.backward_backward, [*cotangents, grad, *detached])


def test_what_does_not_exist_raises() -> None:
    given = arguments("atom")
    inputs = flat(given)
    p, weight = inputs[0], inputs[6]
    (by_weight,) = torch.autograd.grad(messages(*given).square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient of a parameter has no derivative"):
        by_weight.sum().backward()
    with feature_derivatives():
        (first,) = torch.autograd.grad(messages(*given).square().sum(), p, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), p, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            torch.autograd.grad(second.sum(), p)


@pytest.mark.parametrize("n_rows", [0, 1, 37, 700])
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_bodies_equal_those_in_pytorch(
    kind: str, n_threads: int, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(native, "n_threads", lambda _: n_threads)
    given = arguments(kind, n_rows, torch.float32, width=16)
    inputs = flat(given)
    leaves, features = present(inputs), present(inputs[:5])

    def levels() -> list[Tensor]:
        torch.manual_seed(1)
        output = messages(*given)
        grad = torch.randn_like(output).requires_grad_()
        with feature_derivatives():
            first = torch.autograd.grad(output, features, grad, create_graph=True)
        loss = sum((f * torch.randn_like(f)).sum() for f in first)
        second = torch.autograd.grad(loss, [grad, *leaves], retain_graph=True)
        return [output, *first, *second, *torch.autograd.grad(output, leaves, grad)]

    compiled = levels()
    with native.disabled():
        expected = levels()
    for ours, theirs in zip(compiled, expected, strict=True):
        # single precision: 700 rows in another order, each right to 1e-7 or so, relative to the largest
        bound = 2e-5 * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
