"""Where tensors live."""

from __future__ import annotations

import torch
from torch import Tensor

from fastchgnet.errors import InputError, first_line


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


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Send a tensor of the host to a device without waiting for it to arrive."""
    kind = torch.device(device).type
    if kind == "cuda":
        tensor = tensor.pin_memory()
    # towards the host nobody would wait, and the values could be read before they arrive
    return tensor.to(device, non_blocking=kind != "cpu")
