"""CHGNet interatomic potentials: train, fine-tune and run them, fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastchgnet.prediction import Prediction, predict
    from fastchgnet.published import load
    from fastchgnet.sim.calculator import FastCHGNetCalculator
    from fastchgnet.sim.md import MolecularDynamics
    from fastchgnet.sim.relax import relax

__version__ = "0.1.0"
__all__ = ["FastCHGNetCalculator", "MolecularDynamics", "Prediction", "load", "predict", "relax"]

_HOMES = {
    "FastCHGNetCalculator": "fastchgnet.sim.calculator",
    "MolecularDynamics": "fastchgnet.sim.md",
    "Prediction": "fastchgnet.prediction",
    "load": "fastchgnet.published",
    "predict": "fastchgnet.prediction",
    "relax": "fastchgnet.sim.relax",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `fastchgnet --help` does not wait for PyTorch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
