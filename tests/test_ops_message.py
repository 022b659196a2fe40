"""Gated messages: values, first and second derivatives, and what does not exist."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
import torch
from families import accept_all_three
from torch import Tensor

from fastchgnet.graph import Index
from fastchgnet.ops import _message_torch, message
from fastchgnet.ops.cpu import native
from fastchgnet.ops.derivatives import constant_parameters, feature_derivatives
from fastchgnet.ops.message import MLP, Rows, Tables, messages, reference
from fastchgnet.ops.shared import Shared

D = 4
KINDS = ["atom", "bond", "angle", "atom without norm", "shared norm"]


def index(segment: Tensor, n: int, is_sorted: bool) -> Index:
    start = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(segment, minlength=n).cumsum(0)])
    return Index(segment, start, None if is_sorted else segment.argsort(stable=True))


def arguments(
    kind: str, n_rows: int = 11, dtype: torch.dtype = torch.float64, width: int = D, n_r: int = 1
) -> tuple:
    """Return (tables, weight, rows, mlp, index) of a kind of message; atoms' last table is cut at n_r."""
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
    tables = Tables(random(n[0], 2 * width), random(n[1], 2 * width), random(n[2], 2 * width))
    if kind.startswith("atom"):
        tables = tables._replace(k=random(n_r, 2 * width), k_tail=random(n[2] - n_r, 2 * width))
    return (
        tables,
        random(n[2], width) if weighted else None,
        random(n_rows, width) if has_rows else None,
        mlp,
        rows,
    )


def called(tables: Tables, weight: Any, rows_ND: Any, mlp: MLP, rows: Rows) -> Tensor:
    """Call the op where nobody else reads what it reads."""
    return messages(tables, *(None if t is None else Shared(t) for t in (weight, rows_ND)), mlp, rows)


def flat(given: tuple) -> list[Any]:
    """Return what the op takes of (tables, weight, rows, mlp, index)."""
    tables, weight, rows_ND, mlp, (i, j, k) = given
    return [
        *tables,
        weight,
        rows_ND,
        mlp.packed(),
        mlp.weight is not None,
        0 if mlp.scale is None else len(mlp.scale),
        i.segment,
        i.start,
        j.segment,
        j.start,
        j.order,
        k.segment,
        k.start,
        k.order,
    ]


def differentiable(inputs: list[Any]) -> list[Any]:
    """Ask for derivatives by what the op can be derived by."""
    return [t if n > 6 or t is None else t.detach().requires_grad_() for n, t in enumerate(inputs)]


def detached(inputs: list[Any]) -> list[Any]:
    return [t.detach() if isinstance(t, Tensor) else t for t in inputs]


def features_of(given: tuple) -> list[Tensor]:
    tables, weight, rows_ND, _, _ = given
    return [t for t in (*tables, weight, rows_ND) if t is not None]


def leaves_of(given: tuple) -> list[Tensor]:
    return [*features_of(given), *(t for t in given[3] if t is not None)]


@pytest.mark.parametrize("n_rows", [0, 1, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_reference(kind: str, n_rows: int, monkeypatch) -> None:
    monkeypatch.setattr(_message_torch, "ROWS", 3)
    given = arguments(kind, n_rows)
    leaves = leaves_of(given)
    ours, expected = called(*given), reference(*given)
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
    leaves, features = leaves_of(given), features_of(given)

    def second(output: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        grad = torch.randn_like(output).requires_grad_()
        with feature_derivatives():
            first = torch.autograd.grad(output, features, grad, create_graph=True)
        # neither linear nor the same for all of them
        loss = sum(((k + 1) * f).tanh().square().sum() for k, f in enumerate(first)) + output.square().sum()
        return torch.autograd.grad(loss, [grad, *leaves])

    torch.testing.assert_close(second(called(*given)), second(reference(*given)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n_r", [0, 4])
def test_half_of_the_last_table_may_be_empty(n_r: int) -> None:
    found = []
    for call in (called, reference):
        given = arguments("atom", n_r=n_r)
        features = features_of(given)
        output = call(*given)
        with feature_derivatives():
            first = torch.autograd.grad(output.square().sum(), features, create_graph=True)
        second = torch.autograd.grad(sum(f.square().sum() for f in first), leaves_of(given))
        found.append([output, *first, *second])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("unused", [2, 3])
def test_cotangents_of_half_of_the_last_table_may_be_missing(unused: int) -> None:
    given = arguments("atom")
    features, leaves = features_of(given), leaves_of(given)

    def second(output: Tensor) -> tuple[Tensor, ...]:
        with feature_derivatives():
            first = torch.autograd.grad(output.square().sum(), features, create_graph=True)
        loss = sum(f.square().sum() for k, f in enumerate(first) if k != unused)
        return torch.autograd.grad(loss, leaves)

    torch.testing.assert_close(second(called(*given)), second(reference(*given)), rtol=1e-8, atol=1e-10)


def test_readers_in_turn_share_a_gradient() -> None:
    """Two ops read the same weights and rows: all derivatives are those of PyTorch."""
    tables, weight, rows_ND, mlp, rows = arguments("bond")
    leaves = leaves_of((tables, weight, rows_ND, mlp, rows))
    shared = Shared(weight), Shared(rows_ND)
    twice = [messages(tables, *shared, mlp, rows) for _ in range(2)]
    assert shared[0].tensor is not weight and shared[0].tensor.data_ptr() == weight.data_ptr()
    y, expected = twice[0] + twice[1].sin(), reference(tables, weight, rows_ND, mlp, rows)
    expected = expected + expected.sin()

    def derivatives(output: Tensor) -> list[Tensor]:
        with feature_derivatives():
            first = torch.autograd.grad(output.square().sum(), leaves[:5], create_graph=True)
        loss = sum(((k + 1) * f).tanh().square().sum() for k, f in enumerate(first)) + output.square().sum()
        return [*first, *torch.autograd.grad(loss, leaves)]

    torch.testing.assert_close(derivatives(y), derivatives(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    inputs = differentiable(flat(arguments(kind, 5, width=2)))
    places = [n for n, t in enumerate(inputs[:7]) if t is not None]
    leaves = [inputs[n] for n in places]

    def call(*values: Tensor) -> Tensor:
        supplied = dict(zip(places, values, strict=True))
        return message._family(*(supplied.get(n, t) for n, t in enumerate(inputs)))

    assert torch.autograd.gradcheck(call, leaves)
    n_features = len(leaves) - (6 in places)

    def first(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        with feature_derivatives():
            return torch.autograd.grad(call(*values), values[:n_features], grad, create_graph=True)

    grad = torch.randn_like(call(*leaves)).requires_grad_()
    assert torch.autograd.gradcheck(first, (grad, *leaves))


def test_parameters_are_constant_for_one_thread_alone() -> None:
    given = arguments("bond")
    mlp, features = given[3], features_of(given)
    with constant_parameters():
        with concurrent.futures.ThreadPoolExecutor() as pool:
            elsewhere = pool.submit(called, *given).result()
        here = called(*given)
    for output, has_one in ((here, False), (elsewhere, True)):
        loss = output.square().sum()
        (found,) = torch.autograd.grad(loss, mlp.weight, allow_unused=True, retain_graph=True)
        assert (found is not None) is has_one
    expected = torch.autograd.grad(reference(*given).square().sum(), features)
    torch.testing.assert_close(torch.autograd.grad(here.square().sum(), features), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_accepts_all_three_ops(kind: str) -> None:
    accept_all_three(message._family, differentiable(flat(arguments(kind))))


def test_what_does_not_exist_raises() -> None:
    given = arguments("atom")
    p, weight = given[0].i, given[3].weight
    (by_weight,) = torch.autograd.grad(called(*given).square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient of a parameter has no derivative"):
        by_weight.sum().backward()
    with feature_derivatives():
        (first,) = torch.autograd.grad(called(*given).square().sum(), p, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), p, create_graph=True)
        with pytest.raises(RuntimeError, match="one derivative more"):
            torch.autograd.grad(second.sum(), p)


@pytest.mark.parametrize("n_rows", [0, 1, 37, 700])
@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_bodies_equal_those_in_pytorch(
    kind: str, n_threads: int, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "n_threads", lambda _: n_threads)
    assert_compiled_is_pytorch(arguments(kind, n_rows, torch.float32, width=16))


@pytest.mark.parametrize(("n_r", "unused"), [(0, None), (4, None), (1, 2), (1, 3)])
def test_compiled_bodies_take_halves_of_the_last_table(n_r: int, unused: int | None) -> None:
    assert_compiled_is_pytorch(arguments("atom", 37, torch.float32, 16, n_r), unused)


def assert_compiled_is_pytorch(given: tuple, unused: int | None = None) -> None:
    """Compare all levels, with cotangents of all features' gradients but one."""
    if native.library() is None:
        pytest.skip("no C++ compiler")
    leaves, features = leaves_of(given), features_of(given)

    def levels() -> list[Tensor]:
        torch.manual_seed(1)
        # two readers of the same weights and rows, so that gradients are added to one table or two
        shared = [None if t is None else Shared(t) for t in given[1:3]]
        first_reader, second_reader = (messages(given[0], *shared, *given[3:]) for _ in range(2))
        output = first_reader + 2 * second_reader
        grad = torch.randn_like(output).requires_grad_()
        with feature_derivatives():
            first = torch.autograd.grad(output, features, grad, create_graph=True)
        loss = sum((f * torch.randn_like(f)).sum() for k, f in enumerate(first) if k != unused)
        second = torch.autograd.grad(loss, [grad, *leaves], retain_graph=True)
        both = torch.autograd.grad(
            loss + (output * torch.randn_like(output)).sum(), leaves, retain_graph=True
        )
        return [output, *first, *second, *both, *torch.autograd.grad(output, leaves, grad)]

    compiled = levels()
    with native.disabled():
        expected = levels()
    for ours, theirs in zip(compiled, expected, strict=True):
        # single precision: 700 rows in another order, each right to 1e-7 or so, relative to the largest
        bound = 2e-5 * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
