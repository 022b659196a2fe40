"""chgnet's scripts run through `fastchgnet.compat` and say what they say with chgnet."""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.md.velocitydistribution import Stationary
from ase.units import GPa
from crystals import CONSERVATIVE, potential, rattled
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor

from fastchgnet import compat
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


@contextlib.contextmanager
def as_chgnet_is() -> Iterator[None]:
    """Let chgnet print and warn, and its dependencies as well: none of it is ours."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def chgnet() -> SimpleNamespace:
    """Return what chgnet offers under the names of `fastchgnet.compat`."""
    pytest.importorskip("chgnet")
    with as_chgnet_is():
        import chgnet.model.dynamics as dynamics
        import chgnet.model.model as model
        import chgnet.utils as utils
    homes: list[ModuleType] = [dynamics, model, utils]
    return SimpleNamespace(**{name: value for home in homes for name, value in vars(home).items()})


@pytest.fixture(scope="module")
def theirs(chgnet: SimpleNamespace) -> Any:
    with as_chgnet_is():
        return chgnet.CHGNet.load(use_device="cpu")


@pytest.fixture(scope="module")
def ours() -> compat.CHGNet:
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


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: {"model": {**model, "extra": Hidden()}}, "tensors and plain values alone"),
        (lambda model: {"weights": model}, "no model with state_dict"),
        (_of_another_width, "atom_fea_dim is 32; this network has 64"),
        (_without_a_tensor, "do not fit this network"),
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
    atoms = rock_salt()
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
        ("fitted first", lambda: compat.EquationOfState(ours).get_bulk_modulus()),
    ]
    for reason, call in refused:
        with pytest.raises(InputError, match=reason):
            call()
    with pytest.raises(InputError, match="periodic in three directions"):
        compat.StructOptimizer(ours).relax(Atoms("H2", [[0, 0, 0], [0, 0, 1.0]]))


def test_the_calculator_gives_everything_and_scales_the_stress(ours: compat.CHGNet) -> None:
    atoms, in_gpa = rock_salt(), rock_salt()
    atoms.calc = compat.CHGNetCalculator(ours, use_device="cpu")
    in_gpa.calc = compat.CHGNetCalculator(ours, use_device="cpu", stress_weight=1.0)
    atoms.get_potential_energy()
    assert {"forces", "stress", "magmoms", "energies", "free_energy"} <= atoms.calc.results.keys()
    np.testing.assert_allclose(in_gpa.get_stress() * GPa, atoms.get_stress(), rtol=1e-12)
    assert (atoms.calc.version, atoms.calc.device) == ("0.3.0", "cpu")


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


@pytest.mark.parametrize("relax_cell", [True, False])
def test_relaxation_ends_where_chgnets_does(
    chgnet: SimpleNamespace, ours: compat.CHGNet, theirs: Any, tmp_path: Path, relax_cell: bool
) -> None:
    options = {"fmax": 0.1, "relax_cell": relax_cell, "verbose": False, "steps": 200}
    paths = [tmp_path / "theirs.pkl", tmp_path / "ours.pkl"]
    with as_chgnet_is():
        optimizer = chgnet.StructOptimizer(theirs, use_device="cpu")
        expected = optimizer.relax(lithium_manganate(), save_path=str(paths[0]), **options)
    optimizer = compat.StructOptimizer(ours, use_device="cpu")
    result = optimizer.relax(lithium_manganate(), save_path=str(paths[1]), **options)
    assert result.keys() == expected.keys()
    mine, reference = result["trajectory"], expected["trajectory"]
    for name in ("energies", "forces", "stresses", "magmoms", "atom_positions", "cells"):
        first, theirs_first = getattr(mine, name)[0], getattr(reference, name)[0]
        np.testing.assert_allclose(first, theirs_first, atol=1e-3)
        assert np.shape(first) == np.shape(theirs_first)
    # rounding of forces in float32 may cost a step more or less; the flat end of a path is within a meV
    assert mine.energies[-1] == pytest.approx(reference.energies[-1], abs=1e-3)
    assert np.linalg.norm(mine.forces[-1], axis=1).max() < 0.1
    final, theirs_final = result["final_structure"], expected["final_structure"]
    assert type(final) is type(theirs_final)
    assert final.volume == pytest.approx(theirs_final.volume, rel=2e-3)
    assert final.site_properties.keys() == theirs_final.site_properties.keys() == {"magmom"}
    with paths[0].open("rb") as a, paths[1].open("rb") as b:
        saved, expected_saved = pickle.load(b), pickle.load(a)
    assert saved.keys() == expected_saved.keys()
    assert len(saved["energy"]) == len(mine)


def test_every_optimizer_of_chgnet_is_there(chgnet: SimpleNamespace, ours: compat.CHGNet) -> None:
    for name in chgnet.OPTIMIZERS:
        optimizer = compat.StructOptimizer(ours, optimizer_class=name)
        result = optimizer.relax(rock_salt(), relax_cell=False, fmax=0.2, steps=30, verbose=False)
        energies = result["trajectory"].energies
        assert energies[-1] < energies[0], name


def test_ase_prints_its_table_only_when_told_to(
    ours: compat.CHGNet, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = compat.StructOptimizer(ours)
    optimizer.relax(rock_salt(), steps=1, verbose=False)
    assert capsys.readouterr().out == ""
    optimizer.relax(rock_salt(), steps=1)
    assert "FIRE" in capsys.readouterr().out


DYNAMICS = [
    ("nve", "Nose-Hoover"),
    ("nvt", "Nose-Hoover"),
    ("nvt", "Berendsen"),
    ("npt", "Nose-Hoover"),
    ("npt", "Berendsen_inhomogeneous"),
    ("npt", "NPT_Berendsen"),
]


@pytest.mark.parametrize(("ensemble", "thermostat"), DYNAMICS)
def test_dynamics_are_those_of_chgnet(
    chgnet: SimpleNamespace, ours: compat.CHGNet, theirs: Any, ensemble: str, thermostat: str
) -> None:
    frames = []
    for package, model in ((chgnet, theirs), (compat, ours)):
        np.random.seed(7)
        with as_chgnet_is():
            dynamics = package.MolecularDynamics(
                rock_salt(),
                model=model,
                ensemble=ensemble,
                thermostat=thermostat,
                temperature=600,
                starting_temperature=300,
                timestep=1,
                taut=20,
                taup=50,
                pressure=1.0,
                bulk_modulus=25,
                use_device="cpu",
            )
            dynamics.run(5)
        frames.append(dynamics.atoms)
    # 5 fs with forces that differ by 1e-4 eV/A move an atom by far less
    np.testing.assert_allclose(frames[1].positions, frames[0].positions, atol=2e-5)
    np.testing.assert_allclose(frames[1].cell.array, frames[0].cell.array, atol=2e-5)
    np.testing.assert_allclose(frames[1].get_velocities(), frames[0].get_velocities(), atol=1e-5)


def test_nose_hoover_turns_cell_and_momenta_together(
    chgnet: SimpleNamespace, ours: compat.CHGNet, theirs: Any
) -> None:
    structure = lithium_manganate()
    start = AseAtomsAdaptor.get_atoms(structure)
    start.set_momenta(np.random.default_rng(0).normal(size=(4, 3)))
    Stationary(start)  # as ASE's Nose-Hoover dynamics would
    turned = start.copy()
    compat.MolecularDynamics(turned, model=ours, thermostat="Nose-Hoover")
    with as_chgnet_is():
        theirs_turned = chgnet.MolecularDynamics(structure, model=theirs, thermostat="Nose-Hoover").atoms
    cell = turned.cell.array
    assert not np.tril(cell, -1).any()
    np.testing.assert_allclose(cell, theirs_turned.cell.array, atol=1e-10)
    # momenta keep their angles with the cell
    along = start.get_momenta() @ start.cell.array.T
    np.testing.assert_allclose(turned.get_momenta() @ cell.T, along, atol=1e-12)
    np.testing.assert_allclose(turned.get_scaled_positions(), start.get_scaled_positions(), atol=1e-12)


def test_an_equation_of_state_is_that_of_chgnet(
    chgnet: SimpleNamespace, ours: compat.CHGNet, theirs: Any
) -> None:
    salt = bulk("NaCl", "rocksalt", a=5.6)
    moduli = []
    for package, model in ((chgnet, theirs), (compat, ours)):
        with as_chgnet_is():
            eos = package.EquationOfState(model, use_device="cpu")
            eos.fit(salt, n_points=7)
        moduli.append(eos.get_bulk_modulus(unit="GPa"))
        assert eos.get_compressibility(unit="Pa^-1") == pytest.approx(1e-9 / moduli[-1])
    # both have relaxed to forces below 0.1 eV/A, not to the same point
    assert moduli[1] == pytest.approx(moduli[0], rel=0.02)


def test_a_crystal_without_a_minimum_gets_a_soft_barostat(ours: compat.CHGNet) -> None:
    """A free atom has the same energy at every volume."""
    lone = Atoms("Ar", cell=[15] * 3, pbc=True)
    calculator = compat.CHGNetCalculator(ours, on_isolated_atoms="ignore")
    with pytest.warns(UserWarning, match="no bulk modulus"):
        dynamics = compat.MolecularDynamics(lone, model=calculator, ensemble="npt")
    assert dynamics.bulk_modulus == 2.0


def test_features_of_the_crystal_are_logged(ours: compat.CHGNet, tmp_path: Path) -> None:
    path = tmp_path / "features.pkl"
    dynamics = compat.MolecularDynamics(
        rock_salt(), model=ours, ensemble="nve", crystal_feas_logfile=str(path), loginterval=2
    )
    dynamics.run(4)
    logged = pickle.loads(path.read_bytes())["crystal_feas"]
    assert len(logged) == 3
    last = ours.predict_structure(dynamics.atoms, return_crystal_feas=True)["crystal_fea"]
    np.testing.assert_array_equal(logged[-1], last)


def test_other_atoms_take_over(ours: compat.CHGNet) -> None:
    dynamics = compat.MolecularDynamics(rock_salt(), model=ours, ensemble="nve")
    other = rock_salt(2)
    dynamics.set_atoms(other)
    assert np.isfinite(other.get_potential_energy())
    assert dynamics.dyn.atoms is dynamics.atoms is other


@pytest.mark.parametrize("magmoms", [[0.0, 3.1, 0.1, 0.1], [0.0, 3.9, 0.1, 0.1], [0.0, 0.2, 0.1, 0.1]])
def test_charges_are_solved_as_by_chgnet(chgnet: SimpleNamespace, magmoms: list[float]) -> None:
    structure = lithium_manganate()
    structure.add_site_property("magmom", magmoms)
    with as_chgnet_is():
        expected = chgnet.solve_charge_by_mag(structure)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solved = compat.solve_charge_by_mag(structure)
    assert solved == expected
    assert (solved is None) == bool(caught)
    with pytest.raises(InputError, match="magmom"):
        compat.solve_charge_by_mag(lithium_manganate())


# In own words, what the README of chgnet shows; written for chgnet.
PREDICT = """
from chgnet.model.model import CHGNet
from pymatgen.core import Structure

model = CHGNet.load()
answer = model.predict_structure(Structure.from_file("crystal.cif"))
for name in ("energy", "forces", "stress", "magmom"):
    print(name, answer[name[0]])
transferred = CHGNet.load(model_name='r2scan')
"""
DYNAMICS_SCRIPT = """
import warnings
from ase.io.trajectory import Trajectory
from chgnet.model.dynamics import MolecularDynamics
from chgnet.model.model import CHGNet
from chgnet.utils import solve_charge_by_mag
from pymatgen.core import Structure
from pymatgen.io.ase import AseAtomsAdaptor

warnings.filterwarnings("ignore", module="ase")  # a thermostat that starts at 0 K divides by it
hot = MolecularDynamics(
    atoms=Structure.from_file("crystal.cif"), model=CHGNet.load(), ensemble="nvt", temperature=1000,
    timestep=2, trajectory="run.traj", logfile="run.log", loginterval=10,
)
hot.run(20)
frames = Trajectory("run.traj")
moments = frames[-1].get_magnetic_moments()
undecorated = AseAtomsAdaptor.get_structure(frames[-1])
charged = solve_charge_by_mag(undecorated)
"""
RELAX = """
from chgnet.model import StructOptimizer
from pymatgen.core import Structure

found = StructOptimizer().relax(Structure.from_file("crystal.cif"), verbose=False)
print(found["final_structure"], found['trajectory'].energies[-1])
"""


def through_compat(script: str) -> dict[str, Any]:
    """Run a script of chgnet after the replacement that docs/from-chgnet.md names."""
    for module in ("chgnet.model.dynamics", "chgnet.model.model", "chgnet.model", "chgnet.utils"):
        script = script.replace(f"from {module} import", "from fastchgnet.compat import")
    assert "from chgnet" not in script
    names: dict[str, Any] = {}
    exec(compile(script, "<script>", "exec"), names)
    return names


@pytest.fixture
def crystal_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Structure:
    """Enter a folder with a crystal."""
    monkeypatch.chdir(tmp_path)
    structure = lithium_manganate()
    structure.to(str(tmp_path / "crystal.cif"))
    return structure


def test_readme_prediction_runs(crystal_file: Structure, capsys: pytest.CaptureFixture[str]) -> None:
    names = through_compat(PREDICT)
    assert names["answer"].keys() == set("efsm")
    assert names["transferred"].version == "r2scan"
    assert capsys.readouterr().out.startswith("energy")


def test_readme_dynamics_runs(crystal_file: Structure) -> None:
    names = through_compat(DYNAMICS_SCRIPT)
    assert len(names["frames"]) == 3
    assert names["moments"].shape == (4,)
    assert set(names["undecorated"].site_properties) >= {"final_magmom"}
    assert {site.specie.oxi_state for site in names["charged"]} >= {1, -2}
    assert Path("run.log").read_text().startswith("Time[ps]")
    assert names["frames"][-1].calc.results["forces"].shape == (4, 3)
    names["frames"].close()


def test_readme_relaxation_runs(crystal_file: Structure) -> None:
    found = through_compat(RELAX)["found"]
    assert found["final_structure"].composition == crystal_file.composition
