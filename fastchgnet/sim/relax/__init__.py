"""Relaxation of many crystals at once."""

from fastchgnet.sim.relax.loop import Relaxation, relax, relax_each
from fastchgnet.sim.relax.result import Relaxed, Settings

__all__ = ["Relaxation", "Relaxed", "Settings", "relax", "relax_each"]
