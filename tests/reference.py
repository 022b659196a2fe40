"""The published chgnet package as the judge: one structure at a time, in float64 or as it is.

In float64 its remaining error is rounding alone. chgnet fixes float32 in three constants, in torch's
default dtype and in `AtomRef`; `double_precision` replaces all of them and puts them back.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.units import GPa
from torch import Tensor, nn


class Reference(NamedTuple):
    """What chgnet computes for one crystal, in our units and signs."""

    energy: Tensor  # [] total, eV
    forces: Tensor  # [n, 3] eV/A
    stress: Tensor  # [3, 3] eV/A^3
    magmoms: Tensor  # [n] mu_B
    site_energies: Tensor  # [n] eV


def chgnet_modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    """Import chgnet's modules that fix a dtype (converter, crystalgraph, model); skip where absent."""
    pytest.importorskip("chgnet")
    with warnings.catch_warnings():
        # Its imports warn of deprecations that are not ours.
        warnings.simplefilter("ignore")
        import chgnet.graph.converter as converter
        import chgnet.graph.crystalgraph as crystalgraph
        import chgnet.model.model as model
    return converter, crystalgraph, model


def _composition(self: nn.Module, graphs: list) -> Tensor:
    """AtomRef's fractions of the elements, without its conversion to float32."""
    counts = [torch.bincount(graph.atomic_number - 1, minlength=self.max_num_elements) for graph in graphs]
    return torch.stack([count / count.sum() for count in counts])


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Let chgnet compute in float64 inside the block."""
    from chgnet.model.composition_model import AtomRef

    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        for module in chgnet_modules():
            stack.enter_context(patch.object(module, "TORCH_DTYPE", torch.float64))
        stack.enter_context(patch.object(AtomRef, "_assemble_graphs", _composition))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


class Chgnet:
    """A published chgnet model that takes ASE atoms and answers in our units."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        """Load the model called `name` in our terms, such as chgnet-0.3.0."""
        _, _, module = chgnet_modules()
        # It prints what it constructs.
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = module.CHGNet.load(
                model_name=name.removeprefix("chgnet-"), use_device="cpu", verbose=False
            ).to(dtype)
        self.model.graph_converter.set_isolated_atom_response("ignore")
        self._precision = double_precision if dtype == torch.float64 else contextlib.nullcontext

    def __call__(self, atoms: Atoms) -> Reference:
        """Compute one crystal; every quantity carries its graph, for gradients."""
        with self._precision(), warnings.catch_warnings():
            # pymatgen's and torch's warnings on the way are not ours.
            warnings.simplefilter("ignore")
            graph = self.model.graph_converter(_structure(atoms))
            answer = self.model([graph], task="efsm", return_site_energies=True)
        # Its volume is signed, so a left-handed cell turns its stress round.
        handedness = float(np.sign(np.linalg.det(atoms.cell.array)))
        return Reference(
            energy=answer["e"][0] * len(atoms),
            forces=answer["f"][0],
            stress=answer["s"][0] * GPa * handedness,
            magmoms=answer["m"][0],
            site_energies=answer["site_energies"][0],
        )


def _structure(atoms: Atoms) -> object:
    from pymatgen.core import Structure

    return Structure(
        atoms.cell.array, atoms.get_chemical_symbols(), atoms.positions, coords_are_cartesian=True
    )
