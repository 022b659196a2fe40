"""chgnet's relaxation and dynamics through `fastchgnet.compat`, and the examples of its README."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.md.velocitydistribution import Stationary
from pymatgen.core import Structure
from pymatgen.io.ase import AseAtomsAdaptor
from side_by_side import as_chgnet_is, chgnet_package, lithium_manganate, our_model, rock_salt, their_model

from fastchgnet import compat
from fastchgnet.compat.structures import to_structure
from fastchgnet.errors import InputError


@pytest.fixture
def chgnet() -> SimpleNamespace:
    return chgnet_package()


@pytest.fixture
def theirs() -> Any:
    return their_model()


@pytest.fixture
def ours() -> compat.CHGNet:
    return our_model()


@pytest.mark.parametrize("relax_cell", [True, False])
def test_relaxation_takes_the_path_of_chgnets(
    chgnet: SimpleNamespace, ours: compat.CHGNet, theirs: Any, tmp_path: Path, relax_cell: bool
) -> None:
    options = {"fmax": 0.1, "relax_cell": relax_cell, "verbose": False, "steps": 12}
    paths = [tmp_path / "theirs.pkl", tmp_path / "ours.pkl"]
    with as_chgnet_is():
        optimizer = chgnet.StructOptimizer(theirs, use_device="cpu")
        expected = optimizer.relax(lithium_manganate(), save_path=str(paths[0]), **options)
    optimizer = compat.StructOptimizer(ours, use_device="cpu")
    result = optimizer.relax(lithium_manganate(), save_path=str(paths[1]), **options)
    assert result.keys() == expected.keys()
    mine, reference = result["trajectory"], expected["trajectory"]
    # ten times what rounding in float32 did to this path, which is long for the forces
    tolerance = dict.fromkeys(("energies", "stresses", "magmoms", "atom_positions", "cells"), 1e-4)
    for name, atol in (tolerance | {"forces": 2e-3}).items():
        np.testing.assert_allclose(getattr(mine, name), getattr(reference, name), atol=atol, err_msg=name)
    assert len(mine) == len(reference)
    assert mine.energies[-1] < mine.energies[0] - 0.1
    final, theirs_final = result["final_structure"], expected["final_structure"]
    assert type(final) is type(theirs_final)
    assert final.volume == pytest.approx(theirs_final.volume, rel=1e-4)
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


def test_structures_have_no_moments_of_other_atoms(ours: compat.CHGNet) -> None:
    calculator, salt = compat.CHGNetCalculator(ours), rock_salt()
    salt.calc = calculator
    salt.get_potential_energy()
    assert "final_magmom" in to_structure(salt).site_properties
    other = bulk("NaCl", "rocksalt", a=5.6)
    other.calc = calculator
    assert len(to_structure(other)) == 2
    salt.rattle(0.01)
    assert "final_magmom" not in to_structure(salt).site_properties


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


def test_charges_of_sites_without_moments_are_not_solved() -> None:
    structure = lithium_manganate()
    structure.add_site_property("magmom", [0.0, None, 0.1, 0.1])
    with pytest.warns(UserWarning, match="Failed to solve"):
        assert compat.solve_charge_by_mag(structure) is None


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
