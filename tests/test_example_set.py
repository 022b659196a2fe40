"""The embedded example set: complete, honest about its labels, and what its script makes."""

import importlib.util
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read
from ase.neighborlist import neighbor_list

from fastchgnet.config import load_run_config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EXAMPLE_SET = EXAMPLES / "prototypes.xyz"


def load_script():
    spec = importlib.util.spec_from_file_location("make_prototypes", EXAMPLES / "make_prototypes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_prototypes = load_script()


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return read(EXAMPLE_SET, ":")


def test_set_is_small_and_holds_every_prototype(frames):
    assert EXAMPLE_SET.stat().st_size <= 3e6
    expected = {
        name: n_frames * len(materials.split(", "))
        for name, (_, n_frames, materials) in make_prototypes.PROTOTYPES.items()
    }
    assert Counter(atoms.info["config_type"] for atoms in frames) == expected


def test_frames_say_that_the_labels_are_not_dft(frames):
    assert {atoms.info["source"] for atoms in frames} == {"chgnet-0.3.0"}


def test_labels_are_complete_and_finite(frames):
    for atoms in frames:
        labels = (atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress())
        moments = atoms.calc.results["magmoms"]
        assert moments.shape == (len(atoms),)
        assert all(np.isfinite(values).all() for values in (*labels, moments))
        assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 30  # eV/A, about the edge of MPtrj


def test_no_atom_is_crowded_or_alone(frames):
    for atoms in frames:
        center, distance = neighbor_list("id", atoms, cutoff=6.0)
        assert distance.min() > 1.0
        assert np.bincount(center, minlength=len(atoms)).min() > 0


def test_every_element_is_in_several_materials(frames):
    """Whatever materials the split holds out, training sees every element."""
    materials = defaultdict(set)
    for atoms in frames:
        for symbol in atoms.symbols:
            materials[symbol].add(atoms.info["group"])
    assert min(map(len, materials.values())) >= 4


def test_script_makes_the_geometries_of_the_set(frames):
    made = make_prototypes.geometries()
    assert len(made) == len(frames)
    for index in (0, len(frames) - 1):
        np.testing.assert_array_equal(made[index].numbers, frames[index].numbers)
        # Bit-identity would need the same linear algebra on every machine; 1e-7 A is beyond any label.
        np.testing.assert_allclose(made[index].positions, frames[index].positions, rtol=0, atol=1e-7)
        np.testing.assert_allclose(made[index].cell.array, frames[index].cell.array, rtol=0, atol=1e-7)
        assert made[index].info["group"] == frames[index].info["group"]


def test_configuration_is_valid():
    assert load_run_config(EXAMPLES / "example.yaml").model.readout == "conservative"
