"""Update the features of atoms or bonds with what they were sent, and project them for all who read them.

Row n has features s, was sent the sum of t over its ends, weighted by w, and is read through M projections:

    t^_n = w_n * (sum of t_e over the ends e of n)     [D]
    x = s + B t^                                        [D]; x = s where nothing was sent
    y_m = W_m x + b_m                                   [2D], at n itself or at each of its ends

An atom is its own end and has no weight; a short bond has two ends, its short edges. One op makes all
projections of a state, since one product with tall matrices is cheaper than many with small ones, and its
gradient is summed over all readers in one place.

VJP, with gradients X of x and Y_m of y_m, those at ends summed over the ends of a row:

    ds = X + sum over m of W_m^T Y_m        h = B^T ds
    dt_e = w h at every end                 dw = h * (sum of t_e)
    dB = ds t^^T                            dW_m = Y_m x^T           db_m = Y_m

VJP of the VJP. With the cotangents u_s, u_t (v its sum over the ends) and u_w of ds, dt and dw, the tangents

    t' = w v + u_w * (sum of t_e)           x' = u_s + B t'

are the gradient of X and give that of Y_m, W_m x'. The others are

    t~_e = h u_w      w~ = h v      B~ = ds t'^T      W~_m = Y_m x'^T

Saved: the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastchgnet.ops._register import Family, adding
from fastchgnet.ops.cpu import projection as cpu_projection
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.packing import packed
from fastchgnet.ops.segments import sum_rows
from fastchgnet.ops.shared import Shared

MAX_PARTS = 5


class Sent(NamedTuple):
    """What rows were sent."""

    rows: Tensor  # [n_ends, D], or [n, D] where a row is its own end
    weight: Shared | None  # [n, D]
    out: Tensor  # [D, D], B


class Ends(NamedTuple):
    """The two ends of every row."""

    row_ends: Tensor  # [n, 2]
    end_row: Tensor  # [n_ends] the row of each end
    n_parts: int  # projections that are wanted at the ends, the first ones


class Inputs(NamedTuple):
    """What the op takes; Any is a Tensor or None."""

    s: Tensor  # [n, D]
    t: Any  # [n_ends or n, D]
    w: Any  # [n, D]
    weight: Tensor  # [D + sum of 2D, D]: B where there is t, then W_m
    bias: Any  # [2D for each of the first parts]
    row_ends: Any
    end_row: Any
    n_at_ends: int
    n_parts: int


def project(
    state: Tensor, sent: Sent | None, parts: Sequence[tuple[Tensor, Tensor | None]], ends: Ends | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Update a state and project it.

    Args:
        state: [n, D].
        sent: what updates it, if anything does.
        parts: weight [2D, D] and bias [2D] or None of each projection, those with a bias first, at most
            MAX_PARTS.
        ends: of the rows, where they are not their own.

    Returns:
        the new state [n, D] and the projections, [n, 2D] or [n_ends, 2D].
    """
    if len(parts) > MAX_PARTS:
        raise ValueError(f"{len(parts)} projections, but at most {MAX_PARTS} are made at once")
    biases = [bias for _, bias in parts if bias is not None]
    if any(bias is not None for _, bias in parts[len(biases) :]):
        raise ValueError("projections with a bias come first")
    weights = [weight for weight, _ in parts] if sent is None else [sent.out, *(w for w, _ in parts)]
    row_ends, end_row, n_at_ends = ends or (None, None, 0)
    x, *tables = _family.read(
        state,
        None if sent is None else sent.rows,
        None if sent is None else sent.weight,
        packed(weights).view(-1, state.shape[1]),
        packed(biases) if biases else None,
        row_ends,
        end_row,
        n_at_ends,
        len(parts),
    )
    return (state if sent is None else x), tuple(tables[: len(parts)])


def reference(*inputs: Any) -> tuple[Tensor, ...]:
    """Compute the op in plain PyTorch, differentiable to any order."""
    m = Inputs(*inputs)
    x = m.s
    if m.t is not None:
        total = m.t if m.row_ends is None else m.t[m.row_ends].sum(1)
        x = x + (total if m.w is None else m.w * total) @ _out(m).t()
    tables = []
    for k, (weight, bias) in enumerate(_parts(m)):
        y = x @ weight.t() if bias is None else x @ weight.t() + bias
        tables.append(y if k >= m.n_at_ends else y[m.end_row])
    return x, *tables


def _out(m: Inputs) -> Tensor:
    """Take B out of the packed weights, where something was sent."""
    return m.weight[: m.s.shape[1]]


def _parts(m: Inputs) -> list[tuple[Tensor, Any]]:
    """Take the weight and the bias of every part out of the packed ones."""
    d = m.s.shape[1]
    weights = m.weight[0 if m.t is None else d :].split(2 * d) if m.n_parts else ()
    biases: list[Any] = [] if m.bias is None else list(m.bias.split(2 * d))
    return list(zip(weights, biases + [None] * (m.n_parts - len(biases)), strict=True))


def _at_ends(rows: Any, m: Inputs) -> Any:
    """Sum rows over the ends of each row."""
    if rows is None or m.row_ends is None:
        return rows
    start = torch.arange(0, m.row_ends.numel() + 1, 2, device=rows.device)
    return sum_rows(rows, start, m.row_ends.flatten())


def _each_end(rows: Any, m: Inputs) -> Any:
    """Read the row of every end."""
    return rows if rows is None or m.end_row is None else rows.index_select(0, m.end_row)


def _times(x: Any, w: Any) -> Any:
    return x if x is None or w is None else x * w


def _projected(x: Tensor, m: Inputs, with_bias: bool) -> list[Tensor]:
    """Return W_m x of every part, at its ends where they are wanted there."""
    tables = []
    for k, (weight, bias) in enumerate(_parts(m)):
        y = torch.addmm(bias, x, weight.t()) if with_bias and bias is not None else x @ weight.t()
        tables.append(_each_end(y, m) if k < m.n_at_ends else y)
    return tables


class _Pulled:
    """Gradients of what comes before the projections: Y_m by rows, ds and h."""

    def __init__(self, grads: Sequence[Any], m: Inputs) -> None:
        by_x, *by_tables = grads[: 1 + m.n_parts]
        self.y = [_at_ends(y, m) if k < m.n_at_ends else y for k, y in enumerate(by_tables)]
        s: Any = by_x
        for y, (weight, _) in zip(self.y, _parts(m), strict=True):
            if y is not None:
                s = y @ weight if s is None else torch.addmm(s, y, weight)
        self.s: Tensor = s.clone() if s is by_x else s
        self.h = None if m.t is None else self.s @ _out(m)

    def weight(self, x: Tensor, t: Any, m: Inputs) -> Tensor:
        """Return the gradient of the packed weights, by features x and what was sent."""
        factors = [] if m.t is None else [(self.s, t)]
        factors += [(y, x) for y in self.y]
        gradient, end = torch.empty_like(m.weight), 0
        for left, right in factors:
            first, end = end, end + (m.s.shape[1] if right is t else 2 * m.s.shape[1])
            if left is None or right is None:
                gradient[first:end] = 0
            else:
                torch.mm(left.t(), right, out=gradient[first:end])
        return gradient

    def bias(self, m: Inputs) -> Any:
        """Return the gradient of the packed biases."""
        if m.bias is None:
            return None
        width = 2 * m.s.shape[1]
        rows = self.y[: len(m.bias) // width]
        return torch.cat([m.bias.new_zeros(width) if y is None else y.sum(0) for y in rows])


def _forward(*inputs: Any) -> tuple[Any, ...]:
    m = Inputs(*inputs)
    if compiled := cpu_projection.library(m):
        return tuple(cpu_projection.forward(compiled, m))
    x = _updated(m.s, _times(_at_ends(m.t, m), m.w), m)
    return None if m.t is None else x, *_projected(x, m, with_bias=True)


def _backward(with_parameters: bool, grads: Sequence[Any], *inputs: Any) -> list[Any]:
    m = Inputs(*inputs)
    compiled = None if with_parameters else cpu_projection.library(m)
    if compiled is not None:
        return cpu_projection.backward(compiled, m, grads)
    pulled = _Pulled(grads, m)
    total = _at_ends(m.t, m)
    by_t = _each_end(_times(pulled.h, m.w), m)
    features = [pulled.s, by_t, None if m.w is None else pulled.h * total]
    if not with_parameters:
        return features
    t = _times(total, m.w)
    return [*features, pulled.weight(m.s if t is None else _updated(m.s, t, m), t, m), pulled.bias(m)]


def _backward_backward(cotangents: Sequence[Any], grads: Sequence[Any], *inputs: Any) -> list[Any]:
    m = Inputs(*inputs)
    u_s, u_t, u_w = cotangents
    pulled = _Pulled(grads, m)
    v = _at_ends(u_t, m)
    t_dot = _times(v, m.w)
    by_t: Any = None
    if u_w is not None:
        more = u_w * _at_ends(m.t, m)
        t_dot = more if t_dot is None else t_dot.add_(more)
        by_t = _each_end(pulled.h * u_w, m)
    x_dot = _updated(u_s, t_dot, m)
    by_x = None if m.t is None else x_dot.clone() if x_dot is u_s else x_dot
    by_grads: list[Any] = [by_x, *_projected(x_dot, m, with_bias=False)]
    by_grads += [None] * (1 + MAX_PARTS - len(by_grads))
    by_w = None if m.w is None or v is None else pulled.h * v
    return [*by_grads, None, by_t, by_w, pulled.weight(x_dot, t_dot, m)]


def _updated(s: Any, t: Any, m: Inputs) -> Tensor:
    """Return s + B t."""
    if t is None:
        return s
    out = _out(m)
    return t @ out.t() if s is None else torch.addmm(s, t, out.t())


_family = Family(
    "project",
    features=["Tensor s", "Tensor? t", "Tensor? w"],
    parameters=["Tensor weight", "Tensor? bias"],
    constants=["Tensor? row_ends", "Tensor? end_row", "int n_at_ends", "int n_parts"],
    forward=_forward,
    backward=adding(_backward),
    backward_backward=_backward_backward,
    shape=lambda *inputs: _shapes(Inputs(*inputs)),
    n_outputs=1 + MAX_PARTS,
    vanishes=lambda *inputs: (0, 4) if Inputs(*inputs).w is not None else (0, 1, 4),
)
_family.on_cuda(
    runtime.body("projection", "forward", _forward),
    runtime.body("projection", "backward", adding(_backward)),
    runtime.body("projection", "backward_backward", _backward_backward),
)


def _shapes(m: Inputs) -> tuple[Any, ...]:
    n, d = m.s.shape
    x = None if m.t is None else torch.empty_like(m.s)
    rows = [n if m.end_row is None or k >= m.n_at_ends else len(m.end_row) for k in range(m.n_parts)]
    return x, *(m.s.new_empty(k, 2 * d) for k in rows)
