"""Where the Triton bodies run, in which precision, and how their kernels are launched.

Nothing here imports Triton: modules of kernels are imported at the first call on CUDA, so that machines
without a GPU pay nothing. What the kernels themselves share is in `fastchgnet.ops.gpu.tiles`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import subprocess
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["tf32", "fp32"]
_precision: Precision = "fp32"
_given_up: set[str] = set()


@contextlib.contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Compute matrix products on edges and angles in tf32 or in fp32, on GPUs; sums are fp32 either way.

    fp32 is the default. Training asks for tf32, which rounds factors to 10 bits: 0.1 meV/atom and 0.2 meV/A,
    below any error of training, but too much for comparisons and for simulations that conserve energy.
    """
    global _precision
    before, _precision = _precision, name
    try:
        yield
    finally:
        _precision = before


def current_precision() -> Precision:
    """Return what matrix products are computed in."""
    return _precision


class KernelFailure(RuntimeError):
    """A kernel could not be compiled or started here."""


def body(
    module: str,
    name: str,
    otherwise: Callable[..., Any],
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> Callable[..., Any]:
    """Make the CUDA body of an op: the Triton function where it works, the PyTorch one elsewhere.

    Args:
        module: that holds the kernels, within `fastchgnet.ops.gpu`.
        name: of the Triton function there.
        otherwise: the PyTorch function of the same signature.
        dtypes: of the first tensor, which the kernels take.
    """

    def call(*args: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor))
        if first.dtype not in dtypes or module in _given_up or not _usable(first.device):
            return otherwise(*args)
        try:
            return getattr(importlib.import_module(f"fastchgnet.ops.gpu.{module}"), name)(*args)
        except KernelFailure as error:
            _given_up.add(module)
            _warn(str(error))
            return otherwise(*args)

    return call


def serves(tensor: Tensor) -> bool:
    """Tell whether kernels serve where a tensor is; tests have them serve on the CPU, too."""
    return tensor.is_cuda


def _usable(device: torch.device) -> bool:
    """Tell whether Triton can work here; the CPU is where its interpreter runs."""
    return device.type != "cuda" or _usable_gpu(device.index)


@functools.cache
def _usable_gpu(index: int) -> bool:
    cause = None
    if torch.version.cuda is None:
        cause = "the kernels are for NVIDIA GPUs"
    elif importlib.util.find_spec("triton") is None:
        cause = "Triton is not installed"
    elif torch.cuda.get_device_capability(index) < (8, 0):
        cause = (
            f"{torch.cuda.get_device_name(index)} is older than the kernels support (compute capability 8.0)"
        )
    if cause is not None:
        _warn(cause)
    return cause is None


def _warn(cause: str) -> None:
    warnings.warn(f"without fused GPU kernels, several times slower: {cause}", RuntimeWarning, stacklevel=2)


def launch(kernel: Any, grid: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Start as many programs of a kernel as `grid` says.

    Raises:
        KernelFailure: it cannot be compiled or started.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[(grid,)](*args, **options)
    except (RuntimeError, OSError, subprocess.SubprocessError, _triton_error()) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise KernelFailure(f"{kernel.__name__} does not compile or start: {cause[-1]}") from error


@functools.cache
def _triton_error() -> type[Exception]:
    return importlib.import_module("triton.errors").TritonError


def n_programs(n_tiles: int, device: torch.device, per_multiprocessor: int = 1) -> int:
    """Programs that share n tiles of rows: no more than run at once, so that each keeps its weights."""
    return max(1, min(n_tiles, per_multiprocessor * _n_multiprocessors(device)))


@functools.cache
def _n_multiprocessors(device: torch.device) -> int:
    # The interpreter takes two, so that tests have programs of several tiles.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
