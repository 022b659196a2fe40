"""The calculator inside other people's workflows: ASE's own tools, matcalc, atomate2.

matcalc and atomate2 are no dependencies of the tests; `make test-workflows` installs them beside them.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

import fastchgnet
from fastchgnet.potential import Potential

third_party = pytest.mark.filterwarnings("default")
"""Their warnings are not ours."""

CALCULATOR = {"model": "chgnet-0.3.0", "device": "cpu", "dtype": "float64"}


@pytest.fixture(scope="module")
def model() -> Potential:
    return fastchgnet.load(*CALCULATOR.values())


@pytest.fixture(scope="module")
def properties() -> ModuleType:
    """Return examples/properties.py."""
    path = Path(__file__).parents[1] / "examples" / "properties.py"
    spec = importlib.util.spec_from_file_location("properties", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def oxide(model: Potential, properties: ModuleType) -> Atoms:
    """Return relaxed MgO with a calculator."""
    atoms = bulk("MgO", "rocksalt", a=4.21)
    atoms.calc = fastchgnet.FastCHGNetCalculator(model)
    return properties.relaxed(atoms)


def assert_stiffness_of_a_stable_cubic_crystal(stiffness: np.ndarray) -> None:
    # noise of the stresses of symmetric crystals is 1e-8 GPa; matcalc's fits of four strains add percents
    np.testing.assert_allclose(stiffness, stiffness.T, atol=0.01 * stiffness.max())
    np.testing.assert_allclose(stiffness[:3, 3:], 0, atol=0.01 * stiffness.max())
    np.testing.assert_allclose(np.diag(stiffness)[:3], stiffness[0, 0], rtol=0.02)
    assert np.linalg.eigvalsh(stiffness).min() > 0


def test_energies_and_stresses_give_the_same_bulk_modulus(properties: ModuleType, oxide: Atoms) -> None:
    stiffness = properties.elastic_constants(oxide)
    assert_stiffness_of_a_stable_cubic_crystal(stiffness)
    # (C11 + 2 C12) / 3; the fit to energies takes strains three times as large
    assert properties.bulk_modulus(oxide) == pytest.approx(stiffness[0, :3].sum() / 3, rel=0.05)


def test_phonons_of_a_stable_crystal(properties: ModuleType, oxide: Atoms) -> None:
    at_gamma, between = properties.frequencies(oxide, [[0, 0, 0], [1 / 3, 1 / 3, 0]])
    np.testing.assert_allclose(at_gamma[:3], 0, atol=1e-3)  # the crystal as a whole moves freely
    np.testing.assert_allclose(at_gamma[3:], at_gamma[3], rtol=1e-5)
    assert between.min() > 0
    # transverse modes on the way from Gamma to X are degenerate
    np.testing.assert_allclose(between[[0, 3]], between[[1, 4]], rtol=1e-3)


@pytest.mark.slow
def test_a_barrier_lies_between_its_ends(properties: ModuleType, model: Potential) -> None:
    metal = bulk("Al")
    metal.calc = fastchgnet.FastCHGNetCalculator(model)
    start, end = properties.vacancy_hop(properties.relaxed(metal))
    # both ends are the same crystal
    assert start.get_potential_energy() == pytest.approx(end.get_potential_energy(), abs=1e-3)
    assert 0.01 < properties.barrier(model, start, end, n_images=1) < 2


@third_party
def test_matcalc(oxide: Atoms) -> None:
    matcalc = pytest.importorskip("matcalc")
    # pymatgen's structure would get the moments that the calculator computed last, of another crystal
    oxide = oxide.copy()
    calculator = fastchgnet.FastCHGNetCalculator(**CALCULATOR)
    elastic = matcalc.ElasticityCalc(calculator, fmax=1e-3, units_GPa=True).calc(oxide)
    assert_stiffness_of_a_stable_cubic_crystal(np.array(elastic["elastic_tensor"].voigt))
    states = matcalc.EOSCalc(calculator, fmax=1e-3, max_abs_strain=0.01).calc(oxide)
    assert states["r2_score_bm"] > 0.999
    assert states["bulk_modulus_bm"] == pytest.approx(elastic["bulk_modulus_vrh"], rel=0.05)
    vibrations = matcalc.PhononCalc(
        calculator, supercell_matrix=np.diag([3, 3, 3]), fmax=1e-4, write_phonon=False
    ).calc(oxide)
    phonon = vibrations["phonon"]
    phonon.run_qpoints([[0, 0, 0], [1 / 3, 1 / 3, 0]])
    at_gamma, between = phonon.qpoints.frequencies  # THz
    # displacements of 0.015 A leave anharmonic traces at Gamma
    np.testing.assert_allclose(at_gamma[:3], 0, atol=0.1)
    assert between.min() > 1
    heat_capacity = vibrations["thermal_properties"]["heat_capacity"]
    # J/K/mol of formula units, towards the 6 k_B of two classical atoms
    assert (np.diff(heat_capacity) > 0).all()
    assert 0.9 * 6 * 8.314 < heat_capacity[-1] < 6 * 8.314


@third_party
def test_atomate2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atomate2")
    from atomate2.forcefields.jobs import ForceFieldRelaxMaker, ForceFieldStaticMaker
    from jobflow import Flow, JobStore, run_locally
    from maggma.stores import MemoryStore
    from monty.json import MontyDecoder, MontyEncoder
    from pymatgen.io.ase import AseAtomsAdaptor

    monkeypatch.chdir(tmp_path)
    salt = bulk("NaCl", "rocksalt", a=5.5)
    salt.rattle(0.1, seed=1)
    which = {
        "force_field_name": "Forcefield",
        "calculator_meta": "fastchgnet.FastCHGNetCalculator",
        "calculator_kwargs": CALCULATOR,
    }
    relax = ForceFieldRelaxMaker(**which, relax_kwargs={"fmax": 0.01}).make(
        AseAtomsAdaptor.get_structure(salt)
    )
    static = ForceFieldStaticMaker(**which).make(relax.output.structure)
    # what a queue does with it on the way to a worker
    flow = json.loads(json.dumps(Flow([relax, static]), cls=MontyEncoder), cls=MontyDecoder)
    store = JobStore(MemoryStore(), additional_stores={"data": MemoryStore()})
    answers = run_locally(flow, store=store, ensure_success=True)
    relaxed, again = (answers[job.uuid][1].output for job in (relax, static))
    assert relaxed.is_force_converged
    assert np.abs(np.array(relaxed.output.forces)).max() < 0.01
    assert again.output.energy == pytest.approx(relaxed.output.energy, abs=1e-9)
    assert relaxed.output.energy < fastchgnet.predict(fastchgnet.load(*CALCULATOR.values()), [salt])[0].energy
    assert (relaxed.forcefield_name, relaxed.forcefield_version) == (
        "FastCHGNetCalculator",
        fastchgnet.__version__,
    )
