"""Where tensors live, and how torch works while our functions run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from fastchgnet.errors import InputError, first_line

P = ParamSpec("P")
R = TypeVar("R")

_default_dtype = threading.Lock()


def own_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what users call, so that their default device, autocast and inference mode do not hold in it.

    Tensors are made on the host unless we say where, networks run in their own precision, and tensors have
    derivatives. Whether gradients are recorded stays as it is.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if _is_as_torch_starts():
            return function(*args, **kwargs)
        records = torch.is_grad_enabled()
        with (
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.inference_mode(False),
            torch.set_grad_enabled(records),
        ):
            return function(*args, **kwargs)

    return run


def _is_as_torch_starts() -> bool:
    return not (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
        or torch.get_default_device().type != "cpu"
    )


@contextmanager
def single_precision() -> Iterator[None]:
    """Make networks in float32, whatever torch's default is; all threads share it, so they take turns."""
    with _default_dtype:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is a GPU where there is one.

    Raises:
        InputError: this machine, or this build of torch, has no such device, or it lacks float64, in
            which energies are summed.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        number = torch.zeros(1, dtype=torch.float64, device=name)
        number.cpu()  # the device "meta" holds no numbers
        return number.device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {name} cannot be used ({first_line(error)})") from error
