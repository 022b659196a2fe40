"""Parameters behind each other in memory, and what ops make of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crystals import crystals, potential
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastchgnet.config import ModelConfig
from fastchgnet.flat import flatten
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.ops.packing import packed
from fastchgnet.potential import Potential

CONFIGS = [
    ModelConfig(),
    ModelConfig(readout="direct"),
    ModelConfig(output_bias=True, norm=False),
    ModelConfig(interaction="parallel"),
]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in ((2, 64), (64,), (3,))]


def test_what_lies_side_by_side_is_not_copied() -> None:
    given = parameters()
    apart = packed(given)
    buffer = flatten(given)
    together = packed(given)
    assert together.data_ptr() == buffer.data_ptr() and apart.data_ptr() != given[0].data_ptr()
    assert torch.equal(apart, together)
    with torch.no_grad():
        assert packed(given).data_ptr() == buffer.data_ptr()
    # not in this order, not behind each other, or not in rows
    for others in (given[::-1], given[::2], [given[0].t(), given[1]]):
        copied = packed(others)
        assert copied.data_ptr() != others[0].data_ptr()
        assert torch.equal(copied, torch.cat([t.flatten() for t in others]))


@pytest.mark.parametrize("prepare", [lambda given: None, flatten])
def test_every_parameter_has_its_part_of_the_gradient(prepare: Callable) -> None:
    given = parameters()
    prepare(given)
    assert torch.autograd.gradcheck(lambda *tensors: packed(tensors).square(), given)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_order_of_use_has_every_parameter_once(config: ModelConfig) -> None:
    made = potential(config, torch.float32)
    ordered, named = made.in_order(), dict(made.named_parameters())
    assert sorted(ordered) == sorted(named) and all(ordered[name] is named[name] for name in named)


class Copies(TorchDispatchMode):
    """Note the sizes of what is put together by copying."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Tensor:
        made = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.cat.default and made.ndim == 1:
            self.sizes.append(made.numel())
        return made


@pytest.mark.parametrize("readout", ["conservative", "direct"])
@pytest.mark.parametrize("move", [lambda p: p, lambda p: p.double(), lambda p: p.double().float().eval()])
def test_ops_read_parameters_where_they_lie(readout: str, move: Callable[[Potential], Potential]) -> None:
    made = move(potential(ModelConfig(readout=readout), torch.float32))
    batch = made.build_graph(systems_from_atoms(crystals()[:1]))
    with Copies() as copies:
        made(batch)
    # four updates of bonds read the weight of an atom convolution too, which lies with those used first
    assert len(copies.sizes) == 4
