"""Updates and projections: values, first and second derivatives."""

from __future__ import annotations

import pytest
import torch
from families import accept_all_three
from torch import Tensor

from fastchgnet.ops import projection
from fastchgnet.ops.derivatives import feature_derivatives
from fastchgnet.ops.projection import MAX_PARTS, Ends, Inputs, Sent, project, reference
from fastchgnet.ops.shared import Shared

D = 3
KINDS = {  # sent, weighted, parts, at ends, biases
    "first atoms": (False, False, 2, 0, 1),
    "atoms": (True, False, 4, 0, 3),
    "last atoms": (True, False, 0, 0, 0),
    "first bonds": (False, False, 3, 2, 0),
    "bonds": (True, True, 5, 4, 0),
    "last bonds": (True, True, 1, 0, 0),
}


def arguments(kind: str, n: int = 4, dtype: torch.dtype = torch.float64, width: int = D) -> tuple:
    """Return what the library op takes."""
    torch.manual_seed(0)
    sent, weighted, n_parts, n_at_ends, n_biases = KINDS[kind]
    random = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    row_ends = torch.randperm(2 * n).view(n, 2) if "bonds" in kind else None
    end_row = None if row_ends is None else row_ends.flatten().argsort() // 2
    return Inputs(
        random(n, width),
        random(n if row_ends is None else 2 * n, width) if sent else None,
        random(n, width) if weighted else None,
        random(width * (sent + 2 * n_parts), width),
        random(2 * width * n_biases) if n_biases else None,
        row_ends,
        end_row,
        n_at_ends,
        n_parts,
    )


def leaves(m: Inputs) -> list[Tensor]:
    return [t for t in m[:5] if t is not None]


def outputs(found: tuple[Tensor, ...], m: Inputs) -> tuple[Tensor, ...]:
    """Leave out what is not there."""
    return found[0 if m.t is not None else 1 : 1 + m.n_parts]


@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_reference(kind: str, n: int) -> None:
    m = arguments(kind, n)
    ours, expected = outputs(projection._family(*m), m), outputs(reference(*m), m)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    grads = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves(m), grads),
        torch.autograd.grad(expected, leaves(m), grads),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize("without", [None, 0, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_of_the_reference(kind: str, without: int | None) -> None:
    m = arguments(kind)
    features = [t for t in m[:3] if t is not None]

    def second(found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        torch.manual_seed(1)
        used = list(outputs(found, m))
        if without is not None and len(used) > 1:
            used.pop(without)
        grads = [torch.randn_like(t).requires_grad_() for t in used]
        with feature_derivatives():
            first = torch.autograd.grad(used, features, grads, create_graph=True)
        # neither linear nor the same for all of them
        loss = sum(((k + 1) * f).tanh().square().sum() for k, f in enumerate(first))
        loss = loss + sum(t.square().sum() for t in used)
        return torch.autograd.grad(loss, [*grads, *leaves(m)], allow_unused=True, materialize_grads=True)

    ours, expected = second(projection._family(*m)), second(reference(*m))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dropped", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_cotangents_may_be_missing(dropped: list[int]) -> None:
    m = arguments("bonds")
    features = list(m[:3])

    def second(found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        torch.manual_seed(1)
        used = outputs(found, m)
        grads = [torch.randn_like(t).requires_grad_() for t in used]
        with feature_derivatives():
            first = torch.autograd.grad(used, features, grads, create_graph=True)
        loss = sum(f.square().sum() for k, f in enumerate(first) if k not in dropped)
        return torch.autograd.grad(loss, [*grads, *leaves(m)], allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(second(projection._family(*m)), second(reference(*m)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    m = arguments(kind, 2, width=2)
    given = leaves(m)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        supply = iter(values)
        return outputs(projection._family(*(None if t is None else next(supply) for t in m[:5]), *m[5:]), m)

    assert torch.autograd.gradcheck(call, given)
    n_features = sum(t is not None for t in m[:3])
    grads = [torch.randn_like(t).requires_grad_() for t in call(*given)]

    def first(*values: Tensor) -> tuple[Tensor, ...]:
        grads_, values = values[: len(grads)], values[len(grads) :]
        with feature_derivatives():
            return torch.autograd.grad(call(*values), values[:n_features], grads_, create_graph=True)

    assert torch.autograd.gradcheck(first, [*grads, *given])


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_accepts_all_three_ops(kind: str) -> None:
    accept_all_three(projection._family, arguments(kind))


def test_the_public_function_packs_what_it_is_given() -> None:
    m = arguments("bonds")
    weights = m.weight[D:].split(2 * D)
    ends = Ends(m.row_ends, m.end_row, m.n_at_ends)
    state, tables = project(m.s, Sent(m.t, Shared(m.w), m.weight[:D]), [(w, None) for w in weights], ends)
    torch.testing.assert_close((state, *tables), reference(*m))

    m = arguments("first atoms")
    (first, second), bias = m.weight.split(2 * D), m.bias
    state, tables = project(m.s, None, [(first, bias), (second, None)])
    assert state is m.s
    torch.testing.assert_close(tables, outputs(reference(*m), m))

    with pytest.raises(ValueError, match="6 projections"):
        project(m.s, None, [(first, None)] * (MAX_PARTS + 1))
    with pytest.raises(ValueError, match="with a bias come first"):
        project(m.s, None, [(second, None), (first, bias)])
