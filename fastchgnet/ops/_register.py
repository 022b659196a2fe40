"""Make one differentiable op from three functions: forward, its VJP, and the VJP of that VJP.

Each becomes a library op of its own, chained by their derivatives: whatever autograd cannot see raises
instead of training wrong. The functions given are the default on every device; a Triton body takes over on
CUDA through `Family.on_cuda`. The third derivative does not exist and raises, and so does the derivative of
a parameter's gradient: a loss on forces needs neither.

A loss on forces depends on each input twice, through the output and through the derivative that made the
forces. So the op returns its inputs beside its output, and its derivative reads these: what comes back to
them is handed to the VJP, which adds its own to it, in one kernel where the body can do that. Whoever reads
an input next may read what came out as well (`Shared`), and has its gradient added up on the way, too.

They are defined with `torch.library.Library` and not with `torch.library.custom_op`, whose checks at every
call take a tenth of the time of evaluating a small crystal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import compress, zip_longest
from typing import Any

import torch
from torch import Tensor

from fastchgnet.ops.derivatives import feature_derivatives_only, parameters_are_constant
from fastchgnet.ops.shared import Shared

_Function = Callable[..., Any]
_library = torch.library.Library("fastchgnet", "FRAGMENT")


class Family:
    """One differentiable op.

    The library op of the VJP takes more tensors, or None: `onto`, gradients that it adds its own to, one for
    each feature and parameter, and one more for each feature from the next reader. To bodies they are a tuple
    of tensors for each feature and parameter, often an empty one.

    Args:
        name: what it is called in torch.ops.fastchgnet.
        features: schemas of the inputs it is twice differentiable by, such as "Tensor x" or "Tensor? x".
        parameters: schemas of the tensors it is differentiable by.
        constants: schemas of the rest.
        forward: (*inputs) -> output.
        backward: (onto, with_parameters, grad, *inputs) -> one gradient for each feature and, if asked,
            parameter; None for those that are None or have none. See `adding`.
        backward_backward: (cotangents, grad, *inputs), cotangents of the features' gradients, None where
            zero -> gradients of grad, of each feature and of each parameter.
        shape: (*inputs) -> an empty output, for tracing.
        n_outputs: how many tensors forward returns, at most. Where that is more than one, they come as a
            tuple, None and the last ones missing where there are fewer, which callers see as empty tensors;
            grad is a tuple too, with None for an output that nothing depends on, and backward_backward
            returns as many gradients of grad.
        vanishes: (*inputs) -> numbers of the features and parameters that the VJP is constant in, for which
            backward_backward returns None.
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
        n_outputs: int = 1,
        vanishes: Callable[..., Sequence[int]] = lambda *inputs: (),
    ) -> None:
        """Register the three ops."""
        self.n_features = len(features)
        self.n_derivatives = len(features) + len(parameters)
        self.n_outputs, self.vanishes = n_outputs, vanishes
        inputs = ", ".join([*features, *parameters, *constants])
        cotangents = ", ".join(f"Tensor? u{n}" for n in range(self.n_features))
        optional = "" if n_outputs == 1 else "?"
        grads = ", ".join(f"Tensor{optional} grad{n}" for n in range(n_outputs))
        self.names = name, f"{name}_backward", f"{name}_backward_backward"
        n = self.n_derivatives
        self.n_onto = n + self.n_features
        onto = ", ".join(f"Tensor? onto{k}" for k in range(self.n_onto))
        schema = f"({inputs}) -> {_tensors(n_outputs)}"
        self._op = _defined(name, schema, self._derivative, n_passed=n, n_features=self.n_features)
        self.forward = self._op.call
        self.backward = _defined(
            f"{name}_backward",
            f"(bool with_parameters, {grads}, {inputs}, {onto}) -> {_tensors(n)}",
            self._derivative_of_backward,
            n_forgotten=self.n_onto,
        ).call
        self.backward_backward = define(
            f"{name}_backward_backward",
            f"({cotangents}, {grads}, {inputs}) -> {_tensors(n_outputs + n)}",
            no_derivative,
        )
        self._register("CompositeExplicitAutograd", forward, backward, backward_backward)
        self._register_shapes(shape)

    def __call__(self, *inputs: Any) -> Any:
        """Apply the op."""
        return self.forward(*inputs)

    def read(self, *inputs: Any) -> Any:
        """Apply the op to inputs of which some are `Shared` with ops that have yet to read them."""
        given = [one.tensor if isinstance(one, Shared) else one for one in inputs]
        if not torch.is_grad_enabled():
            return self.forward(*given)
        shared = {n: one for n, one in enumerate(inputs) if isinstance(one, Shared)}
        outputs, passed = self._op.apply(given, list(shared))
        for one, tensor in zip(shared.values(), passed, strict=True):
            one.tensor = tensor
        return outputs

    def on_cuda(self, forward: _Function, backward: _Function, backward_backward: _Function) -> None:
        """Use other bodies, of the same signatures, for tensors on CUDA."""
        self._register("CUDA", forward, backward, backward_backward)

    def _register(self, key: str, forward: _Function, backward: _Function, second: _Function) -> None:
        bodies = self._zeroth(forward), self._first(backward), self._second(second)
        for name, body in zip(self.names, bodies, strict=True):
            _library.impl(name, body, key)

    def _zeroth(self, body: _Function) -> _Function:
        """Make a library op of a forward function."""
        if self.n_outputs == 1:
            return body
        return lambda *inputs: _filled(body(*inputs), self.n_outputs, inputs)

    def _first(self, body: _Function) -> _Function:
        """Make a library op of a backward function."""

        def call(with_parameters: bool, *given: Any) -> Any:
            grad, inputs = self._apart(given[: -self.n_onto])
            found = body(self._onto(given[-self.n_onto :]), with_parameters, grad, *inputs)
            return _filled(found, self.n_derivatives, inputs)

        return call

    def _onto(self, given: Sequence[Any]) -> list[tuple[Tensor, ...]]:
        """Sort what a derivative is to be added to by feature and parameter."""
        pairs = zip_longest(given[: self.n_derivatives], given[self.n_derivatives :])
        return [tuple(t for t in pair if t is not None) for pair in pairs]

    def _second(self, body: _Function) -> _Function:
        """Make a library op of a function that differentiates the backward one."""

        def call(*given: Any) -> Any:
            cotangents = given[: self.n_features]
            grad, inputs = self._apart(given[self.n_features :])
            return _filled(body(cotangents, grad, *inputs), self.n_outputs + self.n_derivatives, inputs)

        return call

    def _apart(self, given: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Tell gradients of the output, or of the outputs, from inputs."""
        grads, inputs = given[: self.n_outputs], given[self.n_outputs :]
        if self.n_outputs == 1:
            return grads[0], inputs
        # the gradient of an output that is not there is as empty as that
        return tuple(None if g is None or g.shape == (0,) else g for g in grads), inputs

    def _register_shapes(self, shape: _Function) -> None:
        def backward(onto: Any, with_parameters: bool, grad: Any, *inputs: Any) -> list[Tensor | None]:
            return _like(inputs[: self.n_derivatives if with_parameters else self.n_features])

        def second(cotangents: tuple, grad: Any, *inputs: Any) -> list[Tensor | None]:
            grads = grad if self.n_outputs > 1 else (grad,)
            none = self.vanishes(*inputs)
            by_inputs = [None if k in none else t for k, t in enumerate(inputs[: self.n_derivatives])]
            return _like((*grads, *by_inputs))

        shapes = self._zeroth(shape), self._first(backward), self._second(second)
        for name, body in zip(self.names, shapes, strict=True):
            shape_of(name, body)

    def _derivative(
        self, inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        grads, onto = grads[: self.n_outputs], grads[self.n_outputs :][: self.n_onto]
        if all(grad is None for grad in grads):
            alone = added([None] * self.n_derivatives, self._onto(onto))
            return (*alone, *[None] * (len(inputs) - len(alone)))
        with_parameters = not feature_derivatives_only() and any(needed[self.n_features : self.n_derivatives])
        n = self.n_derivatives if with_parameters else self.n_features
        unasked = [None] * (self.n_derivatives - n)
        onto = [*_contiguous(onto[:n]), *unasked, *_contiguous(onto[self.n_derivatives :])]
        # nothing differentiates a derivative that is taken without gradients
        below = nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
        with below:
            found = self.backward(with_parameters, *_contiguous(grads), *inputs, *onto)
        found = (found,) if self.n_derivatives == 1 else found
        return _wanted(found[:n], inputs, needed)

    def _derivative_of_backward(
        self, inputs: Sequence[Any], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        if any(u is not None and u.numel() for u in cotangents[self.n_features :]):
            raise NotImplementedError("the gradient of a parameter has no derivative")
        features = _contiguous(cotangents[: self.n_features])
        if all(u is None for u in features):
            return (None,) * len(inputs)
        n = len(inputs) - self.n_onto
        found = self.backward_backward(*features, *inputs[1:n])
        by_onto = (*cotangents, *cotangents[: self.n_features])
        onto = [u if need else None for u, need in zip(by_onto, needed[n:], strict=True)]
        return (None, *_wanted(found, inputs[1:n], needed[1:n]), *onto)


def adding(body: _Function) -> _Function:
    """Make a backward body of one that does not take `onto`."""

    def call(onto: Sequence[tuple[Tensor, ...]], *given: Any) -> list[Tensor | None]:
        return added(body(*given), onto)

    return call


def added(found: Sequence[Tensor | None], onto: Sequence[tuple[Tensor, ...]]) -> list[Tensor | None]:
    """Add to gradients, in place, those that they are to be added to."""
    sums = []
    for total, before in zip(found, onto, strict=False):
        for one in before:
            total = one.clone() if total is None else total.add_(one)
        sums.append(total)
    return sums


def no_derivative(*_: Any) -> Any:
    """Stand for the derivative of an op that has none."""
    raise NotImplementedError("autograd was asked for one derivative more than there is")


def define(name: str, schema: str, derivative: _Function) -> Any:
    """Define a library op.

    Args:
        name: what it is called in torch.ops.fastchgnet.
        schema: of its inputs and outputs.
        derivative: (inputs, which need a gradient, gradients of outputs) -> gradients of inputs or None.
    """
    return _defined(name, schema, derivative).call


def _defined(
    name: str,
    schema: str,
    derivative: _Function,
    n_passed: int = 0,
    n_features: int = 0,
    n_forgotten: int = 0,
) -> _Op:
    """Define a library op that passes its first inputs on, and whose derivative does not read the last ones.

    Features come first, then parameters, which are all that is passed on. The derivative is given gradients
    of the outputs and, where inputs are passed on, those of what it reads of these itself, and then those of
    what the next reader does.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = _Op(getattr(torch.ops.fastchgnet, name).default, derivative, n_passed, n_features, n_forgotten)

    def apply(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            return op.apply(inputs, ())[0]
        with torch._C._AutoDispatchBelowAutograd():
            return op.call(*inputs)

    _library.impl(name, apply, "Autograd")
    return op


def implement(name: str, body: _Function, on_cuda: _Function | None = None) -> None:
    """Give an op its body, and another one on CUDA."""
    _library.impl(name, body, "CompositeExplicitAutograd")
    if on_cuda is not None:
        _library.impl(name, on_cuda, "CUDA")


def shape_of(name: str, body: _Function) -> None:
    """Say what an op returns, for tracing: empty tensors."""
    torch.library.register_fake(f"fastchgnet::{name}", body, lib=_library)


class _Op:
    """A library op and what autograd needs to know of it."""

    def __init__(
        self, call: Any, derivative: _Function, n_passed: int, n_features: int, n_forgotten: int
    ) -> None:
        """Keep what `_defined` says."""
        arguments, self.n_outputs = call._schema.arguments, len(call._schema.returns)
        self.call, self.derivative = call, derivative
        self.n_passed, self.n_features = n_passed, n_features
        n_read = len(arguments) - n_forgotten
        self.is_saved = ["Tensor" in str(a.type) and k < n_read for k, a in enumerate(arguments)]

    def apply(self, inputs: Sequence[Any], shared: Sequence[int]) -> tuple[Any, Sequence[Tensor]]:
        """Apply the op in autograd's graph; return its outputs, and shared inputs for their next readers."""
        if parameters_are_constant():
            inputs = list(inputs)
            for k in range(self.n_features, self.n_passed):
                inputs[k] = None if inputs[k] is None else inputs[k].detach()
        made = _Differentiable.apply(self, shared, *inputs)
        passed = made[len(made) - len(shared) :]
        return made[0] if self.n_outputs == 1 else made[: self.n_outputs], passed


class _Differentiable(torch.autograd.Function):
    """A library op in autograd's graph. Keeps every input: what is in between is computed again."""

    @staticmethod
    def forward(ctx: Any, op: _Op, shared: Sequence[int], *inputs: Any) -> tuple[Tensor, ...]:
        given = list(inputs)
        ctx.own = []
        if not parameters_are_constant():
            passed = enumerate(given[: op.n_passed])
            ctx.own = [k for k, t in passed if isinstance(t, Tensor) and t.requires_grad]
        for k in ctx.own:
            given[k] = given[k].detach()  # the same numbers, as an output
        ctx.op, ctx.shared = op, shared
        ctx.save_for_backward(*compress(given, op.is_saved))
        ctx.constants = [None if isinstance(t, Tensor) else t for t in given]
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            made = op.call(*inputs)
        own = [given[k] for k in ctx.own]
        return (*((made,) if op.n_outputs == 1 else made), *own, *(inputs[k].detach() for k in shared))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        op, tensors = ctx.op, iter(ctx.saved_tensors)
        inputs = [
            next(tensors) if saved else constant
            for saved, constant in zip(op.is_saved, ctx.constants, strict=True)
        ]
        onto: list[Tensor | None] = [None] * (2 * op.n_passed)
        places = [*ctx.own, *(op.n_passed + k for k in ctx.shared)]
        for place, grad in zip(places, grads[op.n_outputs :], strict=True):
            onto[place] = grad
        return (None, None, *op.derivative(inputs, ctx.needs_input_grad[2:], (*grads[: op.n_outputs], *onto)))


def _tensors(n: int) -> str:
    return "Tensor" if n == 1 else "(" + ", ".join(["Tensor"] * n) + ")"


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _like(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else torch.empty_like(t) for t in tensors]


def _filled(found: Sequence[Tensor | None], n: int, inputs: Sequence[Any]) -> Any:
    """Library ops return a fixed number of tensors: empty ones stand in for what there is not."""
    if len(found) == n and all(t is not None for t in found):
        return found[0] if n == 1 else tuple(found)
    missing = [None] * (n - len(found))
    like = next(t for t in inputs if isinstance(t, Tensor))
    filled = tuple(like.new_empty(0) if t is None else t for t in [*found, *missing])
    return filled[0] if n == 1 else filled


def _wanted(
    found: Sequence[Tensor], inputs: Sequence[Any], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs that need one; None for the others."""
    wanted: list[Tensor | None] = [None] * len(inputs)
    for k, gradient in enumerate(found):
        # only the stand-in of what there is not: any other wrong shape is autograd's to refuse
        missing = inputs[k] is None or gradient.shape == (0,) != inputs[k].shape
        if needed[k] and not missing:
            wanted[k] = gradient
    return tuple(wanted)
