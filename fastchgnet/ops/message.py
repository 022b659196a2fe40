"""Gated MLP on gathered projections, weighted and summed by segment: AtomConv, BondConv and AngleUpdate.

Rows are edges or angles. Row n belongs to the segments i, j and k of three tables of projections, and

    h = P_i + Q_j + R_k  (+ A a_n)           [2D], core and gate side by side; R may come in two halves
    z = W SiLU(h) + b                        block by block; z = h where there is no hidden layer
    n = g * (z - mean z) / std z + c         LayerNorm, block by block; n = z where there is no norm
    m = SiLU(n_core) * sigmoid(n_gate)       [D]
    y_i = sum of w_k * m over the rows of i; without weights the rows y_n = m themselves (+ a_n)

Rows are sorted by i. AtomConv: i centre, j neighbour, k bond; BondConv: i and k the short edges of an
angle, j its centre, a the angle's features; AngleUpdate: the same without hidden layer, weights and sum, and
added to a. Bonds are projected in two ways, the short ones and the long ones: R is two tables, one for the
first segments and one for the others, and what is said below of R is true of either.

VJP, with a gradient G of y gathered by i (S is SiLU, s the sigmoid):

    dm = w G                   dw = sum over k of m G;   da = G where y has a_n in it
    dn = (s(n_gate) S'(n_core), S(n_core) s'(n_gate)) dm
    dz = L(g dn)               with L(q) = (q - mean q - x mean(q x)) / std z, symmetric; x the normalised z
    dh = S'(h) W^T dz          dP, dQ, dR = sums of dh over i, j, k;   da += A^T dh
    dW = dz S(h)^T, db = sum dz, dg = sum x dn, dc = sum dn, dA = dh a^T

VJP of the VJP. Cotangents of dP, dQ, dR, da are a direction u_h = u_P + u_Q + u_R + A u_a of h, one of dw
is a direction u_w of w. Since <u, J^T G> = <G, J u>, the gradient of G is the tangent y' = sum of
u_w m + w m', and of u_a where y has a_n in it, with

    h' = u_h,  z' = W S'(h) h',  n' = g L(z'),
    m' = S'(n_core) s(n_gate) n'_core + S(n_core) s'(n_gate) n'_gate

and the other gradients are the VJP of <G, y'> by h, w and the parameters. A ~ marks them:

    m~ = G u_w and m'~ = G w           give n~ (with the second derivatives of S and s) and n'~
    z'~ = L(g n'~)
    z~ = L(g n~) - (x mean(g n'~ L(z')) + mean(z' x) z'~ + mean(g n'~ x) L(z')) / std z
    h~ = S'(h) W^T z~ + S''(h) h' W^T z'~
    W~ = z~ S(h)^T + z'~ (S'(h) h')^T,  g~ = x n~ + L(z') n'~,  A~ = h~ a^T + (S'(h) W^T z'~) u_a^T

Saved: the inputs. Everything between is computed again. The parameters that there are of A, W, b, g and c
come as one tensor, one behind the other, so that autograd adds up one gradient and not five.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastchgnet.graph import Index
from fastchgnet.ops import _message_torch
from fastchgnet.ops._message_inputs import EPS, MLP, Inputs
from fastchgnet.ops._register import Family, adding
from fastchgnet.ops.cpu import message as cpu_message
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.shared import Shared


class Tables(NamedTuple):
    """Projections that rows gather, core and gate side by side."""

    i: Tensor  # [n_i, 2D]
    j: Tensor  # [n_j, 2D]
    k: Tensor  # [n_k, 2D], or fewer rows: of the first segments
    k_tail: Tensor | None = None  # of the other segments


class Rows(NamedTuple):
    """The segments of every row."""

    i: Index  # rows are sorted by this one
    j: Index
    k: Index


def messages(tables: Tables, weight: Shared | None, rows_ND: Shared | None, mlp: MLP, rows: Rows) -> Tensor:
    """Gated messages of every row, summed over i where they have weights, else added to the rows' features.

    Args:
        tables: projections.
        weight: [n_k, D] of the messages, or None.
        rows_ND: [N, D] features of the rows themselves, or None.
        mlp: parameters.
        rows: segments of the rows.

    Returns:
        [n_i, D], or [N, D] without weights.
    """
    i, j, k = rows
    return _family.read(
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
    )


def reference(tables: Tables, weight: Tensor | None, rows_ND: Tensor | None, mlp: MLP, rows: Rows) -> Tensor:
    """Compute the op in plain PyTorch, differentiable to any order."""
    table_k = tables.k if tables.k_tail is None else torch.cat([tables.k, tables.k_tail])
    h = tables.i[rows.i.segment] + tables.j[rows.j.segment] + table_k[rows.k.segment]
    if rows_ND is not None:
        h = h + F.linear(rows_ND, mlp.angle)
    z = h.view(len(h), 2, h.shape[1] // 2)
    if mlp.weight is not None:
        z = torch.einsum("nbd,bcd->nbc", F.silu(z), mlp.weight) + mlp.bias
    if mlp.scale is not None:
        z = F.layer_norm(z, z.shape[2:], eps=EPS) * mlp.scale + mlp.shift
    message = F.silu(z[:, 0]) * torch.sigmoid(z[:, 1])
    if weight is None:
        return message if rows_ND is None else rows_ND + message
    weighted = weight[rows.k.segment] * message
    return message.new_zeros(rows.i.n_segments, message.shape[1]).index_add(0, rows.i.segment, weighted)


_family = Family(
    "messages",
    features=["Tensor p", "Tensor q", "Tensor r", "Tensor? r_tail", "Tensor? w", "Tensor? a"],
    parameters=["Tensor? parameters"],
    constants=[
        "bool has_hidden",
        "int n_norms",
        "Tensor i",
        "Tensor i_start",
        "Tensor j",
        "Tensor j_start",
        "Tensor? j_order",
        "Tensor k",
        "Tensor k_start",
        "Tensor? k_order",
    ],
    forward=cpu_message.forward,
    backward=cpu_message.backward,
    backward_backward=cpu_message.backward_backward,
    shape=lambda *inputs: _shape(Inputs(*inputs)),
)
_family.on_cuda(
    runtime.body("message", "forward", _message_torch.forward),
    runtime.body("message", "backward", adding(_message_torch.backward)),
    runtime.body("message_second", "backward_backward", _message_torch.backward_backward),
)


def _shape(m: Inputs) -> Tensor:
    return m.p.new_empty(len(m.i) if m.w is None else len(m.p), m.width)
