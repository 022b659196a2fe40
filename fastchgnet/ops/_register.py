"""Make one differentiable op from three functions: forward, its VJP, and the VJP of that VJP.

Each becomes a `torch.library.custom_op` of its own, chained by `register_autograd`: whatever autograd
cannot see raises instead of training wrong. The functions given are the default on every device; a Triton
body takes over on CUDA through `Family.on_cuda`. The third derivative does not exist and raises, and so
does the derivative of a parameter's gradient: a loss on forces needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_Function = Callable[..., Any]
_feature_derivatives_only = False


@contextmanager
def feature_derivatives() -> Iterator[None]:
    """Leave parameters out of the derivatives taken inside: forces are derivatives by positions alone.

    Autograd asks an op for all its derivatives at once. This spares the ones of the parameters, a third of
    the work; parameters get no gradient from a derivative taken inside.
    """
    # One flag for the process and not for the thread: backward passes on a GPU run in a thread of their own.
    global _feature_derivatives_only
    before, _feature_derivatives_only = _feature_derivatives_only, True
    try:
        yield
    finally:
        _feature_derivatives_only = before


class Family:
    """One differentiable op.

    Args:
        name: what it is called in torch.ops.fastchgnet.
        features: schemas of the inputs it is twice differentiable by, such as "Tensor x" or "Tensor? x".
        parameters: schemas of the tensors it is differentiable by.
        constants: schemas of the rest.
        forward: (*inputs) -> output.
        backward: (with_parameters, grad, *inputs) -> one gradient for each feature and, if asked,
            parameter; None for those that are None.
        backward_backward: (cotangents, grad, *inputs), cotangents of the features' gradients, None where
            zero -> gradients of grad, of each feature and of each parameter.
        shape: (*inputs) -> an empty output, for tracing.
    """

    def __init__(
        self,
        name: str,
        features: Sequence[str],
        parameters: Sequence[str],
        constants: Sequence[str],
        forward: _Function,
        backward: _Function,
        backward_backward: _Function,
        shape: _Function,
    ) -> None:
        """Register the three ops."""
        self.n_features = len(features)
        self.n_derivatives = len(features) + len(parameters)
        inputs = ", ".join([*features, *parameters, *constants])
        cotangents = ", ".join(f"Tensor? u{n}" for n in range(self.n_features))
        self._bodies = {"": forward, "_backward": backward, "_backward_backward": backward_backward}
        self.forward = _op(name, f"({inputs}) -> Tensor", forward)
        self.backward = _op(
            f"{name}_backward",
            f"(bool with_parameters, Tensor grad, {inputs}) -> {_tensors(self.n_derivatives)}",
            lambda with_parameters, grad, *given: self._filled(
                backward(with_parameters, grad, *given), grad, self.n_derivatives
            ),
        )
        self.backward_backward = _op(
            f"{name}_backward_backward",
            f"({cotangents}, Tensor grad, {inputs}) -> {_tensors(1 + self.n_derivatives)}",
            lambda *given: self._filled(
                self._second(backward_backward, given), given[self.n_features], 1 + self.n_derivatives
            ),
        )
        self._register_shapes(shape)
        self.forward.register_autograd(self._autograd, setup_context=_save)
        self.backward.register_autograd(self._autograd_of_backward, setup_context=_save)

    def __call__(self, *inputs: Any) -> Tensor:
        """Apply the op."""
        return self.forward(*inputs)

    def on_cuda(self, forward: _Function, backward: _Function, backward_backward: _Function) -> None:
        """Use other bodies, of the same signatures, for tensors on CUDA."""
        self.forward.register_kernel("cuda")(forward)
        self.backward.register_kernel("cuda")(
            lambda with_parameters, grad, *given: self._filled(
                backward(with_parameters, grad, *given), grad, self.n_derivatives
            )
        )
        self.backward_backward.register_kernel("cuda")(
            lambda *given: self._filled(
                self._second(backward_backward, given), given[self.n_features], 1 + self.n_derivatives
            )
        )

    def _second(self, body: _Function, given: tuple) -> Any:
        return body(given[: self.n_features], *given[self.n_features :])

    @staticmethod
    def _filled(found: Sequence[Tensor | None], like: Tensor, n: int) -> tuple[Tensor, ...]:
        """Library ops return tensors only: stand in for None with an empty one."""
        absent = [None] * (n - len(found))
        return tuple(like.new_empty(0) if t is None else t for t in [*found, *absent])

    def _register_shapes(self, shape: _Function) -> None:
        def backward(with_parameters: bool, grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
            n = self.n_derivatives if with_parameters else self.n_features
            found = [None if t is None else torch.empty_like(t) for t in inputs[:n]]
            return self._filled(found, grad, self.n_derivatives)

        def second(*given: Any) -> tuple[Tensor, ...]:
            inputs = given[self.n_features : self.n_features + 1 + self.n_derivatives]
            found = [None if t is None else torch.empty_like(t) for t in inputs]
            return self._filled(found, inputs[0], 1 + self.n_derivatives)

        self.forward.register_fake(shape)
        self.backward.register_fake(backward)
        self.backward_backward.register_fake(second)

    def _autograd(self, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = _saved(ctx)
        needed = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(inputs)
        with_parameters = not _feature_derivatives_only and any(needed[self.n_features : self.n_derivatives])
        found = self.backward(with_parameters, grad.contiguous(), *inputs)
        return self._wanted(found, inputs, needed, self.n_derivatives if with_parameters else self.n_features)

    def _autograd_of_backward(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(u is not None and u.numel() for u in cotangents[self.n_features :]):
            raise NotImplementedError("the gradient of a parameter has no derivative")
        _, *saved = _saved(ctx)
        features = [None if u is None else u.contiguous() for u in cotangents[: self.n_features]]
        if all(u is None for u in features):
            return (None,) * (len(saved) + 1)
        found = self.backward_backward(*features, *saved)
        return (None, *self._wanted(found, saved, ctx.needs_input_grad[1:], 1 + self.n_derivatives))

    @staticmethod
    def _wanted(
        found: Sequence[Tensor], inputs: Sequence[Any], needed: Sequence[bool], n: int
    ) -> tuple[Tensor | None, ...]:
        chosen = [
            found[k] if k < n and inputs[k] is not None and needed[k] else None for k in range(len(inputs))
        ]
        return tuple(chosen)


def _op(name: str, schema: str, body: _Function) -> Any:
    return torch.library.custom_op(f"fastchgnet::{name}", body, mutates_args=(), schema=schema)


def _tensors(n: int) -> str:
    return "(" + ", ".join(["Tensor"] * n) + ")"


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    """Keep every input: what is in between is computed again."""
    is_tensor = [t is None or isinstance(t, Tensor) for t in inputs]
    ctx.save_for_backward(*(t for t, kept in zip(inputs, is_tensor, strict=True) if kept))
    ctx.constants = [None if kept else t for t, kept in zip(inputs, is_tensor, strict=True)]
    ctx.is_tensor = is_tensor
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [
        next(tensors) if kept else constant
        for kept, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
    ]
