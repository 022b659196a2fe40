"""`fastchgnet relax`: its files, its statuses, and going on after being stopped at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc100
from ase.constraints import FixAtoms
from crystals import benzene, crystals, potential, rattled

from fastchgnet.cli import main
from fastchgnet.config import ModelConfig
from fastchgnet.errors import InputError
from fastchgnet.graph import Output
from fastchgnet.sim.moving import MovingSystems
from fastchgnet.sim.relax import files as relax_files
from fastchgnet.sim.relax import terminal as relax_terminal
from fastchgnet.sim.relax.record import Key, Record
from fastchgnet.weights import save_potential

SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))
MODEL = ("--model", "model.safetensors", "--dtype", "float64")

Cli = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Leave small crystals to one thread: on a busy machine several would wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def cli(monkeypatch, capsys) -> Cli:
    """Run the program in this process; return its status, what it prints, and the lines of stderr."""

    def run(*args: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["fastchgnet", "relax", *map(str, args), *MODEL])
        with pytest.raises(SystemExit) as exited:
            main()
            sys.exit(0)
        captured = capsys.readouterr()
        return int(exited.value.code or 0), captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Make a folder of crystals and a model, and work in it."""
    monkeypatch.chdir(tmp_path)
    save_potential(potential(SMALL), "model.safetensors")
    ase.io.write("crystals.xyz", crystals(), format="extxyz")
    ase.io.write("copper.cif", rattled(bulk("Cu")))
    return tmp_path


def rows() -> list[dict]:
    return [json.loads(line) for line in Path("relaxed.jsonl").read_text().splitlines()]


def entered(monkeypatch) -> list[int]:
    """Count the crystals that are relaxed by each command."""
    counts: list[int] = []
    select = relax_files.systems_from_frames

    def counted(frames) -> object:
        frames = list(frames)
        counts.append(len(frames))
        return select(frames)

    monkeypatch.setattr(relax_files, "systems_from_frames", counted)
    return counts


def test_results_come_in_the_order_of_the_input(cli, folder) -> None:
    files = ("copper.cif", "crystals.xyz")
    status, out, lines = cli(*files, "--steps", 12, "--json", "--trajectory", "steps")
    assert (status, lines) == (0, [])
    assert json.loads(out) == rows()
    keys = [("copper.cif", 0), *(("crystals.xyz", index) for index in range(4))]
    assert [(row["file"], row["index"]) for row in rows()] == keys
    assert {row["reason"] for row in rows()} == {"converged", "out of steps"}
    frames = ase.io.read("relaxed.extxyz", ":")
    assert [frame.info["index"] for frame in frames] == [0, 0, 1, 2, 3]
    for row, atoms in zip(rows(), frames, strict=True):
        assert len(row["energies"]) == len(row["fmaxs"]) == row["steps"] + 1
        assert row["converged"] == (row["fmax"] < 0.05)
        assert row["converged"] or row["steps"] == 12
        assert row["energies"][-1] == row["energy"] == pytest.approx(row["energy_per_atom"] * len(atoms))
        assert atoms.get_potential_energy() == row["energy"]
        assert atoms.get_forces().shape == (len(atoms), 3)
        assert len(atoms.get_magnetic_moments()) == len(atoms)
        # a file has eight decimals
        assert atoms.get_volume() == pytest.approx(row["volume"], abs=1e-4)
        path = f"steps/{row['file']}-{row['index']}.extxyz"
        steps = ase.io.read(path, ":")
        assert [step.get_potential_energy() for step in steps] == row["energies"]
        np.testing.assert_allclose(steps[-1].positions, atoms.positions, atol=1e-8)
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith((".", "relaxed"))) == [
        "relaxed.extxyz",
        "relaxed.jsonl",
    ]


def test_finished_crystals_are_not_relaxed_again(cli, folder, monkeypatch) -> None:
    counts = entered(monkeypatch)
    assert cli("crystals.xyz", "--steps", 3)[0] == 0
    before = rows()
    assert cli("copper.cif", "crystals.xyz", "--steps", 3, "--batch-size", 2)[0] == 0
    assert cli("copper.cif", "crystals.xyz", "--steps", 3)[0] == 0
    assert counts == [4, 1, 0]
    assert rows()[1:] == before
    # crystals that are no longer asked for stay
    assert cli("copper.cif", "--steps", 3)[0] == 0
    assert len(rows()) == len(ase.io.read("relaxed.extxyz", ":")) == 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--fmax", 0.1), "fmax 0.05, not 0.1"),
        (("--steps", 4), "steps 3, not 4"),
        (("--cell", "fixed"), "cell full, not fixed"),
        (("--pressure", 1), "pressure 0.0, not 1"),
    ],
)
def test_a_record_of_other_options_is_refused(cli, folder, options, named) -> None:
    assert cli("copper.cif", "--steps", 3)[0] == 0
    before = Path("relaxed.jsonl").read_bytes(), Path("relaxed.extxyz").read_bytes()
    status, out, lines = cli("copper.cif", "--steps", 3, *options)
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: relaxed.jsonl: was made with ") and named in lines[0]
    assert before == (Path("relaxed.jsonl").read_bytes(), Path("relaxed.extxyz").read_bytes())


def test_a_record_of_another_model_or_crystal_is_refused(cli, folder) -> None:
    assert cli("copper.cif", "--steps", 3)[0] == 0
    save_potential(potential(SMALL, seed=1), "model.safetensors")
    status, _, (line,) = cli("copper.cif", "--steps", 3)
    assert status == 2 and "weights" in line
    save_potential(potential(SMALL), "model.safetensors")
    ase.io.write("copper.cif", rattled(bulk("Cu"), seed=1))
    status, _, (line,) = cli("copper.cif", "--steps", 3)
    assert status == 2 and "copper.cif:0 has changed since" in line
    Path("relaxed.jsonl").write_text('{"epoch": 3}\n')
    status, _, (line,) = cli("copper.cif", "--steps", 3)
    assert status == 2 and "line 1 is not of a relaxation" in line


def test_bad_files_are_listed_and_the_rest_runs(cli, folder) -> None:
    Path("empty.xyz").touch()
    status, _, lines = cli("nowhere.cif", "copper.cif", "empty.xyz", "--steps", 1)
    assert status == 1
    assert [line.split(":")[1] for line in lines] == [" nowhere.cif", " empty.xyz"]
    assert [row["file"] for row in rows()] == ["copper.cif"]
    # and again, although nothing is left to do
    assert cli("nowhere.cif", "copper.cif", "--steps", 1)[0] == 1


@pytest.mark.filterwarnings("default")  # the command prints them
def test_failures_are_listed_and_keep_their_last_good_frame(cli, folder) -> None:
    ase.io.write("molecule.xyz", benzene(), format="extxyz")
    options = ("--steps", 20, "--fmax", 1e-9, "--pressure", -160)
    status, _, lines = cli("copper.cif", "molecule.xyz", *options)
    assert status == 1
    assert lines[0].startswith("warning: molecule.xyz:0: not periodic")
    assert lines[1].startswith("error: copper.cif:0: the cell has ") and len(lines) == 2
    failed, done = ase.io.read("relaxed.extxyz", ":")
    assert failed.info["reason"].startswith("the cell has")
    assert np.isfinite(failed.get_forces()).all()
    assert not done.info["converged"] and done.info["reason"] == "out of steps"
    assert [row["failed"] for row in rows()] == [True, False]
    assert cli("copper.cif", *options)[0] == 2  # a record alone; nothing sound is asked for


def test_a_model_that_says_nothing_ends_in_status_2(cli, folder, monkeypatch) -> None:
    evaluate = MovingSystems.evaluate

    def silent(moving, position, cell) -> Output:
        output = evaluate(moving, position, cell)
        return output._replace(energy=output.energy * np.nan)

    monkeypatch.setattr(MovingSystems, "evaluate", silent)
    status, _, lines = cli("copper.cif", "--trajectory", "steps")
    assert (status, lines) == (2, ["error: copper.cif:0: the model's prediction is not finite"])
    (row,) = rows()
    assert row["failed"] and row["energy"] is None and row["energies"] == []
    assert len(ase.io.read("relaxed.extxyz", ":")) == 1 and not Path("steps").exists()


def test_wrong_options_end_in_one_line(cli, folder) -> None:
    for options, named in (
        (("nowhere.cif",), "nowhere.cif: no such file"),
        (("copper.cif", "--fmax", 0), "fmax must be above 0"),
        (("copper.cif", "--steps", -1), "steps must not be negative"),
        (("copper.cif", "--cell", "round"), "cell 'round': choose full, fixed"),
        (("copper.cif", "--pressure", "nan"), "pressure must be a number"),
        (("copper.cif", "--out", "out.cif"), "out.cif: relaxed crystals are written as .extxyz"),
        (("copper.cif", "--out", "copper.cif/out.extxyz"), "cannot be written"),
        (("relaxed.extxyz",), "is one of the files to relax"),
    ):
        status, out, lines = cli(*options)
        assert (status, out, len(lines)) == (2, "", 1)
        assert lines[0].startswith("error: ") and named in lines[0]


def test_constraints_of_files_are_kept(cli, folder) -> None:
    slab = fcc100("Al", (1, 1, 4), vacuum=5.0)
    slab.info.clear()
    slab.rattle(0.05, seed=0)
    held = [0, 3]
    slab.set_constraint(FixAtoms(held))
    ase.io.write("POSCAR", slab)
    ase.io.write("slab.xyz", [bulk("Cu"), slab], format="extxyz")
    Path("partly").write_text(Path("POSCAR").read_text().replace("F   F   F", "F   T   F", 1))
    Path("partly").rename("partly.vasp")
    status, _, lines = cli(
        "POSCAR", "slab.xyz", "partly.vasp", "--cell", "fixed", "--fmax", 1e-9, "--steps", 20
    )
    assert status == 1
    assert lines == [
        line for line in lines if line.startswith("error: partly.vasp:0: ") and "FixScaled" in line
    ]
    for atoms in ase.io.read("relaxed.extxyz", ":")[::2]:
        moved = np.linalg.norm(atoms.positions - slab.positions, axis=1)
        assert moved[held].max() < 1e-6 < moved[[1, 2]].min()
        assert atoms.constraints[0].get_indices().tolist() == held


def test_a_page_shows_curves_and_crystals(cli, folder) -> None:
    pytest.importorskip("chemiscope")
    pytest.importorskip("plotly")
    assert cli("crystals.xyz", "copper.cif", "--steps", 3, "--report", "page.html")[0] == 0
    page = Path("page.html").read_text()
    for text in ("copper.cif:0", "Longest force", "O3SrTi", "pressure 0 GPa", "out of steps"):
        assert text in page


def stopped_after(n: int, monkeypatch) -> None:
    """Let Ctrl-C come before step n."""
    calls = iter([False] * n)
    monkeypatch.setattr(relax_terminal.TerminalWatcher, "stops", lambda watcher: next(calls, True))


def test_ctrl_c_leaves_complete_files(cli, folder, monkeypatch) -> None:
    options = ("crystals.xyz", "copper.cif", "--steps", 4, "--batch-size", 2)
    with monkeypatch.context() as patch:
        stopped_after(7, patch)
        status, _, lines = cli(*options)
    assert status == 130
    n_done = len(rows())
    assert 0 < n_done < 5
    assert lines[-1].startswith(f"stopped: {5 - n_done} crystals are left")
    assert len(ase.io.read("relaxed.extxyz", ":")) == n_done
    assert not list(Path().glob(".relaxed*"))
    counts = entered(monkeypatch)
    assert cli(*options)[0] == 0
    assert counts == [5 - n_done]
    assert [(row["file"], row["index"]) for row in rows()][3:] == [("crystals.xyz", 3), ("copper.cif", 0)]


def test_the_same_command_goes_on_after_sigkill_and_sigint(cli, folder, monkeypatch) -> None:
    structures = [rattled(atoms, 0.02, seed) for seed in range(2) for atoms in crystals()]
    ase.io.write("many.xyz", structures, format="extxyz")
    options = ("many.xyz", "--steps", "15", "--fmax", "1e-9", "--batch-size", "2")
    command = [sys.executable, "-m", "fastchgnet", "relax", *options, *MODEL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    n_done = [0]
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        ) as run:
            while run.poll() is None and n_lines() < n_done[-1] + 2:
                time.sleep(0.01)
            run.send_signal(number)
            run.communicate()
        assert run.returncode == status
        n_done.append(n_lines())
    assert all(before < after < 8 for before, after in pairwise(n_done))
    counts = entered(monkeypatch)
    assert cli(*options)[0] == 0
    assert counts == [8 - n_done[-1]]
    pieces = rows()
    assert cli(*options, "--out", "whole.extxyz")[0] == 0
    whole = [json.loads(line) for line in Path("whole.jsonl").read_text().splitlines()]
    for piece, once in zip(pieces, whole, strict=True):
        assert (piece["index"], piece["steps"], piece["start"]) == (
            once["index"],
            once["steps"],
            once["start"],
        )
        # rounding: the crystals were in other batches
        np.testing.assert_allclose(piece["energies"], once["energies"], rtol=0, atol=1e-8)
    assert [frame.info["index"] for frame in ase.io.read("relaxed.extxyz", ":")] == list(range(8))


def n_lines() -> int:
    path = Path("relaxed.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


STARTS: dict[Key, str] = {("a b.xyz", index): str(index) for index in range(3)}


def filled(folder: Path) -> Record:
    """Write a record and leave it as a killed process would."""
    record = Record(folder / "out.extxyz", {"fmax": 0.05}, STARTS)
    for (file, index), start in STARTS.items():
        row = {"file": file, "index": index, "start": start, "failed": False}
        record.add((file, index), row, Atoms("Cu", positions=[(index, 0, 0)], cell=[3, 3, 3], pbc=True))
    return record


@pytest.mark.parametrize("torn", [".out.extxyz.part", "out.jsonl"])
def test_what_was_written_in_part_does_not_count(tmp_path, torn) -> None:
    record = filled(tmp_path)
    with record:
        path = tmp_path / torn
        content = path.read_bytes()
        other = next(p for p in (tmp_path / ".out.extxyz.part", tmp_path / "out.jsonl") if p != path)
        whole = other.read_bytes()
    found = set()
    for length in range(0, len(content) + 1, 31):
        path.write_bytes(content[:length])
        other.write_bytes(whole)
        with Record(tmp_path / "out.extxyz", {"fmax": 0.05}, STARTS) as again:
            n = len(again.rows)
            assert list(again.rows) == list(STARTS)[:n]
            found.add(n)
            for key in list(STARTS)[n:]:
                row = {"file": key[0], "index": key[1], "start": STARTS[key], "failed": False}
                again.add(key, row, Atoms("Cu", positions=[(key[1], 0, 0)], cell=[3, 3, 3], pbc=True))
            again.finish(STARTS)
        assert [atoms.positions[0, 0] for atoms in ase.io.read(tmp_path / "out.extxyz", ":")] == [0, 1, 2]
        (tmp_path / "out.extxyz").unlink()
    assert found >= {0, 1, 2}


def test_one_process_writes_a_record(tmp_path) -> None:
    with (
        filled(tmp_path),
        pytest.raises(InputError, match="another process"),
    ):
        Record(tmp_path / "out.extxyz", {"fmax": 0.05}, STARTS)
    with Record(tmp_path / "out.extxyz", {"fmax": 0.05}, STARTS) as record:
        assert len(record.rows) == 3
