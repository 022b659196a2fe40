"""Compare a potential with the labels of a store: errors as the paper's Table I gives them.

Only sums, a bounded sample for the plots and one energy per frame are kept, so a store of any size fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastchgnet.config import Provenance
from fastchgnet.data.store import Store
from fastchgnet.device import own_settings
from fastchgnet.errors import InputError
from fastchgnet.graph import Labels, Output, Systems
from fastchgnet.potential import Potential
from fastchgnet.prediction import pack, predict_batch
from fastchgnet.references import References, fit_references
from fastchgnet.units import GPA

SAMPLE_SIZE = 100_000
"""Values of a quantity kept for its parity plot."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Quantity(NamedTuple):
    """A predicted quantity: its name, and the units of its values and of its errors in reports."""

    name: str
    value_unit: str
    error_unit: str
    scale: float  # errors in error_unit per value_unit


SHIFTED = "energy_shifted"

QUANTITIES = {
    "energy": Quantity("Energy", "eV/atom", "meV/atom", 1e3),
    SHIFTED: Quantity("Energy, shifted", "eV/atom", "meV/atom", 1e3),
    "forces": Quantity("Force", "eV/Å", "meV/Å", 1e3),
    "stress": Quantity("Stress", "GPa", "GPa", 1.0),
    "magmoms": Quantity("Magmom", "μ_B", "mμ_B", 1e3),
}
"""What is compared. Energies are per atom, forces and stress by component, magmoms are magnitudes."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Errors of one quantity over `n` labels, in the quantity's error unit; NaN where there is none."""

    n: int
    mae: float
    rmse: float
    r2: float  # 1 - squared errors / squared deviations of the labels from their mean; no unit


@dataclass(frozen=True, slots=True)
class Sample:
    """A uniform random sample of labels and predictions, in the quantity's value unit."""

    reference: Floats  # [n]
    prediction: Floats  # [n]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a potential reproduces labels; quantities are the keys of QUANTITIES."""

    model: Provenance
    n_parameters: int
    data: Provenance
    files: tuple[str, ...]  # that the store was made from
    n_frames: int
    overall: dict[str, Metric]
    by_config_type: dict[str, dict[str, Metric]]
    n_frames_by_config_type: dict[str, int]
    shift: References | None  # added to the predicted energies where they do not mean what the labels mean
    samples: dict[str, Sample]

    @property
    def n_shifted_elements(self) -> int:
        """Number of elements whose energies were fitted for `energy_shifted`."""
        return 0 if self.shift is None else len(self.shift.energies) - len(self.shift.absent)

    def as_dict(self) -> dict[str, Any]:
        """Give everything but the samples as JSON takes it; a figure that does not exist is None."""
        return {
            "model": self.model.model_dump(),
            "n_parameters": self.n_parameters,
            "data": self.data.model_dump(),
            "files": list(self.files),
            "n_frames": self.n_frames,
            "overall": _metrics_dict(self.overall),
            "by_config_type": {
                name: {"n_frames": self.n_frames_by_config_type[name], **_metrics_dict(metrics)}
                for name, metrics in self.by_config_type.items()
            },
            "n_shifted_elements": self.n_shifted_elements,
        }


@own_settings
def evaluate(
    potential: Potential,
    store: Store,
    indices: Integers,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda n_frames: None,
) -> Evaluation:
    """Compare a potential with the labels of the frames `indices` of a store.

    Missing labels are left out, and so is the stress of a frame that is not periodic in three directions.
    Where the density functional or the energy correction of model and data differ, or one is unknown,
    energies are compared a second time after adding an energy per element, fitted by least squares on
    these very frames (`energy_shifted`).

    Args:
        potential: the model, on the device where it shall run.
        store: labelled frames.
        indices: which of them, [n].
        batch_size: frames in a batch, at most; large frames come fewer at a time.
        progress: called with the number of frames after each batch.

    Raises:
        InputError: there is no frame, or a prediction is not finite where there is a label.
    """
    indices = np.sort(np.asarray(indices, dtype=np.int64))
    if not len(indices):
        raise InputError(f"{store.path}: no frames to evaluate; is the split empty?")
    batches = pack(store.sizes[indices].astype(np.int64), batch_size)
    names, group = np.unique(store.config_types[indices], return_inverse=True)
    tally = Tally(len(names))
    energies = np.empty(len(indices))
    for batch in batches:
        systems, labels = store.gather(indices[batch])
        output = predict_batch(potential, systems)
        energies[batch] = output.energy.numpy()
        pairs = compare(systems, labels, output)
        _refuse_not_finite(pairs, store, indices[batch])
        tally.add(pairs, group[batch])
        progress(len(systems.n_atoms))
    data = store.header.provenance
    shift = None
    if tally.sums["energy"].n.any() and not same_energies(potential.provenance, data):
        shift = fit_references(_energy_errors(store, indices, batches, energies))
        for batch in batches:
            systems, labels = store.gather(indices[batch])
            shifted = torch.from_numpy(energies[batch]) + _linear_energy(shift.energies, systems)
            tally.add({SHIFTED: _energy_pairs(systems, labels, shifted)}, group[batch])
    return Evaluation(
        model=potential.provenance,
        n_parameters=potential.n_parameters(),
        data=data,
        files=tuple(source.name for source in store.header.plan.sources),
        n_frames=len(indices),
        overall=tally.metrics(),
        by_config_type={str(name): tally.metrics(i) for i, name in enumerate(names)},
        n_frames_by_config_type=dict(zip(names.tolist(), np.bincount(group).tolist(), strict=True)),
        shift=shift,
        samples=tally.samples(),
    )


def same_energies(model: Provenance, data: Provenance) -> bool:
    """Tell whether total energies of a model and of data mean the same; what is unknown does not."""
    ours = (model.functional, model.energy_correction)
    return ours == (data.functional, data.energy_correction) and "unknown" not in ours


class Pairs(NamedTuple):
    """The labels that are present in a batch and their predictions, in the quantity's value unit."""

    reference: Floats  # [n]
    prediction: Floats  # [n]
    system: Integers  # [n] position of the frame in its batch


def compare(systems: Systems, labels: Labels, output: Output) -> dict[str, Pairs]:
    """Pair the labels of a batch that are present with predictions, by quantity."""
    system, atom = torch.arange(systems.n_systems), systems.atom_system
    periodic = systems.pbc.all(dim=1)[:, None, None]
    stress = torch.where(periodic, labels.stress, torch.nan)
    return {
        "energy": _energy_pairs(systems, labels, output.energy),
        "forces": _pairs(labels.forces, output.forces, atom[:, None]),
        "stress": _pairs(stress / GPA, output.stress / GPA, system[:, None, None]),
        "magmoms": _pairs(labels.magmoms.abs(), output.magmoms, atom),
    }


class Tally:
    """Everything an evaluation keeps while it passes over the frames."""

    def __init__(self, n_groups: int) -> None:
        self.sums = {key: Sums(n_groups) for key in QUANTITIES}
        self.reservoirs = {key: Reservoir() for key in QUANTITIES}

    def add(self, pairs: dict[str, Pairs], group: Integers) -> None:
        """Add a batch; `group` [S] is the group of each of its systems."""
        for key, (reference, prediction, system) in pairs.items():
            self.sums[key].add(group[system], reference, prediction)
            self.reservoirs[key].add(reference, prediction)

    def metrics(self, group: int | None = None) -> dict[str, Metric]:
        """Give the errors of one group, or of all, by quantity."""
        return {key: self.sums[key].metric(QUANTITIES[key].scale, group) for key in self._reported()}

    def samples(self) -> dict[str, Sample]:
        """Give samples of labels and predictions by quantity."""
        return {key: self.reservoirs[key].sample() for key in self._reported()}

    def _reported(self) -> Iterator[str]:
        return (key for key in QUANTITIES if key != SHIFTED or self.sums[key].n.any())


class Sums:
    """Streaming sums of errors and of the spread of labels, per group, in float64."""

    def __init__(self, n_groups: int) -> None:
        self.n, self.absolute, self.square, self.mean, self.spread = np.zeros((5, n_groups))

    def add(self, group: Integers, reference: Floats, prediction: Floats) -> None:
        """Add values [n] of groups [n]; spreads merge by Chan's formula, which does not cancel."""

        def total(values: Floats | None = None) -> Floats:
            return np.bincount(group, weights=values, minlength=len(self.n)).astype(np.float64)

        error = prediction - reference
        n = total()
        mean = total(reference) / np.maximum(n, 1)
        n_new = np.maximum(self.n + n, 1)
        drift = mean - self.mean
        self.spread += total((reference - mean[group]) ** 2) + drift**2 * self.n * n / n_new
        self.mean += drift * n / n_new
        self.n += n
        self.absolute += total(np.abs(error))
        self.square += total(error**2)

    def metric(self, scale: float, group: int | None = None) -> Metric:
        """Give the errors of one group, or of all of them, times `scale`."""
        chosen = slice(None) if group is None else slice(group, group + 1)
        counts, means = self.n[chosen], self.mean[chosen]
        n = counts.sum()
        if n == 0:
            return Metric(0, np.nan, np.nan, np.nan)
        mean = (counts * means).sum() / n
        spread = self.spread[chosen].sum() + (counts * (means - mean) ** 2).sum()
        square = self.square[chosen].sum()
        return Metric(
            n=int(n),
            mae=float(scale * self.absolute[chosen].sum() / n),
            rmse=float(scale * np.sqrt(square / n)),
            r2=float(1 - square / spread) if spread > 0 else np.nan,
        )


class Reservoir:
    """A uniform random sample, bounded in size, of all that is added: those with the smallest random keys."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.kept = np.empty((3, 0))  # key, reference, prediction

    def add(self, reference: Floats, prediction: Floats) -> None:
        """Add values [n]."""
        fresh = np.stack([self.random.random(len(reference)), reference, prediction])
        kept = np.concatenate([self.kept, fresh], axis=1)
        if kept.shape[1] > SAMPLE_SIZE:
            kept = kept[:, np.argpartition(kept[0], SAMPLE_SIZE)[:SAMPLE_SIZE]]
        self.kept = kept

    def sample(self) -> Sample:
        """Give what is kept."""
        return Sample(self.kept[1], self.kept[2])


def none_if_nan(value: float) -> float | None:
    """Give None for NaN, which JSON lacks."""
    return None if np.isnan(value) else value


def _pairs(reference: Tensor, prediction: Tensor, system: Tensor) -> Pairs:
    """Keep the values whose label is present."""
    present = ~reference.isnan()
    return Pairs(
        reference[present].double().numpy(),
        prediction[present].double().numpy(),
        system.expand_as(reference)[present].numpy(),
    )


def _energy_pairs(systems: Systems, labels: Labels, energy: Tensor) -> Pairs:
    """Pair energies per atom."""
    n_atoms = torch.tensor(systems.n_atoms)
    return _pairs(labels.energy / n_atoms, energy / n_atoms, torch.arange(len(n_atoms)))


def _energy_errors(
    store: Store, indices: Integers, batches: list[slice], energies: Floats
) -> Iterator[tuple[Systems, Tensor]]:
    """Yield systems and what their predicted energies lack, total eV."""
    for batch in batches:
        systems, labels = store.gather(indices[batch])
        yield systems, labels.energy - torch.from_numpy(energies[batch])


def _linear_energy(per_element: Tensor, systems: Systems) -> Tensor:
    """Sum an energy per element over each system, [S] eV."""
    site = per_element[systems.atomic_number - 1]
    return site.new_zeros(systems.n_systems).index_add(0, systems.atom_system, site)


def _refuse_not_finite(pairs: dict[str, Pairs], store: Store, indices: Integers) -> None:
    """Raise where a label is present and its prediction is NaN or infinite, naming the frames."""
    for key, (_, prediction, system) in pairs.items():
        bad = np.unique(system[~np.isfinite(prediction)])
        if len(bad):
            shown = ", ".join(store.ids(indices[bad[:5]])) + (", ..." if len(bad) > 5 else "")
            raise InputError(f"{store.path}: the model predicts {key} that are not finite for {shown}")


def _metrics_dict(metrics: dict[str, Metric]) -> dict[str, Any]:
    return {
        key: {
            "unit": QUANTITIES[key].error_unit,
            "n": m.n,
            "mae": none_if_nan(m.mae),
            "rmse": none_if_nan(m.rmse),
            "r2": none_if_nan(m.r2),
        }
        for key, m in metrics.items()
    }
