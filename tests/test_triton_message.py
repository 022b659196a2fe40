"""Triton bodies of the gated messages against the PyTorch ones, at every level."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from interpreted import DEVICE, nan_filled, without_syncs  # noqa: F401, a fixture for every test here
from test_ops_message import KINDS, arguments, detached, flat, index
from torch import Tensor

from fastchgnet.ops import _message_torch, message
from fastchgnet.ops._message_inputs import Inputs
from fastchgnet.ops._register import adding
from fastchgnet.ops.gpu import message as gpu_message
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.gpu.message_second import backward_backward

WIDTH = 16
BODIES = (gpu_message.forward, gpu_message.backward, backward_backward)
PYTORCH = (_message_torch.forward, adding(_message_torch.backward), _message_torch.backward_backward)
NOTHING = ((),) * 7

# Relative to the largest element, against float64: norms divide by the spread of sixteen numbers, and the
# interpreter errs by up to 6e-7. The matrix units' three products err a little more.
FP32 = 1e-5
# Ten bits of a factor instead of 23 are 5e-4, and up to 3e-3 at the end.
TF32 = 8e-3

ALL = (True,) * 6
SOME = (
    (False, True, True, False, True, True),
    (True, True, False, True, False, True),
    (True, False, False, False, True, False),
)


def inputs_of(kind: str, n_rows: int) -> list[Any]:
    return on_device(flat(arguments(kind, n_rows, torch.float32, WIDTH)))


def on_device(inputs: list[Any]) -> list[Any]:
    return [t.to(DEVICE) if isinstance(t, Tensor) else t for t in detached(inputs)]


def one_segment(inputs: list[Any]) -> list[Any]:
    """Put all rows into the second segment of every table."""
    m = Inputs(*inputs)
    sizes, found = (len(m.p), len(m.q), len(m.k_start) - 1), []
    for n, has_order in zip(sizes, (False, True, True), strict=True):
        segment = torch.ones(len(m.i), dtype=torch.long)
        made = index(segment, n, is_sorted=not has_order)
        found += [made.segment, made.start, made.order] if has_order else [made.segment, made.start]
    return [*inputs[:9], *(t.to(DEVICE) for t in found)]


def sparse(inputs: list[Any]) -> list[Any]:
    """Leave most segments of i empty, the first and the last of all."""
    m = Inputs(*inputs)
    made = index(3 * m.i.cpu() + 1, 3 * len(m.p) + 1, is_sorted=True)
    p = torch.randn(made.n_segments, m.p.shape[1], device=DEVICE)
    return [*m._replace(p=p, i=made.segment.to(DEVICE), i_start=made.start.to(DEVICE))]


def widened(tensors: Any) -> list:
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def drawn(inputs: list[Any], given: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Draw a gradient of the output and cotangents of some features' gradients, transposed in memory."""
    m = Inputs(*inputs)
    torch.manual_seed(1)
    n = len(m.i) if m.w is None else len(m.p)
    grad = torch.randn(m.p.shape[1] // 2, n, device=DEVICE).t()
    shapes = [t.shape if t is not None and has else None for t, has in zip(inputs[:6], given, strict=True)]
    return grad, tuple(None if s is None else torch.randn(*s[::-1], device=DEVICE).t() for s in shapes)


def levels(bodies: tuple, inputs: Any, grad: Tensor, cotangents: Any) -> list[Tensor | None]:
    forward, backward, second = bodies
    m = Inputs(*inputs)
    before = [() if t is None else (t.cos(), t.sin())[: 1 + k % 2] for k, t in enumerate(inputs[:7])]
    *first, by_parameters = backward(before, True, grad, *inputs)
    *twice, by_parameters_twice = second(cotangents, grad, *inputs)
    return [forward(*inputs), *first, *m.unpacked(by_parameters), *twice, *m.unpacked(by_parameters_twice)]


def assert_equal(inputs: list[Any], tolerance: float, given: tuple[bool, ...] = ALL) -> None:
    grad, cotangents = drawn(inputs, given)
    found = levels(BODIES, inputs, grad, cotangents)
    expected = levels(PYTORCH, widened(inputs), grad.double(), tuple(widened(cotangents)))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
            continue
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize(
    ("kind", "n_rows"),
    [
        *itertools.product(["bond", "angle"], [0, 1, 63, 64, 65, 130]),
        *itertools.product(sorted({*KINDS} - {"bond", "angle"}), [0, 65, 130]),
    ],
)
def test_all_levels_are_those_of_pytorch(kind: str, n_rows: int) -> None:
    with runtime.precision("fp32"):
        assert_equal(inputs_of(kind, n_rows), FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_may_be_left_out(kind: str) -> None:
    inputs = inputs_of(kind, 65)
    grad, _ = drawn(inputs, ALL)
    with runtime.precision("fp32"):
        found, whole = (
            gpu_message.backward(NOTHING, with_them, grad, *inputs) for with_them in (False, True)
        )
    # other code, and sums in another order
    assert found[6] is None
    torch.testing.assert_close(found[:6], whole[:6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", SOME)
@pytest.mark.parametrize("kind", ["atom", "bond", "angle"])
def test_cotangents_may_be_missing(kind: str, given: tuple[bool, ...]) -> None:
    with runtime.precision("fp32"):
        assert_equal(inputs_of(kind, 65), FP32, given)


@pytest.mark.parametrize("layout", [one_segment, sparse])
@pytest.mark.parametrize("kind", ["atom", "bond", "angle"])
def test_uneven_segments(kind: str, layout: Any) -> None:
    with runtime.precision("fp32"):
        assert_equal(layout(inputs_of(kind, 65)), FP32)


@pytest.mark.parametrize("n_r", [0, 4])
def test_half_of_the_last_table_may_be_empty(n_r: int) -> None:
    with runtime.precision("fp32"):
        assert_equal(on_device(flat(arguments("atom", 65, torch.float32, WIDTH, n_r))), FP32)


def test_an_index_whose_transpose_lists_rows_twice_or_never() -> None:
    m = Inputs(*inputs_of("angle", 65))
    either, start, order = (t.to(DEVICE) for t in index(torch.cat([m.j, m.j]).cpu() % 3, 3, is_sorted=False))
    never = torch.zeros(len(m.r) + 1, dtype=torch.long, device=DEVICE)
    m = m._replace(a=None, parameters=m.parameters[2 * WIDTH**2 :])
    m = m._replace(j=either[:65], j_start=start, j_order=order % 65)
    with runtime.precision("fp32"):
        assert_equal([*m._replace(k_start=never, k_order=never[:0])], FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_tf32_rounds_factors_alone(kind: str) -> None:
    inputs = inputs_of(kind, 33)
    with runtime.precision("tf32"):
        assert_equal(inputs, TF32)
        with pytest.raises(AssertionError):
            assert_equal(inputs, FP32)


def test_features_that_messages_are_added_to_stay_as_they_are() -> None:
    inputs = inputs_of("angle", 33)
    Inputs(*inputs).unpacked(inputs[6]).angle.zero_()  # no product is left
    grad, cotangents = drawn(inputs, ALL)
    found = {}
    for name in ("tf32", "fp32"):
        with runtime.precision(name):
            y, first, second = (
                BODIES[0](*inputs),
                BODIES[1](NOTHING, False, grad, *inputs),
                BODIES[2](cotangents, grad, *inputs),
            )
            found[name] = [y, *first, *second[:7]]
    torch.testing.assert_close(found["tf32"], found["fp32"], rtol=0, atol=0)
    torch.testing.assert_close(found["fp32"][6], grad, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["atom", "bond", "atom without norm", "shared norm"])
def test_rows_without_weight_contribute_exactly_nothing(kind: str) -> None:
    inputs = Inputs(*inputs_of(kind, 130))
    w = inputs.w.clone()
    w[2:] = 0
    # rows 64 and on are fillers: a weight of zero, and segments of their own in every table
    filler = torch.where(torch.arange(130) < 64, 0, 2)
    i = (inputs.i.cpu() % 2 + filler).sort().values
    j = torch.where(filler == 0, inputs.j.cpu() % 2, 2)
    k = inputs.k.cpu() % 2 + filler
    segments = ((i, len(inputs.p), True), (j, len(inputs.q), False), (k, len(w), False))
    made = [index(*one) for one in segments]
    parts = [part.to(DEVICE) for one in made for part in one if part is not None]
    padded = Inputs(*inputs._replace(w=w)[:9], *parts)
    grad, cotangents = drawn([*padded], (True, True, True, True, False, True))
    outputs = (
        BODIES[0](*padded),
        *BODIES[1](NOTHING, True, grad, *padded),
        *BODIES[2](cotangents, grad, *padded),
    )
    y, gradients, second = outputs[0], outputs[1:8], outputs[8:]
    assert not y[2:].any() and y[:2].all()
    for by_p, by_q, *by_r in (gradients[:4], second[1:5]):
        for by_table in (by_p, by_q, torch.cat([half for half in by_r if half is not None])):
            assert not by_table[2:].any() and by_table[:2].any()
    assert not second[0][2:].any()
    for t in outputs:
        assert t is None or t.isfinite().all()
    # parameters see nothing of them either: their features may be anything
    changed = padded._replace(p=torch.cat([padded.p[:2], padded.p[2:] + 1]))
    again = BODIES[1](NOTHING, True, grad, *changed)
    # the gradient of a weight of zero is the message, which does change
    torch.testing.assert_close([*again[:4], *again[5:]], [*gradients[:4], *gradients[5:]], rtol=0, atol=0)


def test_the_product_s_width() -> None:
    with runtime.precision("fp32"):
        assert_equal(on_device(flat(arguments("bond", 65, torch.float32, 64))), FP32)


def test_other_widths_are_pytorch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "launch", None)
    given = detached(flat(arguments("bond", 11, torch.float32, 4)))
    grad = torch.randn(5, 4)
    cotangents = tuple(None if t is None else torch.randn_like(t) for t in given[:6])
    found, expected = (levels(bodies, given, grad, cotangents) for bodies in (BODIES, PYTORCH))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("n_rows", [0, 65])
@pytest.mark.parametrize(
    ("kind", "expected"), [("atom", (2, 2, 2, 2)), ("bond", (2, 2, 2, 2)), ("angle", (1, 2, 2, 2))]
)
def test_launches_are_few_whatever_the_rows(
    kind: str, expected: tuple[int, ...], n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        started.append(kernel.__name__)

    monkeypatch.setattr(runtime, "launch", launch)
    inputs = inputs_of(kind, n_rows)
    grad, cotangents = drawn(inputs, ALL)
    found = []
    forward, backward, second = BODIES
    for call in (
        lambda: forward(*inputs),
        lambda: backward(NOTHING, False, grad, *inputs),
        lambda: backward(NOTHING, True, grad, *inputs),
        lambda: second(cotangents, grad, *inputs),
    ):
        started.clear()
        call()
        found.append(len(started))
    assert tuple(found) == expected


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_results_repeat_bit_for_bit_in_a_graph(kind: str) -> None:
    inputs = inputs_of(kind, 5000)
    grad, cotangents = drawn(inputs, ALL)
    with without_syncs():
        expected = levels(BODIES, inputs, grad, cotangents)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = levels(BODIES, inputs, grad, cotangents)
        graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_takes_the_kernels_on_cuda(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    launch = runtime.launch

    def counted(kernel: Any, *args: Any, **options: Any) -> None:
        started.append(kernel.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(runtime, "launch", counted)
    message._family(*inputs_of(kind, 65))
    assert started[0] == "_forward_kernel"
