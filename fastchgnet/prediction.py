"""Energies, forces, stress and magnetic moments of crystals, in batches of bounded size."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastchgnet.data.formats import scan_frames
from fastchgnet.data.frame import Frame
from fastchgnet.data.layout import printable
from fastchgnet.data.reading import ReadOptions
from fastchgnet.device import own_settings
from fastchgnet.errors import InputError
from fastchgnet.files import check_new, write_atomically
from fastchgnet.graph import Output, Systems
from fastchgnet.neighbors import graph_sizes, systems_from_atoms
from fastchgnet.potential import Potential
from fastchgnet.units import VOIGT

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

MAX_GRAPH = 150_000
"""Edges and angles in a batch, at most: about 2 GB in float32 (14 KB each, measured) with derivatives."""

GEOMETRY = ReadOptions(energy_key="", forces_key="", stress_key="", magmoms_key="")
"""How to read files of which only the geometry is wanted."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a potential says about one crystal of n atoms, and what its energy means."""

    energy: float  # total, eV
    forces: NDArray[np.floating]  # [n, 3] eV/A
    stress: NDArray[np.floating]  # [3, 3] eV/A^3, positive = tension; NaN unless periodic in three directions
    magmoms: NDArray[np.floating]  # [n] mu_B, magnitudes
    energies: NDArray[np.float64]  # [n] eV; their sum is `energy`
    functional: str
    energy_correction: str

    @property
    def energy_per_atom(self) -> float:
        """Energy per atom, eV."""
        return self.energy / len(self.energies)

    def as_dict(self) -> dict[str, Any]:
        """Give plain lists and numbers as JSON takes them; NaN becomes None."""
        return {
            "energy": self.energy,
            "energy_per_atom": self.energy_per_atom,
            "forces": _plain(self.forces),
            "stress": _plain(self.stress),
            "magmoms": _plain(self.magmoms),
            "energies": _plain(self.energies),
            "functional": self.functional,
            "energy_correction": self.energy_correction,
        }


@own_settings
def predict(
    potential: Potential, structures: Sequence[Atoms | Structure], batch_size: int = 64
) -> list[Prediction]:
    """Predict crystals, in their order.

    Args:
        potential: the model, on the device where it shall run.
        structures: ase Atoms or pymatgen Structures, of any size and periodicity.
        batch_size: structures in a batch, at most; large ones come fewer at a time.

    Raises:
        InputError: a structure is no crystal: empty, atoms at NaN or within 0.3 A of each other, an
            element above Z = 94, a periodic direction without volume. Names its index and the reason. Or
            the batch size is less than one.
    """
    if batch_size < 1:
        raise InputError(f"the batch size must be at least 1, not {batch_size}")
    systems = sound_systems(structures)
    return list(predict_systems(potential, systems, batch_size))


def sound_systems(structures: Sequence[Atoms | Structure]) -> Systems:
    """Concatenate structures; raise InputError where one is no crystal, as `predict` does."""
    systems = systems_from_atoms(structures)
    for index, reason in flaws(systems).items():
        raise InputError(f"structure {index}: {reason}")
    return systems


def flaws(systems: Systems) -> dict[int, str]:
    """Say why systems on the host are no crystals, by their index."""
    parts = zip(
        systems.atomic_number.split(systems.n_atoms),
        systems.position.split(systems.n_atoms),
        systems.cell,
        systems.pbc,
        strict=True,
    )
    frames = (
        Frame(
            numbers=numbers.numpy(),
            positions=positions.numpy(),
            cell=cell.numpy(),
            pbc=pbc.numpy(),
            source="",
            group="",
        )
        for numbers, positions, cell, pbc in parts
    )
    return {index: flaw for index, frame in enumerate(frames) if (flaw := frame.flaw())}


def predict_systems(
    potential: Potential,
    systems: Systems,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda n_systems: None,
) -> Iterator[Prediction]:
    """Yield predictions of systems on the host that are known to be sound; see `predict`.

    `progress` is called with the number of systems after each batch.
    """
    for start in range(0, systems.n_systems, batch_size):
        chunk = systems.subset(range(start, min(start + batch_size, systems.n_systems)))
        sizes = graph_sizes(chunk, potential.config.atom_cutoff, potential.config.bond_cutoff)
        for batch in pack(sizes, batch_size):
            selected = chunk.subset(range(batch.start, batch.stop))
            yield from _predictions(potential, selected, predict_batch(potential, selected))
            progress(selected.n_systems)


@dataclass(frozen=True, slots=True)
class Crystal:
    """A geometry read from a file."""

    file: str
    index: int  # of the frame in its file
    frame: Frame

    def as_atoms(self) -> Atoms:
        """Give the geometry as ASE takes it."""
        from ase import Atoms

        frame = self.frame
        return Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)


@dataclass(frozen=True, slots=True)
class FilePrediction:
    """A crystal of a file and its prediction."""

    crystal: Crystal
    prediction: Prediction

    @property
    def formula(self) -> str:
        """Composition in Hill's order."""
        return self.crystal.as_atoms().get_chemical_formula()

    def as_dict(self) -> dict[str, Any]:
        """Give what `fastchgnet predict --json` prints of a frame."""
        predicted = self.prediction.as_dict()
        keys = ("energy", "energy_per_atom", "forces", "stress", "magmoms")
        described = {"file": self.crystal.file, "index": self.crystal.index, "formula": self.formula}
        return described | {key: predicted[key] for key in keys}

    def as_atoms(self) -> Atoms:
        """Give the crystal and its prediction as ASE takes them."""
        from ase.calculators.singlepoint import SinglePointCalculator

        prediction, atoms = self.prediction, self.crystal.as_atoms()
        results = {
            "energy": prediction.energy,
            "energies": prediction.energies,
            "forces": prediction.forces,
            "magmoms": prediction.magmoms,
        }
        if atoms.pbc.all():
            results["stress"] = prediction.stress[VOIGT]
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info = {
            "file": self.crystal.file,
            "index": self.crystal.index,
            "functional": prediction.functional,
            "energy_correction": prediction.energy_correction,
        }
        return atoms


def read_crystals(paths: Iterable[Path]) -> tuple[list[Crystal], list[InputError]]:
    """Read the geometries of all frames of files; return the good ones, and why the others are not."""
    crystals, errors = [], []
    for path in paths:
        for index, item in enumerate(scan_frames(path, GEOMETRY, printable(path))):
            if isinstance(item, InputError):
                errors.append(item)
                continue
            # A file may hold labels, good or bad: they do not matter here.
            frame = replace(item, energy=math.nan, forces=None, stress=None, magmoms=None)
            try:
                frame.check()
            except InputError as error:
                errors.append(error)
            else:
                crystals.append(Crystal(printable(path), index, frame))
    return crystals, errors


def predict_crystals(
    potential: Potential,
    crystals: Sequence[Crystal],
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda n_systems: None,
) -> tuple[list[FilePrediction], list[InputError]]:
    """Predict geometries read from files; return the predictions, and which are not finite."""
    systems = systems_from_frames(crystal.frame for crystal in crystals)
    done, errors = [], []
    predictions = predict_systems(potential, systems, batch_size, progress)
    for crystal, prediction in zip(crystals, predictions, strict=True):
        if math.isfinite(prediction.energy) and np.isfinite(prediction.forces).all():
            done.append(FilePrediction(crystal, prediction))
        else:
            errors.append(InputError(f"{crystal.file}:{crystal.index}: the model's prediction is not finite"))
    return done, errors


def check_output(path: Path | None) -> None:
    """Raise InputError where predictions cannot be written under this name, or something is there."""
    if path is not None:
        _check_suffix(path)
        check_new(path)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".json", ".extxyz"):
        raise InputError(f"{path}: predictions are written as .json or .extxyz")


def to_json(predictions: Iterable[FilePrediction]) -> str:
    """Write predictions as a JSON list of objects; see docs/prediction.md."""
    return json.dumps([one.as_dict() for one in predictions], allow_nan=False)


def write_predictions(predictions: Sequence[FilePrediction], path: Path) -> None:
    """Write predictions as .json or .extxyz, the whole file or none.

    Raises:
        InputError: the name ends in neither, or the file cannot be written.
    """
    _check_suffix(path)
    if path.suffix == ".json":
        text = to_json(predictions) + "\n"
    else:
        from ase.io import write

        buffer = io.StringIO()
        write(buffer, [one.as_atoms() for one in predictions], format="extxyz")
        text = buffer.getvalue()
    write_atomically(path, text)


def systems_from_frames(frames: Iterable[Frame]) -> Systems:
    """Concatenate the geometries of frames."""
    frames = list(frames)
    return Systems(
        atomic_number=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(f.numbers for f in frames)])),
        position=torch.from_numpy(np.concatenate([np.zeros((0, 3)), *(f.positions for f in frames)])),
        cell=torch.from_numpy(np.array([f.cell for f in frames]).reshape(-1, 3, 3)),
        pbc=torch.from_numpy(np.array([f.pbc for f in frames], dtype=bool).reshape(-1, 3)),
        n_atoms=tuple(len(f.numbers) for f in frames),
    )


def pack(sizes: NDArray[np.int64], batch_size: int) -> list[slice]:
    """Cut crystals into batches, in order, each bounded in number and in edges and angles.

    Args:
        sizes: atoms, directed edges, short bonds and angles of each crystal, [S, 4]. A crystal that is
            larger than the bound makes a batch of its own.
        batch_size: crystals in a batch, at most.
    """
    batches, start, total = [], 0, 0
    for position, cost in enumerate((sizes[:, 1] + sizes[:, 3]).tolist()):
        if position > start and (position - start == batch_size or total + cost > MAX_GRAPH):
            batches.append(slice(start, position))
            start, total = position, 0
        total += cost
    return [*batches, slice(start, len(sizes))] if len(sizes) else []


@own_settings
def predict_batch(potential: Potential, systems: Systems) -> Output:
    """Predict one batch that fits in memory, and bring the result to the host."""
    potential.eval()
    with torch.no_grad():
        output = potential(potential.build_graph(systems))
    return Output(*(value.cpu() for value in output))


def _predictions(potential: Potential, systems: Systems, output: Output) -> Iterator[Prediction]:
    per_atom = (output.forces, output.magmoms, output.site_energies)
    split = [value.split(systems.n_atoms) for value in per_atom]
    for energy, stress, forces, magmoms, energies in zip(output.energy, output.stress, *split, strict=True):
        yield Prediction(
            energy=float(energy),
            forces=forces.numpy().copy(),
            stress=stress.numpy().copy(),
            magmoms=magmoms.numpy().copy(),
            energies=energies.numpy().copy(),
            functional=potential.provenance.functional,
            energy_correction=potential.provenance.energy_correction,
        )


def _plain(values: NDArray[np.floating]) -> Any:
    """Turn an array into nested lists with None for NaN, which JSON lacks."""
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()
