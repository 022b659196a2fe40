"""Energy of each atom from its features: LayerNorm and a multilayer perceptron.

With features v[A, D] (without norm n = v, and L below is the identity) and hidden layers 1 to K,

    x = (v - mean v) / std v       n = g x + c                   [A, D]
    h_k = W_k s_{k-1} + b_k        s_k = SiLU(h_k)               [A, width of k], s_0 = n
    y = w s_K + b                                                [A]

An atom's energy is one number, so that its derivative by the features is J[A, D], one row each, whatever
its gradient will be. It comes with y where features have derivatives (S is SiLU):

    r_K = w,  q_k = S'(h_k) r_k,  r_{k-1} = W_k^T q_k,  J = L(g r_0)
    L(u) = (u - mean u - x mean(u x)) / std v, symmetric

VJP, with a gradient G of y:  dv = G J, which is differentiated as the product that it is. So a derivative
of dv is one of J, and one backward pass serves both outputs. It takes a gradient U of J as a direction:
<U, J> is the tangent w s'_K of y along U, with

    n' = g L(U),  h'_k = W_k s'_{k-1},  s'_k = S'(h_k) h'_k,  s'_0 = n'

and the gradients of <G, y> + <U, J>, marked by ~, are

    s~_K = G w,   h~_k = S'(h_k) s~_k + S''(h_k) h'_k r_k,   s~_{k-1} = W_k^T h~_k,   n~ = s~_0
    w~ = sum of G s_K + s'_K       b~ = sum of G
    W~_k = sum of h~_k s_{k-1}^T + q_k s'_{k-1}^T,   b~_k = sum of h~_k
    g~ = sum of x n~ + L(U) r_0    c~ = sum of n~
    v~ = L(g n~) - (x mean(q_0 L(U)) + mean(U x) J + mean(q_0 x) L(U)) / std v,   q_0 = g r_0

Saved: the inputs and J. What this gives has no further derivative: asking for one raises. This is not a
`Family`: with J known, the derivative that makes forces is one product, and the second derivative and the
derivative by parameters share a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastchgnet.ops import _readout_torch
from fastchgnet.ops._readout_torch import EPS
from fastchgnet.ops.derivatives import feature_derivatives_only
from fastchgnet.ops.gpu import runtime
from fastchgnet.ops.packing import packed


def readout(atom_AD: Tensor, norm: nn.Module, layers: nn.Sequential) -> Tensor:
    """Energy of each atom, [A].

    Args:
        atom_AD: features.
        norm: a LayerNorm, or anything without parameters where there is no norm.
        layers: linear layers, the last one of width one, with SiLU between.
    """
    if not runtime.serves(atom_AD):
        # where launches cost little, computing again what autograd would have saved does not pay
        return layers(norm(atom_AD)).squeeze(1)
    return fused_readout(atom_AD, *pack(norm, layers))


def pack(norm: nn.Module, layers: Iterable[nn.Module]) -> tuple[Tensor, list[int], bool]:
    """Return what `fused_readout` takes behind the features, with all parameters in one tensor."""
    parameters = [p for module in (norm, *layers) for p in module.parameters(recurse=False)]
    *hidden, _ = (layer for layer in layers if isinstance(layer, nn.Linear))
    return packed(parameters), [layer.out_features for layer in hidden], isinstance(norm, nn.LayerNorm)


def fused_readout(atom_AD: Tensor, parameters: Tensor, widths: Sequence[int], has_norm: bool) -> Tensor:
    """Energy of each atom, [A].

    Args:
        atom_AD: features.
        parameters: all of them behind each other: scale and shift of the norm, if there is one, then weight
            [out, in] and bias of each linear layer.
        widths: of the hidden layers.
        has_norm: whether there is a LayerNorm.
    """
    with_slope = atom_AD.requires_grad and torch.is_grad_enabled()
    y, _ = _readout(atom_AD, parameters, widths, has_norm, with_slope)
    return y


def reference(atom_AD: Tensor, parameters: Tensor, widths: Sequence[int], has_norm: bool) -> Tensor:
    """Compute the op in plain PyTorch, differentiable to any order."""
    net = _readout_torch.network(parameters, atom_AD.shape[1], widths, has_norm)
    s = F.layer_norm(atom_AD, atom_AD.shape[1:], net.scale, net.shift, EPS) if has_norm else atom_AD
    for weight, bias in net.hidden:
        s = F.silu(F.linear(s, weight, bias))
    return F.linear(s, net.weight[None], net.bias)[:, 0]


_INPUTS = "Tensor features, Tensor parameters, int[] widths, bool has_norm"
_readout = torch.library.custom_op(
    "fastchgnet::readout",
    _readout_torch.forward,
    mutates_args=(),
    schema=f"({_INPUTS}, bool with_slope) -> (Tensor, Tensor)",
)
_readout_backward = torch.library.custom_op(
    "fastchgnet::readout_backward",
    _readout_torch.backward,
    mutates_args=(),
    schema=f"(bool with_parameters, Tensor? by_y, Tensor? by_slope, {_INPUTS}) -> (Tensor, Tensor)",
)
_readout.register_kernel("cuda")(runtime.body("readout", "forward", _readout_torch.forward))
_readout_backward.register_kernel("cuda")(runtime.body("readout", "backward", _readout_torch.backward))


@_readout.register_fake
def _(
    features: Tensor, parameters: Tensor, widths: Sequence[int], has_norm: bool, with_slope: bool
) -> tuple[Tensor, Tensor]:
    return features.new_empty(len(features)), features.new_empty(features.shape if with_slope else 0)


@_readout_backward.register_fake
def _(
    with_parameters: bool,
    by_y: Tensor | None,
    by_slope: Tensor | None,
    features: Tensor,
    parameters: Tensor,
    widths: Sequence[int],
    has_norm: bool,
) -> tuple[Tensor, Tensor]:
    by_features = features.new_empty(0 if by_slope is None else features.shape)
    return by_features, parameters.new_empty(parameters.shape if with_parameters else 0)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    features, parameters, ctx.widths, ctx.has_norm, _ = inputs
    ctx.save_for_backward(features, parameters, output[1])
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, by_y: Tensor | None, by_slope: Tensor | None) -> tuple[Tensor | None, ...]:
    if by_y is None and by_slope is None:
        return (None,) * 5
    features, parameters, slope = ctx.saved_tensors
    needs_features, needs_parameters, *_ = ctx.needs_input_grad
    with_parameters = needs_parameters and not feature_derivatives_only()
    by_features: Tensor | None = None
    by_parameters: Tensor | None = None
    if with_parameters or by_slope is not None:
        grads = [None if grad is None else grad.contiguous() for grad in (by_y, by_slope)]
        by_features, by_parameters = _readout_backward(
            with_parameters, *grads, features, parameters, ctx.widths, ctx.has_norm
        )
    if by_slope is None and by_y is not None:
        by_features = by_y[:, None] * slope if needs_features else None
    return by_features, by_parameters if with_parameters else None, None, None, None


_readout.register_autograd(_derivative, setup_context=_save)
