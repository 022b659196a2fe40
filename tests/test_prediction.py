"""Predictions: order, batches, what they say, and which structures are refused."""

from __future__ import annotations

import json

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from crystals import benzene, crystals, potential

from fastchgnet import prediction as module
from fastchgnet.config import ModelConfig
from fastchgnet.errors import InputError
from fastchgnet.prediction import (
    FilePrediction,
    Prediction,
    pack,
    predict,
    predict_crystals,
    read_crystals,
    write_predictions,
)

SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))


def assert_same(ones: list[Prediction], others: list[Prediction]) -> None:
    """Compare in float64; sums in another order differ in the last digits."""
    for one, other in zip(ones, others, strict=True):
        for name in ("energy", "forces", "stress", "magmoms", "energies"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-10, atol=1e-12)


def test_order_and_values_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, structures = potential(SMALL), [*crystals(), benzene(), *crystals()[::-1]]
    expected = [predict(model, [one])[0] for one in structures]
    for batch_size in (1, 3, 64):
        assert_same(predict(model, structures, batch_size), expected)
    monkeypatch.setattr(module, "MAX_GRAPH", 500)
    assert_same(predict(model, structures), expected)


def test_pymatgen_structures_are_crystals_too() -> None:
    adaptor = pytest.importorskip("pymatgen.io.ase").AseAtomsAdaptor
    model, structures = potential(SMALL), crystals()
    from_pymatgen = predict(model, [adaptor.get_structure(one) for one in structures])
    assert_same(from_pymatgen, predict(model, structures))


def test_prediction_says_what_it_means() -> None:
    model = potential(SMALL)
    prediction = predict(model, [crystals()[1]])[0]
    assert prediction.forces.shape == (5, 3)
    assert prediction.stress.shape == (3, 3)
    assert prediction.magmoms.shape == prediction.energies.shape == (5,)
    assert prediction.energies.sum() == pytest.approx(prediction.energy)
    assert prediction.energy_per_atom == pytest.approx(prediction.energy / 5)
    assert prediction.functional == model.provenance.functional
    assert prediction.energy_correction == model.provenance.energy_correction


def test_a_molecule_has_no_stress_and_is_valid_json() -> None:
    prediction = predict(potential(SMALL), [benzene()])[0]
    assert np.isnan(prediction.stress).all()
    assert np.isfinite(prediction.forces).all()
    plain = json.loads(json.dumps(prediction.as_dict(), allow_nan=False))
    assert plain["stress"] == [[None] * 3] * 3
    assert plain["forces"] == prediction.forces.tolist()


def test_no_structures_give_no_predictions() -> None:
    assert predict(potential(SMALL), []) == []


def moved(position: float) -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.positions[1] = position
    return atoms


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(InputError, match="batch size must be at least 1"):
        predict(potential(SMALL), [bulk("Fe")], batch_size=0)


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        (moved(np.nan), "NaN"),
        (moved(0.1), "overlap"),
        (bulk("Am", "fcc", a=4.9), "Z = 95"),
        (Atoms("Na", cell=[3, 3, 0], pbc=True), "no volume"),
        (Atoms("Na", cell=[[3, 0, 0], [3, 0, 0], [0, 0, 3]], pbc=True), "no volume"),
        (Atoms(cell=[3, 3, 3], pbc=True), "no atoms"),
        ("NaCl", "neither ase Atoms nor a pymatgen Structure"),
    ],
)
def test_a_bad_structure_is_refused_by_index_and_reason(structure: Atoms, reason: str) -> None:
    with pytest.raises(InputError, match=f"^structure 1: .*{reason}") as raised:
        predict(potential(SMALL), [bulk("Fe"), structure])
    assert "\n" not in str(raised.value)


def test_batches_are_bounded_in_number_and_in_size() -> None:
    limit = module.MAX_GRAPH
    edges = [1, limit // 2, limit // 2, 5 * limit, 1, 1, 1]
    sizes = np.array([[1, n, 0, 0] for n in edges])
    batches = pack(sizes, batch_size=2)
    assert batches == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6), slice(6, 7)]
    assert pack(sizes[:0], batch_size=2) == []


@pytest.fixture
def predictions(tmp_path) -> list[FilePrediction]:
    ase.io.write(tmp_path / "crystals.xyz", crystals())
    ase.io.write(tmp_path / "water.xyz", molecule("H2O"), format="extxyz")
    found, errors = read_crystals([tmp_path / "crystals.xyz", tmp_path / "water.xyz"])
    done, failed = predict_crystals(potential(SMALL), found)
    assert not errors and not failed
    return done


def test_extxyz_holds_what_was_predicted(predictions, tmp_path) -> None:
    write_predictions(predictions, tmp_path / "out.extxyz")
    frames = ase.io.read(tmp_path / "out.extxyz", ":")
    assert [atoms.info["index"] for atoms in frames] == [0, 1, 2, 3, 0]
    for atoms, one in zip(frames, predictions, strict=True):
        expected = one.prediction
        # The format keeps eight decimals of what belongs to an atom.
        assert atoms.get_forces() == pytest.approx(expected.forces, abs=1e-8)
        assert atoms.get_magnetic_moments() == pytest.approx(expected.magmoms, abs=1e-8)
        assert atoms.get_potential_energy() == pytest.approx(expected.energy)
        if atoms.pbc.all():
            assert atoms.get_stress(voigt=False) == pytest.approx(expected.stress)
        else:
            assert "stress" not in atoms.calc.results


def test_an_output_that_cannot_be_written_leaves_what_was_there(predictions, tmp_path) -> None:
    (tmp_path / "out.json").write_text("precious")
    with pytest.raises(InputError, match=r"as \.json or \.extxyz"):
        write_predictions(predictions, tmp_path / "out.csv")
    broken = Prediction(
        *[np.nan] * 5, functional="", energy_correction=""
    )  # has no length: fails while written
    with pytest.raises(TypeError):
        write_predictions([FilePrediction(predictions[0].crystal, broken)], tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crystals.xyz", "out.json", "water.xyz"]


def test_labels_of_a_file_do_not_matter(tmp_path) -> None:
    atoms = crystals()[0]
    atoms.arrays["forces"] = np.full((2, 3), np.nan)
    atoms.info.update(energy=np.nan, occupancy=0.5)
    ase.io.write(tmp_path / "odd.xyz", atoms, format="extxyz")
    found, errors = read_crystals([tmp_path / "odd.xyz"])
    assert len(found) == 1 and not errors


def test_a_prediction_that_is_not_finite_is_an_error(tmp_path) -> None:
    model = potential(SMALL)
    with torch.no_grad():
        model.references[10] = torch.nan  # sodium
    ase.io.write(tmp_path / "crystals.xyz", crystals())
    found, _ = read_crystals([tmp_path / "crystals.xyz"])
    done, errors = predict_crystals(model, found)
    assert [one.crystal.index for one in done] == [1, 2, 3]
    assert str(errors[0]) == f"{tmp_path}/crystals.xyz:0: the model's prediction is not finite"
