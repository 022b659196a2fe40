"""Triton bodies of updates and projections against the PyTorch ones, at every level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import DEVICE, nan_filled, without_syncs  # noqa: F401, a fixture for every test here
from test_ops_projection import KINDS, arguments
from torch import Tensor

from fastchgnet.ops import projection as op
from fastchgnet.ops._register import adding
from fastchgnet.ops.gpu import projection as kernels
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.projection import Inputs

# sums of some hundred products, of which three in tf32 keep 20 bits; a single one would err by 3e-4
FLOAT32 = 1e-5

KERNELS = (kernels.forward, kernels.backward, kernels.backward_backward)
PYTORCH = (op._forward, adding(op._backward), op._backward_backward)
NOTHING = ((),) * 5


def moved(given: Any, dtype: torch.dtype, device: str) -> list[Any]:
    return [
        t.detach().to(device, dtype if t.is_floating_point() else None) if isinstance(t, Tensor) else t
        for t in given
    ]


def case(kind: str, n: int, width: int = 16) -> tuple[list[Any], list[Any], list[Any]]:
    """Inputs, gradients of the outputs and cotangents of the features' gradients."""
    given = moved(arguments(kind, n, torch.float32, width), torch.float32, "cpu")
    grads = [None if t is None else torch.randn_like(t) for t in op._forward(*given)]
    grads += [None] * (1 + op.MAX_PARTS - len(grads))
    cotangents = [None if t is None else torch.randn_like(t) for t in given[:3]]
    return given, grads, cotangents


def dropped(tensors: list[Any], missing: tuple[int, ...]) -> list[Any]:
    return [None if k in missing else t for k, t in enumerate(tensors)]


def check(run: Callable[..., list[Any]], *drawn: list[Any]) -> None:
    """Run something with the kernels and with PyTorch in float64."""
    exact = run(PYTORCH, *(moved(t, torch.float64, "cpu") for t in drawn))
    found = run(KERNELS, *(moved(t, torch.float32, DEVICE) for t in drawn))
    for one, expected in zip(found, exact, strict=True):
        if expected is None:
            assert one is None
            continue
        assert one.shape == expected.shape and one.dtype == torch.float32 and one.is_contiguous()
        assert (one.cpu() - expected).norm() <= FLOAT32 * expected.norm()


def levels(bodies: Any, given: list[Any], grads: list[Any], cotangents: list[Any]) -> list[Any]:
    """Results of all three levels."""
    forward, backward, second = bodies
    before = [() if t is None else (t.cos(), t.sin())[: 1 + k % 2] for k, t in enumerate(given[:5])]
    found = [*forward(*given), *second(cotangents, grads, *given)]
    return [*found, *backward(NOTHING, False, grads, *given), *backward(before, True, grads, *given)]


@pytest.mark.parametrize("n", [0, 1, 17, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_all_levels_are_those_of_pytorch(kind: str, n: int) -> None:
    check(levels, *case(kind, n))


@pytest.mark.parametrize(("kind", "width"), [("bonds", 32), ("bonds", 64), ("last atoms", 64)])
def test_all_levels_at_other_widths(kind: str, width: int) -> None:
    check(levels, *case(kind, 33, width))


def test_few_rows_and_many() -> None:
    # four programs at once: 17 rows are few for one kind of programs, and many for two
    for n in (32, 130):
        check(levels, *case("bonds", n))


@pytest.mark.parametrize("missing", [(0,), (1,), (2, 4), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("kind", ["atoms", "bonds"])
def test_gradients_may_be_missing(kind: str, missing: tuple[int, ...]) -> None:
    given, grads, cotangents = case(kind, 9)
    check(levels, given, dropped(grads, missing), cotangents)


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_cotangents_may_be_missing(missing: tuple[int, ...]) -> None:
    given, grads, cotangents = case("bonds", 9)
    check(levels, given, grads, dropped(cotangents, missing))


@pytest.mark.parametrize("kind", ["atoms", "last atoms"])
@pytest.mark.parametrize("missing", [(0,), (1,)])
def test_cotangents_of_atoms_may_be_missing(kind: str, missing: tuple[int, ...]) -> None:
    given, grads, cotangents = case(kind, 9)
    check(levels, given, grads, dropped(cotangents, missing))


@pytest.mark.parametrize("kind", ["atoms", "bonds"])
def test_rows_do_not_depend_on_how_many_there_are(kind: str) -> None:
    given, grads, _ = (moved(t, torch.float32, DEVICE) for t in case(kind, 200))
    m = Inputs(*given)
    n = 20
    # the ends of row n are 2 n and 2 n + 1, so that the first rows own the first ends
    if m.row_ends is not None:
        m = m._replace(row_ends=torch.arange(400, device=DEVICE).view(200, 2))
        m = m._replace(end_row=m.row_ends.flatten() // 2)

    def first(t: Any) -> Any:
        rows = {200: n, 400: 2 * n}
        return t[: rows[len(t)]] if isinstance(t, Tensor) and len(t) in rows else t

    few = [first(t) for t in m]
    few[3:5] = m[3:5]
    all_of = kernels.forward(*m), kernels.backward(NOTHING, False, grads, *m)
    some_of = kernels.forward(*few), kernels.backward(NOTHING, False, [first(g) for g in grads], *few)
    for one, other in zip((*all_of[0], *all_of[1]), (*some_of[0], *some_of[1]), strict=True):
        assert (one is None and other is None) or torch.equal(first(one), other)


def test_inputs_may_lie_anywhere_and_results_repeat() -> None:
    drawn = [moved(t, torch.float32, DEVICE) for t in case("bonds", 20)]
    apart = [
        [
            torch.stack([t, t], dim=-1).select(-1, 0) if isinstance(t, Tensor) and t.dim() else t
            for t in tensors
        ]
        for tensors in drawn
    ]
    assert not apart[0][0].is_contiguous()
    for one, other in zip(levels(KERNELS, *drawn), levels(KERNELS, *apart), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_other_widths_are_left_to_pytorch() -> None:
    drawn = case("atoms", 5, 6)
    for one, other in zip(levels(KERNELS, *drawn), levels(PYTORCH, *drawn), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_every_level_is_one_launch_and_two_for_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    started, launch = [], runtime.launch

    def counted(*args: Any, **options: Any) -> None:
        started.append(args[0].__name__)
        launch(*args, **options)

    monkeypatch.setattr(runtime, "launch", counted)
    levels(KERNELS, *(moved(t, torch.float32, DEVICE) for t in case("bonds", 5)))
    with_parameters = ["_backward_kernel", "_weigh_kernel", "_sum_kernel"]
    assert started == ["_forward_kernel", *with_parameters, "_backward_kernel", *with_parameters]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_takes_the_kernels_on_cuda(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started, launch = [], runtime.launch
    monkeypatch.setattr(
        runtime, "launch", lambda *args, **options: (started.append(args[0]), launch(*args, **options))
    )
    m = Inputs(*moved(case(kind, 3000, 64)[0], torch.float32, DEVICE))
    leaves = [t.requires_grad_() for t in m[:5] if t is not None]
    features = [t for t in m[:3] if t is not None]
    with without_syncs():
        loss = sum(t.square().sum() for t in op._family(*m))
        first = torch.autograd.grad(loss, features, create_graph=True)
        sum(t.square().sum() for t in first).backward()
    assert len(started) >= 5 and all(t.grad is None or t.grad.isfinite().all() for t in leaves)
