"""chgnet and `fastchgnet.compat` under the same names, and crystals for both."""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ase import Atoms
from ase.build import bulk
from pymatgen.core import Lattice, Structure

from fastchgnet import compat


@contextlib.contextmanager
def as_chgnet_is() -> Iterator[None]:
    """Let chgnet print and warn, and its dependencies as well: none of it is ours."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def chgnet_package() -> SimpleNamespace:
    """Return what chgnet offers under the names of `fastchgnet.compat`; skip where it is absent."""
    pytest.importorskip("chgnet")
    with as_chgnet_is():
        import chgnet.model.dynamics as dynamics
        import chgnet.model.model as model
        import chgnet.utils as utils
    homes: list[ModuleType] = [dynamics, model, utils]
    return SimpleNamespace(**{name: value for home in homes for name, value in vars(home).items()})


@functools.cache
def their_model() -> Any:
    with as_chgnet_is():
        return chgnet_package().CHGNet.load(use_device="cpu")


@functools.cache
def our_model() -> compat.CHGNet:
    return compat.CHGNet.load(use_device="cpu")


def lithium_manganate() -> Structure:
    """Layered LiMnO2, 4 atoms, shaken."""
    layered = Structure.from_spacegroup(
        "R-3m", Lattice.hexagonal(2.88, 14.3), ["Li", "Mn", "O"], [[0, 0, 0.5], [0, 0, 0], [0, 0, 0.26]]
    )
    structure = layered.get_primitive_structure()
    return structure.perturb(0.05, seed=1)


def rock_salt(n: int = 1) -> Atoms:
    """Return an orthogonal, shaken crystal, upper triangular already; 8 atoms."""
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True) * (n, 1, 1)
    atoms.rattle(0.05, seed=3)
    return atoms
