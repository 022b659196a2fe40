"""chgnet's ASE calculator."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self, get_args

from ase import Atoms
from ase.calculators.calculator import all_changes

from fastchgnet.compat.model import CHGNet, Task, choose_device
from fastchgnet.errors import InputError
from fastchgnet.neighbors import find_pairs, systems_from_atoms
from fastchgnet.sim.calculator import FastCHGNetCalculator
from fastchgnet.units import GPA

OnIsolatedAtoms = Literal["ignore", "warn", "error"]


class CHGNetCalculator(FastCHGNetCalculator):
    """Our calculator with chgnet's arguments; like chgnet's it always computes everything.

    Args:
        model: None for the published 0.3.0. It is moved to the device.
        use_device: cpu, cuda, ...; without one, CHGNET_DEVICE, a GPU or the CPU.
        check_cuda_mem: take the GPU with most free memory.
        stress_weight: what multiplies the stress in GPa to give the calculator's.
        on_isolated_atoms: what to do about atoms without neighbours, whose energy is a constant.
        return_site_energies: accepted for chgnet's scripts; energies of sites are always there.
    """

    def __init__(
        self,
        model: CHGNet | None = None,
        *,
        use_device: str | None = None,
        check_cuda_mem: bool = False,
        stress_weight: float = GPA,
        on_isolated_atoms: OnIsolatedAtoms = "warn",
        return_site_energies: bool = False,
    ) -> None:
        if on_isolated_atoms not in ("ignore", "warn", "error"):
            raise InputError(f"on_isolated_atoms={on_isolated_atoms!r}: choose ignore, warn or error")
        device = choose_device(use_device, check_cuda_mem)
        self.model = CHGNet.load(use_device=str(device)) if model is None else _ours(model).to(device)
        super().__init__(self.model.potential)
        self.device = str(device)
        self.stress_weight = stress_weight
        self.on_isolated_atoms = on_isolated_atoms
        self.return_site_energies = return_site_energies

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        use_device: str | None = None,
        *,
        check_cuda_mem: bool = False,
        stress_weight: float = GPA,
        on_isolated_atoms: OnIsolatedAtoms = "warn",
        return_site_energies: bool = False,
    ) -> Self:
        """Make a calculator of a checkpoint; see `CHGNet.from_file`."""
        return cls(
            CHGNet.from_file(path),
            use_device=use_device,
            check_cuda_mem=check_cuda_mem,
            stress_weight=stress_weight,
            on_isolated_atoms=on_isolated_atoms,
            return_site_energies=return_site_energies,
        )

    @property
    def version(self) -> str | None:
        """Version of the published model."""
        return self.model.version

    @property
    def n_params(self) -> int:
        """Number of parameters, as chgnet counts."""
        return self.model.n_params

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] | None = None,
        system_changes: Sequence[str] | None = None,
        task: Task = "efsm",
    ) -> None:
        """Compute what `task` names, by default everything, whatever `properties` asks for.

        chgnet does so, and its scripts read magnetic moments from trajectories, which hold what happened
        to be computed.

        Raises:
            InputError: an unknown task, or atoms that no crystal has.
        """
        if task not in get_args(Task):
            raise InputError(f"Invalid task={task!r}. Must be one of {get_args(Task)}")
        atoms = atoms if atoms is not None else self.atoms
        assert atoms is not None
        wanted = ["energy", "forces"] if "f" in task else ["energy"]  # all else comes along
        with self._isolated_atoms(atoms):
            super().calculate(atoms, wanted, all_changes if system_changes is None else system_changes)
        if "f" in task and "stress" in self.results:
            self.results["stress"] = self.results["stress"] * (self.stress_weight / GPA)

    @contextlib.contextmanager
    def _isolated_atoms(self, atoms: Atoms) -> Iterator[None]:
        """Treat atoms without neighbours as asked."""
        if self.on_isolated_atoms == "error":
            cutoff = self.potential.config.atom_cutoff
            (pairs,) = find_pairs(systems_from_atoms([atoms]), cutoff)
            n_isolated = len(atoms) - len({*pairs.center.tolist(), *pairs.neighbor.tolist()})
            if n_isolated:
                raise InputError(f"{n_isolated} isolated atom(s): no neighbour within {cutoff:g} A")
        if self.on_isolated_atoms != "ignore":
            yield  # not in catch_warnings: it makes Python forget which warnings it has shown
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="some atoms have no neighbour")
            yield


def _ours(model: CHGNet) -> CHGNet:
    """Refuse a model of another package where one of ours is needed."""
    if not isinstance(model, CHGNet):
        raise InputError(
            f"model is a {type(model).__module__}.{type(model).__name__}; fastchgnet.compat takes its own: "
            "CHGNet.load(...), CHGNet.from_file(...), or CHGNet.from_dict(model.as_dict()) for one of chgnet"
        )
    return model
