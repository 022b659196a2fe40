"""`prepare`: files into a store from the command line, and stresses that contradict the energies."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import GPa
from conftest import shared_data
from frames import labelled_atoms
from typer.testing import CliRunner

from fastchgnet.cli import app
from fastchgnet.config import Provenance
from fastchgnet.data.prepare import Prepared, prepare
from fastchgnet.data.reading import ReadOptions, StressSign, StressUnit
from fastchgnet.errors import InputError


def energy_volume_curve() -> list[Atoms]:
    """Strained and rattled copper with the energies, forces and stresses of one potential."""
    rng = np.random.default_rng(0)
    frames = []
    for scale in np.linspace(0.94, 1.05, 9):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell.array * scale + rng.normal(size=(3, 3)) * 0.01, scale_atoms=True)
        atoms.rattle(0.02, rng=rng)
        atoms.calc = EMT()
        energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
        frames.append(atoms)
    return frames


def prepare_atoms(folder: Path, atoms: list[Atoms], options: ReadOptions) -> Prepared:
    ase.io.write(folder / "curve.xyz", atoms)
    return prepare([folder / "curve.xyz"], folder / "store", options, Provenance(name="test"))


@pytest.mark.parametrize("sign", list(StressSign))
@pytest.mark.parametrize("unit", list(StressUnit))
def test_wrong_sign_and_unit_are_told(tmp_path: Path, unit: StressUnit, sign: StressSign) -> None:
    """Read a file of each unit and sign as if it were ASE's own; the advice must name the truth."""
    per_unit = {StressUnit.EV_A3: 1.0, StressUnit.GPA: 1 / GPa, StressUnit.KBAR: 10 / GPa}[unit]
    atoms = energy_volume_curve()
    for frame in atoms:
        frame.calc.results["stress"] *= per_unit * (1 if sign is StressSign.TENSION else -1)
    check = prepare_atoms(tmp_path, atoms, ReadOptions()).pressure
    assert check.n_pairs == 8
    if (unit, sign) == (StressUnit.EV_A3, StressSign.TENSION):
        # The trapezoid rule over strains of 1 %: the work is right within a few per cent.
        assert check.ratio == pytest.approx(1, abs=0.05) and check.agreement == 1 and check.advice is None
    else:
        assert check.advice.endswith(f"pass --stress-unit {unit} --stress-sign {sign}")


def test_declared_unit_and_sign_end_the_warning(tmp_path: Path) -> None:
    atoms = energy_volume_curve()
    for frame in atoms:
        frame.calc.results["stress"] *= -10 / GPa
    declared = ReadOptions.of_user(stress_unit="kbar", stress_sign="compression")
    prepared = prepare_atoms(tmp_path, atoms, declared)
    assert prepared.pressure.ratio == pytest.approx(1, abs=0.05)
    assert prepared.warnings == ()


def test_random_stresses_prove_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    atoms = energy_volume_curve()
    for frame in atoms:
        frame.calc.results["stress"] = rng.normal(size=6) * 10.0 ** rng.uniform(-4, 0)
    assert prepare_atoms(tmp_path, atoms, ReadOptions()).pressure.advice is None


def test_real_labels_give_no_false_alarm(tmp_path: Path) -> None:
    path = shared_data() / "dft" / "train.xyz"
    prepared = prepare([path], tmp_path / "store", ReadOptions(), Provenance(name="test"))
    assert prepared.counts.n_frames == 6118 and prepared.counts.n_skipped == 0
    assert prepared.pressure.n_pairs > 20
    assert prepared.warnings == ()


def test_missing_labels_are_told(tmp_path: Path) -> None:
    prepared = prepare_atoms(tmp_path, [bulk("Cu"), bulk("Ag")], ReadOptions())
    assert any("--energy-key" in warning for warning in prepared.warnings)


def run(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; an InputError is returned as status 2, as `main` does."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, InputError):
        return 2, result.stdout, str(result.exception)
    return result.exit_code, result.stdout, result.stderr


def test_command_on_good_bad_and_mixed_input(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.xyz", tmp_path / "bad.xyz"
    ase.io.write(good, labelled_atoms(8))
    atoms = labelled_atoms(8)
    atoms[3].positions[0] = np.nan
    ase.io.write(bad, atoms)
    status, out, _ = run("prepare", good, "--out", tmp_path / "a", "--functional", "PBE", "--json")
    summary = json.loads(out)
    assert status == 0
    assert summary["counts"]["n_frames"] == 8 and summary["provenance"]["functional"] == "PBE"
    status, _, error = run("prepare", good, bad, "--out", tmp_path / "b")
    assert status == 2 and error.startswith("bad.xyz:3: positions contain NaN") and "\n" not in error
    assert not (tmp_path / "b").exists()
    status, out, error = run("prepare", good, bad, "--out", tmp_path / "b", "--skip-bad", "--json")
    assert status == 1 and "skipped: bad.xyz:3: positions contain NaN" in error
    assert json.loads(out)["counts"]["n_frames"] == 15
    assert run("prepare", tmp_path / "none.xyz", "--out", tmp_path / "c")[0] == 2
    assert run("prepare", good, "--out", tmp_path / "a")[2].endswith("choose another name or remove it")


def test_equal_file_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("run1", "run2"):
        (tmp_path / name).mkdir()
        ase.io.write(tmp_path / name / "frames.xyz", labelled_atoms(1))
    from fastchgnet.data.store import Store

    files = [tmp_path / name / "frames.xyz" for name in ("run1", "run2")]
    prepare(files, tmp_path / "store", ReadOptions(), Provenance(name="test"))
    assert Store(tmp_path / "store").ids(np.arange(2)) == ["run1/frames.xyz:0", "run2/frames.xyz:0"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_file_names_that_are_not_text(tmp_path: Path) -> None:
    from fastchgnet.data.store import Store

    path = tmp_path / os.fsdecode(b"bad\xff.xyz")
    ase.io.write(path, labelled_atoms(1))
    prepared = prepare([path], tmp_path / "store", ReadOptions(), Provenance(name="test"))
    assert prepared.counts.n_frames == 1
    assert Store(tmp_path / "store").ids(np.arange(1)) == [r"bad\xff.xyz:0"]
