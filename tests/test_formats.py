"""Readers: every format gives back what was written, and every broken file says what is wrong."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.units import GPa
from conftest import shared_data
from frames import labelled_atoms, labelled_frames

from fastchgnet.data.formats import detect_format, read_frames
from fastchgnet.data.frame import Frame, reduced_formula
from fastchgnet.data.reading import ReadOptions
from fastchgnet.errors import InputError
from fastchgnet.prediction import read_crystals


def assert_same(frame: Frame, atoms: Atoms, tolerance: float = 1e-7) -> None:
    """Compare with what was written; the files round to 8 decimals."""
    results = atoms.calc.results
    stress = results["stress"][[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)
    assert frame.numbers.tolist() == atoms.numbers.tolist()
    assert frame.pbc.tolist() == atoms.pbc.tolist()
    for found, written in (
        (frame.positions, atoms.positions),
        (frame.cell, atoms.cell.array),
        (frame.energy, results["energy"]),
        (frame.forces, results["forces"]),
        (frame.stress, stress),
    ):
        np.testing.assert_allclose(found, written, rtol=0, atol=tolerance)
    frame.check()


@pytest.mark.parametrize(
    "name", ["frames.xyz", "frames.extxyz", "frames.xyz.gz", "frames.traj", "frames.db", "ase.json"]
)
def test_round_trip(tmp_path: Path, name: str) -> None:
    written = labelled_atoms(6)
    path = tmp_path / name
    if name.endswith((".db", ".json")):
        with connect(path) as database:
            for atoms in written:
                database.write(atoms, config_type=atoms.info["config_type"])
    else:
        ase.io.write(path, written)
    frames = list(read_frames(path))
    assert len(frames) == 6
    for index, (frame, atoms) in enumerate(zip(frames, written, strict=True)):
        assert_same(frame, atoms)
        np.testing.assert_allclose(frame.magmoms, atoms.calc.results["magmoms"], atol=1e-7)
        assert frame.source == f"{name}:{index}"
        assert frame.config_type == atoms.info["config_type"]
        assert frame.group == reduced_formula(atoms.numbers)


def test_absent_labels_stay_absent(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "bare.xyz", bulk("Cu"))
    (frame,) = read_frames(tmp_path / "bare.xyz")
    assert np.isnan(frame.energy)
    assert frame.forces is None and frame.stress is None and frame.magmoms is None


@pytest.mark.parametrize("empty", ["", '""', "''", "[]"])
def test_an_empty_value_does_not_swallow_the_next_key(tmp_path: Path, empty: str) -> None:
    """ASE writes empty text as `note=`, and reads the key behind it as its value."""
    text = GOOD.replace("energy", f'note={empty} pbc="T T F" config_type={empty} energy')
    (tmp_path / "empty.xyz").write_text(text)
    (frame,) = read_frames(tmp_path / "empty.xyz")
    assert frame.pbc.tolist() == [True, True, False] and frame.energy == -1 and frame.config_type == "default"


def test_keys_units_and_sign_of_a_generic_file(tmp_path: Path) -> None:
    atoms = bulk("Cu")
    atoms.info.update(REF_energy=-3.5, REF_stress=np.diag([1.0, 2.0, 3.0]), group="copper", mp_id="mp-30")
    atoms.arrays["REF_forces"] = np.array([[0.1, 0.2, 0.3]])
    ase.io.write(tmp_path / "other.xyz", atoms)
    options = ReadOptions.of_user(
        energy_key="REF_energy",
        forces_key="REF_forces",
        stress_key="REF_stress",
        stress_unit="GPa",
        stress_sign="compression",
    )
    (frame,) = read_frames(tmp_path / "other.xyz", options)
    assert frame.energy == -3.5 and frame.group == "copper"
    np.testing.assert_array_equal(frame.forces, [[0.1, 0.2, 0.3]])
    np.testing.assert_allclose(frame.stress, -GPa * np.diag([1.0, 2.0, 3.0]))


def test_material_is_group_else_mp_id_else_formula(tmp_path: Path) -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    ase.io.write(tmp_path / "a.xyz", atoms)
    atoms.info["mp_id"] = "mp-22862"
    ase.io.write(tmp_path / "b.xyz", atoms)
    groups = [next(read_frames(tmp_path / name)).group for name in ("a.xyz", "b.xyz")]
    assert groups == ["ClNa", "mp-22862"]
    assert reduced_formula([8, 8, 8, 26, 26]) == "Fe2O3"


VASPRUN = """<modeling>
 <kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v></varray></kpoints>
 <parameters></parameters>
 <atominfo><array name="atoms"><set><rc><c>Na</c></rc><rc><c>Cl</c></rc></set></array></atominfo>
 <structure name="initialpos">{geometry}</structure>
 {steps}
</modeling>
"""
GEOMETRY = """<crystal><varray name="basis"><v>4 0 0</v><v>0 4 0</v><v>0 0 4</v></varray></crystal>
 <varray name="positions"><v>0 0 0</v><v>0.5 0.5 {z}</v></varray>"""
STEP = """<calculation>
 <scstep><energy><i name="e_fr_energy">-8.1</i><i name="e_0_energy">-8.0</i></energy></scstep>
 <structure>{geometry}</structure>
 <varray name="forces"><v>0 0 0.25</v><v>0 0 -0.25</v></varray>
 <varray name="stress"><v>10 0 0</v><v>0 20 0</v><v>0 0 30</v></varray>
 <energy><i name="e_fr_energy">-8.1</i><i name="e_0_energy">-8.0</i></energy>
</calculation>"""


def vasprun(n_steps: int) -> str:
    geometries = [GEOMETRY.format(z=0.5 + 0.01 * step) for step in range(n_steps)]
    steps = "\n".join(STEP.format(geometry=geometry) for geometry in geometries)
    return VASPRUN.format(geometry=geometries[0], steps=steps)


def test_vasprun_gives_every_ionic_step_and_the_energy_that_fits_the_forces(tmp_path: Path) -> None:
    path = tmp_path / "vasprun.xml"
    path.write_text(vasprun(3))
    assert detect_format(path) == "vasp"
    frames = list(read_frames(path))
    assert [frame.positions[1, 2] for frame in frames] == pytest.approx([2.0, 2.04, 2.08])
    assert frames[0].energy == pytest.approx(-8.1)
    # VASP's positive kbar is compression: ours is negative.
    np.testing.assert_allclose(frames[0].stress, -0.1 * GPa * np.diag([10.0, 20.0, 30.0]))
    sigma_to_zero = next(read_frames(path, ReadOptions(energy_key="energy")))
    assert sigma_to_zero.energy == pytest.approx(-8.0)


OUTCAR = """ POTCAR:    PAW_PBE Na 08Apr2002
 POTCAR:    PAW_PBE Cl 06Sep2000
 POTCAR:    PAW_PBE Na 08Apr2002
 POTCAR:    PAW_PBE Cl 06Sep2000
   ions per type =               1   1
   ISPIN  =      1    spin polarized calculation?
   k-points           NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands    NBANDS=      8
 k-points in reciprocal lattice and weights: gamma
   0.00000000  0.00000000  0.00000000       1.000
--------------------------------------- Iteration      1(   1)  ---------------------------------------
  in kB      10.00000    20.00000    30.00000     0.00000     0.00000     0.00000
      direct lattice vectors                 reciprocal lattice vectors
     4.000000000  0.000000000  0.000000000     0.250000000  0.000000000  0.000000000
     0.000000000  4.000000000  0.000000000     0.000000000  0.250000000  0.000000000
     0.000000000  0.000000000  4.000000000     0.000000000  0.000000000  0.250000000

 POSITION                                       TOTAL-FORCE (eV/Angst)
 -----------------------------------------------------------------------------------
      0.00000      0.00000      0.00000         0.000000      0.000000      0.250000
      2.00000      2.00000      2.00000         0.000000      0.000000     -0.250000
 -----------------------------------------------------------------------------------

  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)
  ---------------------------------------------------
  free  energy   TOTEN  =        -8.10000000 eV

  energy  without entropy=       -7.90000000  energy(sigma->0) =       -8.00000000
 General timing and accounting informations for this job:
"""


def test_outcar(tmp_path: Path) -> None:
    (tmp_path / "OUTCAR").write_text(OUTCAR)
    (frame,) = read_frames(tmp_path / "OUTCAR")
    assert frame.energy == pytest.approx(-8.1)
    np.testing.assert_allclose(frame.stress, -0.1 * GPa * np.diag([10.0, 20.0, 30.0]))
    np.testing.assert_array_equal(frame.forces, [[0, 0, 0.25], [0, 0, -0.25]])


def test_frames_before_the_cut_of_a_run_keep_their_places(tmp_path: Path) -> None:
    (tmp_path / "vasprun.xml").write_text(vasprun(3)[:-300])
    found, errors = read_crystals([tmp_path / "vasprun.xml"])
    assert [crystal.index for crystal in found] == [0, 1]
    assert len(errors) == 1 and "truncated" in str(errors[0])


def test_pymatgen_json(tmp_path: Path) -> None:
    pymatgen = pytest.importorskip("pymatgen.core")
    entries = pytest.importorskip("pymatgen.entries.computed_entries")
    structure = pymatgen.Structure(
        pymatgen.Lattice.from_parameters(3, 4, 5, 80, 95, 110), ["Li+", "O2-"], [[0, 0, 0], [0.4, 0.5, 0.6]]
    )
    entry = entries.ComputedStructureEntry(
        structure,
        -10.0,
        correction=-0.5,
        data={"forces": np.eye(3)[:2].tolist(), "stress": np.eye(3).tolist()},
    )
    (tmp_path / "one.json").write_text(json.dumps(structure.as_dict()))
    with gzip.open(tmp_path / "list.json.gz", "wt") as file:
        json.dump([entry.as_dict(), entry.as_dict()], file)
    (plain,) = read_frames(tmp_path / "one.json")
    assert np.isnan(plain.energy) and plain.forces is None
    np.testing.assert_allclose(plain.positions, structure.cart_coords, atol=1e-12)
    known = ReadOptions.of_user(stress_unit="kbar", stress_sign="compression")
    first, second = read_frames(tmp_path / "list.json.gz", known)
    assert first.energy == second.energy == -10.0 and first.group == "LiO"
    np.testing.assert_allclose(first.stress, -0.1 * GPa * np.eye(3))
    corrected = next(
        read_frames(tmp_path / "list.json.gz", known.model_copy(update={"energy_key": "corrected_energy"}))
    )
    assert corrected.energy == -10.5
    with pytest.raises(InputError, match=r"list.json.gz:0: .*--stress-unit"):
        next(read_frames(tmp_path / "list.json.gz"))
    structure.replace(0, {"Li": 0.5, "Na": 0.5})
    (tmp_path / "mixed.json").write_text(json.dumps(structure.as_dict()))
    with pytest.raises(InputError, match=r"mixed.json:0: the structure is disordered"):
        next(read_frames(tmp_path / "mixed.json"))


GOOD = '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1\nCu 0 0 0 0 0 0\n'
CIF = """data_x
_cell_length_a 4
_cell_length_b 4
_cell_length_c 4
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na1 0 0 0
Cl1 0.5 0.5 0.5
"""
HALF = "".join(GOOD.splitlines(keepends=True)[:2])


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("cut.xyz", GOOD + HALF, "cut.xyz:1: the file ends after 0 of 1 atoms; truncated"),
        ("line.xyz", GOOD + HALF + "Cu 0 0\n", "line.xyz:1: "),
        ("mixed.xyz", GOOD + "ITEM: TIMESTEP\n0\n", "mixed.xyz:1: expected a number of atoms"),
        ("element.xyz", GOOD + GOOD.replace("Cu", "Qq"), "element.xyz:1: unknown element"),
        ("energy.xyz", GOOD + GOOD.replace("=-1", "=nan"), "energy.xyz:1: the energy is NaN"),
        ("words.xyz", GOOD + GOOD.replace("=-1", "=low"), "words.xyz:1: "),
        ("text.xyz", GOOD.replace("=-1", "=T"), "text.xyz:0: the energy is True, not a number"),
        ("count.xyz", "9" * 30 + "\n" + GOOD, "count.xyz:0: expected a number of atoms"),
        ("digits.xyz", "9" * 5000 + "\n" + GOOD, "digits.xyz:0: expected a number of atoms"),
        ("wide.xyz", GOOD[:-1] + " 1\n", "wide.xyz:0: expected 7 columns"),
        ("cut_number.xyz", GOOD[:-1], "cut_number.xyz:0: the last line has no end"),
        ("no_pos.xyz", GOOD.replace("pos:", "foo:"), "no_pos.xyz:0: no positions"),
        ("pbc.xyz", GOOD.replace("energy", 'pbc="yes no no" energy'), "pbc.xyz:0: pbc is yes no no"),
        ("quote.xyz", GOOD.replace("energy", "by=O'Neil energy"), "quote.xyz:0: energy is no key of its own"),
        ("stress.xyz", GOOD.replace("energy", 'stress="0 1 0 0 0 0 0 0 0" energy'), "is not symmetric"),
        ("beyond.xyz", GOOD.replace("species:S", "Z:I").replace("Cu", "119"), "beyond.xyz:0: "),
        ("empty.xyz", "", "empty.xyz: the file is empty"),
        ("vasprun.xml", vasprun(2)[:-40], "vasprun.xml: truncated"),
        ("vasprun.xml", vasprun(2) + OUTCAR, "vasprun.xml: mixed"),
        ("OUTCAR", OUTCAR[:-70], "OUTCAR: truncated"),
        ("row.cif", CIF.replace("Na1 0", "Na 1 0"), "row.cif:0: cannot be read: UserWarning: Wrong number"),
        ("cut.json", '[{"@class": "Structure", "lattice"', "cut.json: what follows cannot be read"),
        ("text.json", "energy = 3", "text.json: not JSON"),
        ("other.json", '[{"a": 1}]', "other.json:0: neither a Structure nor"),
        ("number.json", " " * 100 + "[5]", "number.json:0: neither a Structure nor"),
        ("unknown.qqq", "hello", "unknown.qqq: unknown format"),
        ("broken.db", "hello", "broken.db:0: "),
    ],
)
def test_broken_files_name_file_frame_and_reason(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        for frame in read_frames(tmp_path / name):
            frame.check()
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_truncated_gzip(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        next(read_frames(tmp_path / "none.xyz"))
    packed = gzip.compress(GOOD.encode() * 5000)
    (tmp_path / "cut.xyz.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"cut\.xyz\.gz:\d+: cannot be read"):
        list(read_frames(tmp_path / "cut.xyz.gz"))


def test_unknown_choice_names_the_option() -> None:
    with pytest.raises(InputError, match="--stress-unit bar: "):
        ReadOptions.of_user(stress_unit="bar")


GOOD_FRAME = next(labelled_frames(1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"numbers": np.array([95])}, "unknown element Z = 95"),
        ({"numbers": np.array([0])}, "unknown element Z = 0"),
        ({"numbers": np.array([], int)}, "no atoms"),
        ({"positions": np.array([[0.0, np.nan, 0.0]])}, "positions contain NaN"),
        ({"positions": np.zeros((2, 3))}, "positions have shape"),
        ({"cell": np.diag([4.0, 4.0, np.inf])}, "cell contain NaN or infinity"),
        ({"cell": np.diag([4.0, 4.0, 0.0])}, "no volume"),
        ({"cell": np.array([[4.0, 0, 0], [4.0, 1e-5, 0], [0, 0, 4.0]])}, "no volume"),
        ({"cell": np.array([[4.0, 0, 0], [4.0, 0.2, 0], [0, 0, 4.0]])}, "atoms 0 and 0 overlap: 0.200 A"),
        ({"cell": np.diag([0.75, 0.75, 0.75])}, "0.422 A^3 for each atom, the least is 0.5 A^3"),
        ({"energy": float("inf")}, "energy is infinite"),
        ({"forces": np.zeros((2, 3))}, "forces have shape"),
        ({"forces": np.array([[0.0, 0.0, np.nan]])}, "forces contain NaN"),
        ({"stress": np.full((3, 3), np.nan)}, "stress contain NaN"),
        ({"stress": np.array([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]])}, "stress is not symmetric"),
        ({"magmoms": np.array([np.inf])}, "magmoms contain NaN"),
        ({"magmoms": np.array([[0.0, 0.0, 1.0]])}, "magmoms have shape (1, 3)"),
        ({"forces": np.array([[0.0, 0.0, 1e39]])}, "forces contain numbers above"),
        ({"energy": -1e30}, "energy is above"),
        ({"pbc": np.array([True, True])}, "pbc has shape (2,)"),
        ({"positions": np.array([[0.0, 0.0, 1e12]])}, "farther than 1e+06 A from the origin"),
        ({"cell": np.diag([1e5, 1e5, 1e5])}, "a lattice vector is longer"),
    ],
)
def test_check_refuses(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(GOOD_FRAME, **changes).check()
    assert str(caught.value).startswith(f"{GOOD_FRAME.source}: ") and reason in str(caught.value)


@pytest.mark.parametrize("pbc", [(True, True, False), (False, False, False)])
def test_atoms_too_far_apart_for_the_neighbour_search(pbc: tuple[bool, ...]) -> None:
    """Vesin ends the process there, by a division by zero."""
    apart = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1e6]])
    labels = {"forces": None, "magmoms": None, "stress": None}
    frame = replace(GOOD_FRAME, numbers=np.array([11, 17]), positions=apart, pbc=np.array(pbc), **labels)
    with pytest.raises(InputError, match=r"more than 10000 A apart along an axis that is not periodic"):
        frame.check()


@pytest.mark.parametrize("repeats", [1, 300])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, False)])
def test_overlap_across_the_boundary(pbc: tuple[bool, ...], repeats: int) -> None:
    """Only a periodic boundary brings an atom at one face close to one at the other; few and many atoms."""
    near = np.array([[0.0, 0.0, 0.1], [0.0, 0.0, 3.9]])
    columns = np.concatenate([near + np.array([3.0 * k, 0, 0]) for k in range(repeats)])
    frame = replace(
        GOOD_FRAME,
        numbers=np.full(len(columns), 29),
        positions=columns + np.array([0, 8.0, 0]),
        cell=np.diag([3.0 * repeats, 4.0, 4.0]),
        pbc=np.array(pbc),
        forces=None,
        magmoms=None,
    )
    if pbc[2]:
        with pytest.raises(InputError, match=r"overlap: 0\.200 A"):
            frame.check()
    else:
        frame.check()


def test_partial_and_no_periodicity_are_no_flaw(tmp_path: Path) -> None:
    water = molecule("H2O")
    slab = bulk("Cu", cubic=True)
    slab.pbc, slab.cell[2] = (True, True, False), 0
    for atoms in (water, slab):
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    ase.io.write(tmp_path / "mixed.xyz", [water, slab])
    frames = list(read_frames(tmp_path / "mixed.xyz"))
    for frame, atoms in zip(frames, (water, slab), strict=True):
        frame.check()
        assert frame.pbc.tolist() == atoms.pbc.tolist()


def test_real_files_have_no_bad_frame() -> None:
    frames = list(read_frames(shared_data() / "dft" / "val.xyz"))
    assert len(frames) == 688
    for frame in frames:
        frame.check()


def test_disordered_crystals_are_refused_and_not_replaced(tmp_path: Path) -> None:
    """ASE reads such a site as its main species."""
    pymatgen = pytest.importorskip("pymatgen.core")
    lattice = pymatgen.Lattice.cubic(4.2)
    structure = pymatgen.Structure(lattice, [{"Mg": 0.5, "Fe": 0.5}, "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    structure.to(filename=str(tmp_path / "mixed.cif"))
    with pytest.raises(InputError, match=r"mixed.cif:0: partially occupied"):
        list(read_frames(tmp_path / "mixed.cif"))
