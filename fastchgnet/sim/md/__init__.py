"""Molecular dynamics of many crystals at once."""

from fastchgnet.sim.md.ensemble import Settings
from fastchgnet.sim.md.loop import Lost, MolecularDynamics, Snapshot

__all__ = ["Lost", "MolecularDynamics", "Settings", "Snapshot"]
