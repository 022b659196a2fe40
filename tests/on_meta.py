"""The meta device, where tensors have shapes and no numbers, for what the host must not wait for."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def assert_not_on_host(values: object, what: object) -> None:
    for tensor in tree_leaves(values):
        assert not isinstance(tensor, Tensor) or tensor.device.type == "meta", what


class OnOneDevice(TorchDispatchMode):
    """Refuses operations on tensors of the host: on a GPU the host would wait for them."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = self.apply(op, args, kwargs or {})
        assert_not_on_host((args, kwargs, found), op)
        return found

    def apply(self, op: Any, args: tuple, kwargs: dict) -> Any:
        return op(*args, **kwargs)
