"""The names, arguments, keys and units of chgnet 0.4.2, so that its scripts run as they are.

Units here are chgnet's: energies of predictions in eV/atom, their stress in GPa. docs/from-chgnet.md says
what differs on purpose.
"""

from fastchgnet.compat.calculator import CHGNetCalculator
from fastchgnet.compat.charges import solve_charge_by_mag
from fastchgnet.compat.dynamics import MolecularDynamics
from fastchgnet.compat.eos import EquationOfState
from fastchgnet.compat.model import CHGNet
from fastchgnet.compat.relaxation import CrystalFeasObserver, StructOptimizer, TrajectoryObserver

__all__ = [
    "CHGNet",
    "CHGNetCalculator",
    "CrystalFeasObserver",
    "EquationOfState",
    "MolecularDynamics",
    "StructOptimizer",
    "TrajectoryObserver",
    "solve_charge_by_mag",
]
