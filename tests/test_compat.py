"""chgnet's model and calculator through `fastchgnet.compat`: the same answers as from chgnet."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.units import GPa
from crystals import CONSERVATIVE, potential, rattled
from pymatgen.io.ase import AseAtomsAdaptor
from side_by_side import as_chgnet_is, chgnet_package, lithium_manganate, our_model, rock_salt, their_model

from fastchgnet import compat
from fastchgnet.compat.model import choose_device
from fastchgnet.errors import InputError
from fastchgnet.weights import save_potential

# Ten times what was seen here: chgnet rounds geometry, angles and envelope in float32.
TOLERANCE = {
    "e": 3e-6,  # eV/atom
    "f": 1e-4,  # eV/A
    "s": 2e-3,  # GPa
    "m": 1e-5,  # mu_B
    "site_energies": 1e-5,  # eV
    "atom_fea": 1e-4,
    "crystal_fea": 2e-5,
}
TASKS = ["e", "ef", "em", "efs", "efsm"]


@pytest.fixture
def chgnet() -> SimpleNamespace:
    return chgnet_package()


@pytest.fixture
def theirs() -> Any:
    return their_model()


@pytest.fixture
def ours() -> compat.CHGNet:
    return our_model()


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert (type(ours[key]), ours[key].dtype, ours[key].shape) == (
            np.ndarray,
            np.float32,
            expected.shape,
        )
        np.testing.assert_allclose(ours[key], expected, rtol=1e-6, atol=TOLERANCE[key], err_msg=key)


@pytest.mark.parametrize("task", TASKS)
def test_a_structure_is_predicted_as_by_chgnet(ours: compat.CHGNet, theirs: Any, task: str) -> None:
    structure = lithium_manganate()
    with as_chgnet_is():
        expected = theirs.predict_structure(structure, task=task)
    assert_same(ours.predict_structure(structure, task=task), expected)


def test_structures_are_predicted_as_by_chgnet_with_all_their_features(
    ours: compat.CHGNet, theirs: Any
) -> None:
    structures = [
        lithium_manganate(),
        AseAtomsAdaptor.get_structure(rock_salt()),
        AseAtomsAdaptor.get_structure(rattled(bulk("Fe"))),
    ]
    names = ("return_site_energies", "return_atom_feas", "return_crystal_feas")
    options = dict.fromkeys(names, True) | {"batch_size": 2}
    with as_chgnet_is():
        expected = theirs.predict_structure(structures, **options)
    for mine, one in zip(ours.predict_structure(structures, **options), expected, strict=True):
        assert_same(mine, one)


def test_one_structure_in_a_list_gives_one_answer_and_none_gives_none(ours: compat.CHGNet) -> None:
    assert isinstance(ours.predict_structure([lithium_manganate()]), dict)
    assert ours.predict_structure([], return_atom_feas=True) == []


@pytest.mark.parametrize("name", ["0.3.0", "0.2.0", "r2scan"])
def test_published_models_have_chgnets_version_and_number_of_parameters(
    chgnet: SimpleNamespace, name: str
) -> None:
    with as_chgnet_is():
        theirs = chgnet.CHGNet.load(model_name=name, use_device="cpu", verbose=False)
    ours = compat.CHGNet.load(model_name=name, use_device="cpu", verbose=False)
    assert (ours.version, ours.n_params, ours.is_intensive) == (
        theirs.version,
        theirs.n_params,
        theirs.is_intensive,
    )


@pytest.mark.parametrize("name", ["0.3.0", "0.2.0", "r2scan"])
def test_a_checkpoint_of_chgnet_is_read(chgnet: SimpleNamespace, tmp_path: Path, name: str) -> None:
    with as_chgnet_is():
        model = chgnet.CHGNet.load(model_name=name, use_device="cpu", verbose=False)
    path = tmp_path / "tuned.pth.tar"
    torch.save({"model": model.as_dict(), "training_history": {}}, path)
    read = compat.CHGNet.from_file(path, mlp_out_bias=name == "0.2.0")
    loaded = compat.CHGNet.load(name, use_device="cpu")
    structure = lithium_manganate()
    expected = loaded.predict_structure(structure)
    for key, value in read.predict_structure(structure).items():
        np.testing.assert_array_equal(value, expected[key])
    assert compat.CHGNetCalculator.from_file(path, use_device="cpu").n_params == model.n_params


def test_our_own_weights_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    model = potential(CONSERVATIVE, torch.float32)
    save_potential(model, path)
    answer = compat.CHGNet.from_file(str(path)).predict_structure(lithium_manganate())
    expected = compat.CHGNet(model).predict_structure(lithium_manganate())
    np.testing.assert_array_equal(answer["f"], expected["f"])


def test_an_extensive_model_gives_total_energies(ours: compat.CHGNet) -> None:
    structure = lithium_manganate()
    total = compat.CHGNet(ours.potential, is_intensive=False).predict_structure(structure, task="e")["e"]
    assert total == pytest.approx(4 * ours.predict_structure(structure, task="e")["e"])


class Hidden:
    """An object of a class that torch does not know."""


def _of_another_width(model: dict[str, Any]) -> dict[str, Any]:
    return {"model": {**model, "model_args": model["model_args"] | {"atom_fea_dim": 32}}}


def _without_a_tensor(model: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: value for name, value in model["state_dict"].items() if name != "site_wise.bias"}
    return {"model": {**model, "state_dict": tensors}}


def _with(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda model: {"model": {**model, "state_dict": {**model["state_dict"], name: value}}}


@pytest.mark.parametrize("content", [b"", b"\x80\x02e.", b"\x80\x02h\x05.", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pth.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a checkpoint of tensors") as caught:
        compat.CHGNet.from_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: {"model": {**model, "extra": Hidden()}}, "tensors and plain values alone"),
        (lambda model: {"weights": model}, "no model with state_dict"),
        (_of_another_width, "atom_fea_dim is 32; this network has 64"),
        (_without_a_tensor, "do not fit this network"),
        (_with("site_wise.weight", torch.zeros(1)), "do not fit this network"),
        (_with("site_wise.bias", torch.tensor([torch.nan])), "site_wise.bias holds NaN"),
        (_with("site_wise.bias", None), "'site_wise.bias' in its state_dict is no tensor"),
        (_with("composition_model.fc.weight", torch.zeros(1, 89)), "not those of 94 elements"),
        (lambda model: {"model": {**model, "model_args": None}}, "model_args and state_dict"),
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_line(
    theirs: Any, tmp_path: Path, spoil: Callable[[dict[str, Any]], dict[str, Any]], reason: str
) -> None:
    path = tmp_path / "bad.pth.tar"
    torch.save(spoil(theirs.as_dict()), path)
    with pytest.raises(InputError, match=reason) as caught:
        compat.CHGNet.from_file(path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_honoured_is_refused(ours: compat.CHGNet, theirs: Any, tmp_path: Path) -> None:
    atoms, water = rock_salt(), molecule("H2O")
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("Unknown model_name", lambda: compat.CHGNet.load(model_name="0.1.0")),
        ("cannot be read", lambda: compat.CHGNet.from_file(tmp_path / "absent.pth.tar")),
        ("cannot be used", lambda: compat.CHGNet.load(use_device="nowhere")),
        ("Invalid task", lambda: ours.predict_structure(atoms, task="fs")),
        ("CHGNet.from_dict", lambda: compat.CHGNetCalculator(theirs)),
        ("on_isolated_atoms", lambda: compat.CHGNetCalculator(ours, on_isolated_atoms="never")),
        ("optimizer_class", lambda: compat.StructOptimizer(ours, "Newton")),
        ("ase_filter", lambda: compat.StructOptimizer(ours).relax(atoms, ase_filter="Atoms")),
        ("thermostat", lambda: compat.MolecularDynamics(atoms, model=ours, thermostat="Langevin")),
        ("ensemble", lambda: compat.MolecularDynamics(atoms, model=ours, ensemble="nph")),
        ("timestep=0", lambda: compat.MolecularDynamics(atoms, model=ours, timestep=0)),
        ("temperature=-1", lambda: compat.MolecularDynamics(atoms, model=ours, temperature=-1)),
        ("taut=0", lambda: compat.MolecularDynamics(atoms, model=ours, taut=0)),
        ("pressure must", lambda: compat.MolecularDynamics(atoms, model=ours, pressure=[1.0] * 6)),
        ("starting", lambda: compat.MolecularDynamics(atoms, model=ours, starting_temperature=-5)),
        ("bulk_modulus", lambda: compat.MolecularDynamics(atoms, model=ours, bulk_modulus=-5)),
        ("three directions", lambda: compat.MolecularDynamics(water, model=ours, ensemble="npt")),
        ("lattice vectors", lambda: compat.MolecularDynamics(water, model=ours, thermostat="Nose-Hoover")),
        ("lattice vectors", lambda: compat.StructOptimizer(ours).relax(water, relax_cell=False)),
        ("lattice vectors", lambda: compat.EquationOfState(ours).fit(water)),
        ("4 parameters", lambda: compat.EquationOfState(ours).fit(atoms, n_points=3)),
        ("batch_size=-1", lambda: ours.predict_structure([atoms], batch_size=-1)),
        ("neither ase", lambda: ours.predict_structure(None)),
        ("Invalid task", lambda: compat.CHGNetCalculator(ours).calculate(atoms, task="f")),
        ("fitted first", lambda: compat.EquationOfState(ours).get_bulk_modulus()),
    ]
    for reason, call in refused:
        with pytest.raises(InputError, match=reason):
            call()
    with pytest.raises(InputError, match="periodic in three directions"):
        compat.StructOptimizer(ours).relax(Atoms("H2", [[0, 0, 0], [0, 0, 1.0]]))


def test_pymatgen_is_asked_for_where_it_is_needed(
    ours: compat.CHGNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pymatgen.core", None)
    atoms = rock_salt()
    assert ours.predict_structure(atoms).keys() == set("efsm")
    compat.MolecularDynamics(atoms, model=ours, ensemble="nve").run(1)
    with pytest.raises(InputError, match=r"pip install 'fastchgnet\[pymatgen\]'"):
        compat.StructOptimizer(ours).relax(atoms)


def test_devices_are_chosen_as_by_chgnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHGNET_DEVICE", "nowhere")
    with pytest.raises(InputError, match="device nowhere"):
        compat.CHGNet.load()
    assert compat.CHGNet.load(use_device="cpu").potential.device.type == "cpu"
    monkeypatch.setattr("fastchgnet.compat.model.pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ([10, 30, 20][index], 40))
    assert choose_device("cuda", check_cuda_mem=True) == torch.device("cuda:1")
    assert choose_device("cuda:2", check_cuda_mem=True) == torch.device("cuda:2")


def test_the_calculator_gives_everything_and_scales_the_stress(ours: compat.CHGNet) -> None:
    atoms, in_gpa = rock_salt(), rock_salt()
    atoms.calc = compat.CHGNetCalculator(ours, use_device="cpu")
    in_gpa.calc = compat.CHGNetCalculator(ours, use_device="cpu", stress_weight=1.0)
    atoms.get_potential_energy()
    assert {"forces", "stress", "magmoms", "energies", "free_energy"} <= atoms.calc.results.keys()
    np.testing.assert_allclose(in_gpa.get_stress() * GPa, atoms.get_stress(), rtol=1e-12)
    assert (atoms.calc.version, atoms.calc.device) == ("0.3.0", "cpu")


def test_warnings_of_others_are_shown_once(ours: compat.CHGNet) -> None:
    atoms = rock_salt()
    atoms.calc = compat.CHGNetCalculator(ours)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warnings.warn("of a script", stacklevel=1)
            atoms.rattle(0.01)
            atoms.get_forces()
    assert len(caught) == 1


def test_isolated_atoms_are_treated_as_asked(ours: compat.CHGNet) -> None:
    far = Atoms("NaCl", [[0, 0, 0], [0, 0, 10]], cell=[20] * 3, pbc=True)
    far.calc = compat.CHGNetCalculator(ours, on_isolated_atoms="ignore")
    energy = far.get_potential_energy()
    far.calc = compat.CHGNetCalculator(ours)
    with pytest.warns(UserWarning, match="no neighbour"):
        assert far.get_potential_energy() == energy
    far.calc = compat.CHGNetCalculator(ours, on_isolated_atoms="error")
    with pytest.raises(InputError, match="2 isolated atom"):
        far.get_potential_energy()
    far.positions[1, 2] = 3
    assert np.isfinite(far.get_potential_energy())
