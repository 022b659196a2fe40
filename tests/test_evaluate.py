"""Evaluation: figures against a direct computation, what is left out, the shift per element, the report."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from crystals import crystals, potential

from fastchgnet import evaluate as module
from fastchgnet import report
from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.data.frame import Frame
from fastchgnet.data.store import Store, write_store
from fastchgnet.errors import InputError
from fastchgnet.evaluate import Reservoir, Sums, compare, evaluate, same_energies
from fastchgnet.graph import Labels, Output
from fastchgnet.neighbors import systems_from_atoms
from fastchgnet.potential import Potential
from fastchgnet.prediction import predict
from fastchgnet.units import GPA

SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))
PBE = Provenance(name="data", functional="PBE", energy_correction="none", source="a made-up source")
ABOUT = {"file": "model.safetensors", "store": "STORE", "split": "all", "seed": "0"}


def model_with(provenance: Provenance) -> Potential:
    model = potential(SMALL)
    model.provenance = provenance
    return model


def labelled(model: Potential, noise: float = 0.3, seed: int = 0) -> list[Frame]:
    """Two shaken copies of each crystal, with labels that differ from the predictions by noise."""
    rng = np.random.default_rng(seed)
    structures = [*crystals(), *crystals()]
    for atoms in structures[4:]:
        atoms.positions += 0.1 * rng.normal(size=atoms.positions.shape)
    frames = []
    for index, (atoms, one) in enumerate(zip(structures, predict(model, structures), strict=True)):
        strain = rng.normal(size=(3, 3))
        frames.append(
            Frame(
                numbers=atoms.numbers,
                positions=atoms.positions,
                cell=atoms.cell.array,
                pbc=atoms.pbc,
                source=f"made:{index}",
                group=str(index),
                config_type="ab"[index % 2],
                energy=one.energy + noise * rng.normal(),
                forces=one.forces + noise * rng.normal(size=one.forces.shape),
                stress=one.stress + noise * GPA * (strain + strain.T),
                magmoms=-(one.magmoms + noise * rng.random(len(atoms))),
            )
        )
    return frames


def stored(frames: list[Frame], folder: Path, provenance: Provenance = PBE) -> Store:
    write_store(frames, folder / "store", provenance)
    return Store(folder / "store")


def expected_metric(reference: np.ndarray, prediction: np.ndarray, scale: float) -> list[float]:
    error = prediction - reference
    r2 = 1 - (error**2).sum() / ((reference - reference.mean()) ** 2).sum()
    return [error.size, scale * np.abs(error).mean(), scale * np.sqrt((error**2).mean()), r2]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_metrics_are_those_of_a_direct_computation(tmp_path, batch_size) -> None:
    model = model_with(PBE)
    store = stored(labelled(model), tmp_path)
    evaluation = evaluate(model.train(), store, store.split("all"), batch_size)
    systems, labels = store.gather(store.split("all"))
    output = model(model.build_graph(systems))
    n_atoms, types = np.array(systems.n_atoms), store.config_types
    of_atom = np.repeat(types, n_atoms)
    values = {
        "energy": (labels.energy.numpy() / n_atoms, output.energy.numpy() / n_atoms, types, 1e3),
        "forces": (labels.forces.numpy(), output.forces.numpy(), of_atom, 1e3),
        "stress": (labels.stress.numpy() / GPA, output.stress.numpy() / GPA, types, 1.0),
        "magmoms": (np.abs(labels.magmoms.numpy()), output.magmoms.numpy(), of_atom, 1e3),
    }
    assert evaluation.shift is None
    assert list(evaluation.overall) == list(values)
    assert evaluation.n_frames_by_config_type == {"a": 4, "b": 4}
    for key, (reference, prediction, group, scale) in values.items():
        reference = reference.astype(np.float64)
        for metric, chosen in (
            (evaluation.overall[key], group != ""),
            (evaluation.by_config_type["a"][key], group == "a"),
            (evaluation.by_config_type["b"][key], group == "b"),
        ):
            expected = expected_metric(reference[chosen], prediction[chosen], scale)
            # Both in float64; labels of the store are float32 to both.
            assert [metric.n, metric.mae, metric.rmse, metric.r2] == pytest.approx(expected, rel=1e-9)
            assert metric.mae > 0


def test_missing_labels_are_left_out_and_counted(tmp_path) -> None:
    model = model_with(PBE)
    frames = labelled(model)
    frames[0] = replace(frames[0], energy=np.nan, forces=None)
    frames[1] = replace(frames[1], stress=None, magmoms=None)
    store = stored(
        [replace(frame, magmoms=None) if frame.config_type == "a" else frame for frame in frames], tmp_path
    )
    evaluation = evaluate(model, store, store.split("all"))
    n_atoms = [len(frame.numbers) for frame in frames]
    assert evaluation.overall["energy"].n == 7
    assert evaluation.overall["forces"].n == 3 * sum(n_atoms[1:])
    assert evaluation.overall["stress"].n == 9 * 7
    assert evaluation.overall["magmoms"].n == n_atoms[3] + n_atoms[5] + n_atoms[7]
    absent = evaluation.by_config_type["a"]["magmoms"]
    assert absent.n == 0
    assert np.isnan([absent.mae, absent.rmse, absent.r2]).all()
    assert evaluation.as_dict()["by_config_type"]["a"]["magmoms"]["mae"] is None


def test_a_stress_without_three_periodic_directions_does_not_count() -> None:
    atoms = crystals()[0]
    atoms.pbc = (True, True, False)
    zeros = torch.zeros(2, 3)
    labels = Labels(torch.zeros(1), zeros, torch.zeros(1, 3, 3), zeros[:, 0])
    output = Output(torch.zeros(1), zeros, torch.full((1, 3, 3), torch.nan), zeros[:, 0], zeros[:, 0])
    pairs = compare(systems_from_atoms([atoms]), labels, output)
    assert len(pairs["stress"].reference) == 0
    assert len(pairs["forces"].reference) == 6


def test_energies_of_another_kind_are_compared_after_a_shift_per_element(tmp_path) -> None:
    model = model_with(PBE.model_copy(update={"energy_correction": "MP2020"}))
    per_element = np.random.default_rng(1).normal(size=95)
    frames = [
        replace(frame, energy=frame.energy + per_element[frame.numbers].sum())
        for frame in labelled(model, noise=0.0)
    ]
    store = stored(frames, tmp_path)
    evaluation = evaluate(model, store, store.split("all"))
    elements = {number for frame in frames for number in frame.numbers}
    assert evaluation.n_shifted_elements == len(elements)
    assert evaluation.overall["energy"].mae > 100
    # Positions are kept in float32: 1e-6 eV/atom is what that costs, in meV/atom 1e-3.
    assert evaluation.overall["energy_shifted"].mae < 1e-3
    assert evaluation.by_config_type["b"]["energy_shifted"].mae < 1e-3
    assert any(f"{len(elements)} in all" in note for note in report.notes(evaluation))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"name": "other", "source": "other"}, True),
        ({"functional": "r2SCAN"}, False),
        ({"energy_correction": "MP2020"}, False),
    ],
)
def test_energies_mean_the_same_where_functional_and_correction_agree(change, same) -> None:
    assert same_energies(PBE, PBE.model_copy(update=change)) is same


def test_what_is_unknown_does_not_agree() -> None:
    assert not same_energies(Provenance(name="a"), Provenance(name="b"))


def test_a_prediction_that_is_not_finite_names_the_frames(tmp_path) -> None:
    model = model_with(PBE)
    store = stored(labelled(model), tmp_path)
    with torch.no_grad():
        model.references[25] = torch.nan  # iron: the fourth crystal of each copy
    with pytest.raises(InputError, match=r"energy that are not finite for made:3, made:7$"):
        evaluate(model, store, store.split("all"))


def test_no_frames_are_an_error(tmp_path) -> None:
    model = model_with(PBE)
    with pytest.raises(InputError, match="no frames"):
        evaluate(model, stored(labelled(model), tmp_path), np.array([], dtype=np.int64))


def test_sums_do_not_cancel() -> None:
    rng = np.random.default_rng(0)
    reference = 1e6 + rng.normal(size=4000)
    prediction = reference + 0.1 * rng.normal(size=4000)
    sums = Sums(1)
    for part in np.array_split(np.arange(4000), 7):
        sums.add(np.zeros(len(part), dtype=np.int64), reference[part], prediction[part])
    metric = sums.metric(1.0, 0)
    expected = expected_metric(reference, prediction, 1.0)
    assert [metric.n, metric.mae, metric.rmse, metric.r2] == pytest.approx(expected, rel=1e-9)


def test_a_sample_is_bounded_and_uniform(monkeypatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_SIZE", 1000)
    reservoir = Reservoir()
    for part in np.array_split(np.arange(50_000.0), 13):
        reservoir.add(part, part + 1)
    sample = reservoir.sample()
    assert len(sample.reference) == len(np.unique(sample.reference)) == 1000
    np.testing.assert_array_equal(sample.prediction, sample.reference + 1)
    # The mean of 1000 of 50,000 spreads by 456; the seed is fixed.
    assert abs(sample.reference.mean() - 25_000) < 3 * 456


def history(n_epochs: int) -> list[dict]:
    names = report.CURVES.values()
    return [
        {"epoch": epoch, "val": {name: 1 / epoch for name in names} | {"magmoms_mmub": None}}
        for epoch in range(1, n_epochs + 1)
    ]


def test_report_holds_figures_plots_and_the_source_of_the_labels(tmp_path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    model = model_with(Provenance(name="<model>"))
    evaluation = evaluate(model, stored(labelled(model), tmp_path), np.arange(8))
    report.write_report(evaluation, tmp_path / "out", ABOUT, history(3))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "learning.png",
        "metrics.json",
        "parity.png",
        "report.html",
    ]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["split"] == "all"
    assert metrics["overall"]["forces"]["mae"] == evaluation.overall["forces"].mae
    page = (tmp_path / "out" / "report.html").read_text()
    for name in ("parity.png", "learning.png"):
        content = (tmp_path / "out" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert base64.b64encode(content).decode() in page
    assert "a made-up source" in page
    assert "&lt;model&gt;" in page and "<model>" not in page
    assert matplotlib.rcParams == before


def test_without_matplotlib_the_numbers_are_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(report, "has_matplotlib", lambda: False)
    model = model_with(PBE)
    evaluation = evaluate(model, stored(labelled(model), tmp_path), np.arange(8))
    report.show_evaluation(evaluation, ABOUT, tmp_path / "out", as_json=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "report.html"]
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "pip install 'fastchgnet[plot]'" in printed.err


def test_learning_curves_leave_out_what_has_no_labels() -> None:
    curves = report.learning_curves(history(2))
    assert [(curve.name, curve.unit) for curve in curves] == [
        ("Energy", "meV/atom"),
        ("Force", "meV/Å"),
        ("Stress", "GPa"),
    ]
    assert list(curves[0].epoch) == [1, 2]
    assert list(curves[0].value) == [1, 0.5]
