"""chgnet's model: loading, counting and predicting structures in its units."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastchgnet.compat.checkpoint import potential_of, read_checkpoint
from fastchgnet.device import pick_device
from fastchgnet.errors import InputError
from fastchgnet.graph import Batch
from fastchgnet.model import Features
from fastchgnet.ops.segments import segment_sum
from fastchgnet.potential import Potential
from fastchgnet.prediction import Prediction, predict
from fastchgnet.published import PUBLISHED, load
from fastchgnet.units import GPA
from fastchgnet.weights import load_potential

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

logger = logging.getLogger(__name__)

Task = Literal["e", "ef", "em", "efs", "efsm"]
Answer = dict[str, NDArray[np.float32]]


def choose_device(use_device: str | None, check_cuda_mem: bool = False) -> torch.device:
    """Choose a device as chgnet does: the named one, that of CHGNET_DEVICE, a GPU, the CPU.

    Args:
        use_device: cpu, cuda, cuda:1, ...
        check_cuda_mem: take the GPU with most free memory, where no single one is named.

    Raises:
        InputError: this machine has no such device, or it lacks float64, as mps does.
    """
    name = use_device or os.environ.get("CHGNET_DEVICE") or "auto"
    if check_cuda_mem and name in ("auto", "cuda") and torch.cuda.is_available():
        free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
        name = f"cuda:{int(np.argmax(free))}"
    return pick_device(name)


class CHGNet(nn.Module):
    """A potential under chgnet's name and with its methods; made by `load`, `from_file` or `from_dict`.

    Args:
        potential: what does the work.
        version: of the published checkpoint: 0.2.0, 0.3.0 or r2scan.
        is_intensive: whether predicted energies are per atom.
    """

    def __init__(self, potential: Potential, version: str | None = None, is_intensive: bool = True) -> None:
        super().__init__()
        self.potential = potential
        self.version = version
        self.is_intensive = is_intensive

    @classmethod
    def load(
        cls,
        model_name: str = "0.3.0",
        use_device: str | None = None,
        check_cuda_mem: bool = False,
        verbose: bool = True,
    ) -> Self:
        """Load a published model: 0.3.0, 0.2.0 or r2scan.

        `verbose` logs where it runs, where chgnet prints it.

        Raises:
            InputError: an unknown name, a device that is not there, or weights that cannot be fetched.
        """
        if f"chgnet-{model_name}" not in PUBLISHED:
            names = ", ".join(name.removeprefix("chgnet-") for name in PUBLISHED)
            raise InputError(f"Unknown model_name={model_name!r}; published are {names}")
        device = choose_device(use_device, check_cuda_mem)
        if verbose:
            logger.info("CHGNet will run on %s", device)
        return cls(load(f"chgnet-{model_name}", str(device)), version=model_name)

    @classmethod
    def from_file(
        cls, path: str | Path, *, mlp_out_bias: bool | None = None, version: str | None = None
    ) -> Self:
        """Load a checkpoint of chgnet's trainer, running nothing in it, or a .safetensors file.

        Args:
            path: of the file.
            mlp_out_bias: whether convolutions have an output bias; the file knows, so this is only checked.
            version: to remember.

        Raises:
            InputError: no such file, a bad one, or an architecture that this network does not have.
        """
        if Path(path).suffix == ".safetensors":
            model = cls(load_potential(path), version)
        else:
            model = cls.from_dict(read_checkpoint(path), version=version, name=Path(path).name)
        found = model.potential.config.output_bias
        if mlp_out_bias not in (None, found):
            raise InputError(f"{path}: mlp_out_bias={mlp_out_bias}, but its convolutions say {found}")
        return model

    @classmethod
    def from_dict(cls, dct: Mapping[str, Any], *, version: str | None = None, name: str = "chgnet") -> Self:
        """Rebuild what chgnet's `as_dict` gives; the only way here for a model that chgnet holds in memory.

        Raises:
            InputError: an architecture that this network does not have, or no such model.
        """
        potential, arguments = potential_of(dct, name), dct["model_args"]
        return cls(potential, version or arguments.get("version"), arguments.get("is_intensive", True))

    @property
    def n_params(self) -> int:
        """Number of parameters as chgnet counts: with its last angle update, which no output depends on."""
        unused = self.potential.model.angle_updates[-1]
        return self.potential.n_parameters() + sum(parameter.numel() for parameter in unused.parameters())

    def predict_structure(
        self,
        structure: Structure | Atoms | Sequence[Structure | Atoms],
        *,
        task: Task = "efsm",
        return_site_energies: bool = False,
        return_atom_feas: bool = False,
        return_crystal_feas: bool = False,
        batch_size: int = 16,
    ) -> Answer | list[Answer]:
        """Predict one structure or several; one answer for a single one, as chgnet, else a list.

        An answer of n atoms holds what `task` asks for as float32: e, eV/atom (eV where the model is not
        intensive); f [n, 3], eV/A; s [3, 3], GPa, positive = tension; m [n], mu_B. On request
        site_energies [n], eV; atom_fea [n, 64], features before the last convolution; crystal_fea [64], the
        sum of those after it.

        Raises:
            InputError: an unknown task, no batch size, or a structure that is no crystal; see
                `fastchgnet.predict`.
        """
        if task not in get_args(Task):
            raise InputError(f"Invalid task={task!r}. Must be one of {get_args(Task)}")
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: must be at least 1")
        single = hasattr(structure, "lattice") or hasattr(structure, "get_atomic_numbers")
        structures: Any = [structure] if single or not isinstance(structure, Iterable) else list(structure)
        record = _Record([], [])
        asked = return_atom_feas or return_crystal_feas
        with record.of(self.potential) if asked else contextlib.nullcontext():
            predictions = predict(self.potential, structures, batch_size)
        answers = [self._answer(one, task, return_site_energies) for one in predictions]
        if return_atom_feas and answers:
            counts = [len(one.energies) for one in predictions]
            for answer, values in zip(answers, torch.cat(record.atom).split(counts), strict=True):
                answer["atom_fea"] = _plain(values)
        if return_crystal_feas and answers:
            for answer, values in zip(answers, torch.cat(record.crystal), strict=True):
                answer["crystal_fea"] = _plain(values)
        return answers[0] if len(answers) == 1 else answers

    def _answer(self, prediction: Prediction, task: Task, site_energies: bool) -> Answer:
        """One prediction in chgnet's keys, units and precision."""
        values = {
            "e": prediction.energy_per_atom if self.is_intensive else prediction.energy,
            "f": prediction.forces,
            "s": prediction.stress / GPA,
            "m": prediction.magmoms,
        }
        answer = {key: np.asarray(values[key], np.float32) for key in task}
        if site_energies:
            answer["site_energies"] = prediction.energies.astype(np.float32)
        return answer


class _Record:
    """Features that pass through a network, batch by batch."""

    def __init__(self, atom: list[Tensor], crystal: list[Tensor]) -> None:
        self.atom = atom  # [A, 64] each, before the last convolution
        self.crystal = crystal  # [S, 64] each, normed ones after it, summed

    @contextlib.contextmanager
    def of(self, potential: Potential) -> Iterator[None]:
        """Listen inside the block."""
        network = potential.model

        def at_end(_: nn.Module, arguments: tuple[Batch, *tuple[Any, ...]], features: Features) -> None:
            self.atom.append(features.atom_before_AD.detach())
            normed = network.readout_norm(features.atom_AD)
            self.crystal.append(segment_sum(normed, arguments[0].by_system).detach())

        handle = network.register_forward_hook(at_end)
        try:
            yield
        finally:
            handle.remove()


def _plain(values: Tensor) -> NDArray[np.float32]:
    """An array of its own on the host, in chgnet's precision."""
    return values.float().cpu().numpy().copy()
