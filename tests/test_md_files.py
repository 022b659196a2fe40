"""`fastchgnet md`: files, restarts, and whatever goes wrong."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from crystals import benzene, crystals, potential
from safetensors.torch import load_file

from fastchgnet import FastCHGNetCalculator
from fastchgnet.cli import main
from fastchgnet.config import ModelConfig
from fastchgnet.errors import InputError
from fastchgnet.published import load
from fastchgnet.sim.md import files as md_files
from fastchgnet.sim.md.files import COLUMNS, RESTART, RunFolder, Sums, file_name, read_log
from fastchgnet.weights import save_potential

SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))


@dataclass
class Ran:
    """What a command did."""

    status: int
    out: str
    lines: list[str]  # of stderr


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path) -> Cli:
    """Run `fastchgnet md` in this process, in a folder with some crystals and a small model."""
    monkeypatch.chdir(tmp_path)
    save_potential(potential(SMALL), "model.safetensors")
    ase.io.write("two.xyz", crystals()[:2])
    ase.io.write("iron.xyz", crystals()[3])

    def run(*args: object) -> Ran:
        given = ["fastchgnet", "md", *map(str, args), "--model", "model.safetensors", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as exited:
            main()
            sys.exit(0)
        captured = capsys.readouterr()
        return Ran(int(exited.value.code or 0), captured.out, captured.err.splitlines())

    return run


def contents(folder: str) -> dict[str, object]:
    """All that a run leaves, but for how long it took."""
    found: dict[str, object] = {p.name: p.read_text() for p in sorted(Path(folder).glob("*.extxyz"))}
    for path in sorted(Path(folder).glob("*.csv")):
        found[path.name] = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]
    return found | {name: t.tolist() for name, t in load_file(Path(folder) / RESTART).items()}


ENSEMBLES = [
    ("--ensemble", "nve"),
    ("--ensemble", "nvt", "--thermostat", "langevin", "--temperature", 200, "--temperature", 400),
    ("--ensemble", "nvt", "--replicas", 2),
    ("--ensemble", "npt", "--pressure", 1, "--barostat-time", 200),
]


@pytest.mark.parametrize("options", ENSEMBLES, ids=lambda o: "-".join(map(str, o[1:4])))
def test_a_run_in_two_parts_is_the_same_bit_for_bit(cli: Cli, options: tuple) -> None:
    assert cli("two.xyz", "--out", "whole", "--steps", 20, "--interval", 5, *options).status == 0
    assert cli("two.xyz", "--out", "parts", "--steps", 12, "--interval", 5, *options).status == 0
    assert cli("two.xyz", "--out", "parts", "--steps", 20, "--interval", 5, *options, "--resume").status == 0
    assert contents("parts") == contents("whole")
    frames = ase.io.read(next(Path("parts").glob("001-*.extxyz")), ":")
    assert [atoms.info["step"] for atoms in frames] == [0, 5, 10, 15, 20]


def test_files_are_cut_back_to_the_saved_state(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written after the state was saved, half lines included, is written again."""
    options = ("two.xyz", "--steps", 12, "--interval", 2, "--ensemble", "nvt")
    assert cli(*options, "--out", "whole").status == 0
    assert cli("two.xyz", "--steps", 6, "--interval", 2, "--ensemble", "nvt", "--out", "torn").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", lambda self, dynamics: None)
        assert cli(*options[:2], 10, *options[3:], "--out", "torn", "--resume").status == 0
    for path in Path("torn").glob("00*"):
        with path.open("a") as file:
            file.write("8\nLattice=")
    assert cli(*options, "--out", "torn", "--resume").status == 0
    assert contents("torn") == contents("whole")


def test_a_killed_run_goes_on(cli: Cli) -> None:
    """SIGKILL at some moment; states are saved so often that the last is not the first."""
    options = ["two.xyz", "--interval", "1", "--ensemble", "nvt", "--thermostat", "langevin"]
    program = (
        "import fastchgnet.cli, fastchgnet.sim.md.files as files;"
        "files._SAVE_SECONDS, files._SAVE_SHARE = 0.05, 1.0; fastchgnet.cli.main()"
    )
    command = [sys.executable, "-c", program, "md", *options, "--out", "killed", "--steps", "100000"]
    process = subprocess.Popen([*command, "--model", "model.safetensors"], stderr=subprocess.DEVNULL)
    trajectory = Path("killed") / f"{file_name(0, 'two.xyz', 300.0)}.extxyz"
    deadline = time.monotonic() + 120
    while not (trajectory.exists() and trajectory.read_text().count("Lattice") > 25):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    saved = int(load_file(Path("killed") / RESTART)["step"])
    assert saved > 0
    steps = saved + 10
    assert cli(*options, "--out", "killed", "--steps", steps, "--resume").status == 0
    assert cli(*options, "--out", "whole", "--steps", steps).status == 0
    assert contents("killed") == contents("whole")


def test_ctrl_c_leaves_whole_files(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("two.xyz", "--steps", 12, "--interval", 4, "--seed", 3)
    record = RunFolder.record

    def interrupted(self: RunFolder, dynamics, ms_per_step: float) -> None:
        record(self, dynamics, ms_per_step)
        if dynamics.n_steps == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record", interrupted)
        ran = cli(*options, "--out", "stopped", "--json")
    assert ran.status == 130 and [row["steps"] for row in json.loads(ran.out)] == [4, 4]
    assert not any(Path("stopped").glob(".*"))
    assert cli(*options, "--out", "stopped", "--resume").status == 0
    assert cli(*options, "--out", "whole").status == 0
    assert contents("stopped") == contents("whole")


def test_frames_are_what_ase_reads(cli: Cli) -> None:
    ran = cli("iron.xyz", "--out", "run", "--steps", 4, "--interval", 2, "--dtype", "float64", "--json")
    (row,) = json.loads(ran.out)
    frames = ase.io.read(row["trajectory"], ":")
    assert len(frames) == row["frames"] == 3
    calculator = FastCHGNetCalculator(load("model.safetensors", "cpu", "float64"))
    for atoms in frames:
        expected = atoms.copy()
        expected.calc = calculator
        # positions and forces have 8 digits behind the point
        np.testing.assert_allclose(atoms.get_forces(), expected.get_forces(), atol=1e-6)
        np.testing.assert_allclose(atoms.get_stress(), expected.get_stress(), atol=1e-6)
        np.testing.assert_allclose(atoms.get_magnetic_moments(), expected.get_magnetic_moments(), atol=1e-6)
        assert atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-6)
    log = read_log(Path(row["log"]))
    assert tuple(log) == COLUMNS and log["step"] == [0, 2, 4]
    assert log["kinetic_ev"] == pytest.approx([atoms.get_kinetic_energy() for atoms in frames], rel=1e-6)
    assert np.isnan(log["ms_per_step"][0]) and log["ms_per_step"][1] > 0


def test_velocities_of_a_file(cli: Cli) -> None:
    assert cli("two.xyz", "--out", "first", "--ensemble", "nve", "--steps", 4, "--interval", 2).status == 0
    ase.io.write("end.xyz", ase.io.read(next(Path("first").glob("001*.extxyz")), -1))
    more = ("--ensemble", "nve", "--velocities", "given", "--steps", 2, "--interval", 2)
    assert cli("end.xyz", "--out", "second", *more).status == 0
    start = ase.io.read(next(Path("second").glob("000*.extxyz")), 0)
    np.testing.assert_allclose(start.get_velocities(), ase.io.read("end.xyz").get_velocities(), atol=1e-7)
    ran = cli("two.xyz", "--out", "third", *more)
    lines = [f"error: two.xyz:{n}: has no velocities to start with" for n in (0, 1)]
    assert ran.status == 2 and ran.lines == lines
    assert cli("two.xyz", "end.xyz", "--out", "fourth", *more).status == 1


def test_atoms_that_a_file_holds_do_not_move(cli: Cli) -> None:
    slab = crystals()[1]
    slab.set_constraint(FixAtoms([0, 1]))
    ase.io.write("slab.xyz", slab)
    (row,) = json.loads(cli("slab.xyz", "--out", "run", "--steps", 4, "--interval", 2, "--json").out)
    for atoms in ase.io.read(row["trajectory"], ":"):
        np.testing.assert_allclose(atoms.positions[:2], slab.positions[:2], rtol=0, atol=1e-8)  # 8 digits
        assert atoms.constraints[0].get_indices().tolist() == [0, 1]
    assert np.abs(atoms.positions[2:] - slab.positions[2:]).min(1).max() > 1e-4


def test_a_molecule_runs_without_a_volume(cli: Cli) -> None:
    ase.io.write("benzene.xyz", benzene(), format="extxyz")
    (row,) = json.loads(cli("benzene.xyz", "--out", "run", "--steps", 2, "--json").out)
    assert row["mean_pressure_gpa"] is None and row["mean_temperature_k"] > 0
    assert np.isnan(read_log(Path(row["log"]))["volume_a3"]).all()
    ran = cli("benzene.xyz", "--out", "npt", "--ensemble", "npt")
    assert ran.status == 2
    assert ran.lines == ["error: benzene.xyz:0: npt needs three periodic directions"]
    ran = cli("benzene.xyz", "two.xyz", "--out", "npt", "--ensemble", "npt", "--steps", 2, "--json")
    assert ran.status == 1 and len(json.loads(ran.out)) == 2


def test_what_cannot_be_read_is_listed_and_the_rest_runs(cli: Cli) -> None:
    Path("noise.cif").write_bytes(bytes(range(256)))
    ran = cli("noise.cif", "two.xyz", "nothing.xyz", "--out", "run", "--steps", 2, "--json")
    assert ran.status == 1 and [row["steps"] for row in json.loads(ran.out)] == [2, 2]
    errors = [line for line in ran.lines if line.startswith("error: ")]
    assert len(errors) == 2 and "noise.cif" in errors[0] and "nothing.xyz" in errors[1]
    ran = cli("nothing.xyz", "--out", "other", "--steps", 2)
    assert ran.status == 2 and not Path("other").exists()


def test_a_crystal_that_breaks(cli: Cli) -> None:
    """It keeps its last good frame, whose step is no multiple of the interval; the other goes on."""
    bullet = Atoms("H2", [[0, 0, 0], [2.0, 0, 0]], cell=[8] * 3, pbc=True)
    bullet.set_velocities([[1.0, 0, 0], [-1.0, 0, 0]])
    iron = crystals()[3] * (2, 1, 1)
    iron.set_velocities([[0.01, 0, 0], [0, 0, 0]])
    ase.io.write("both.xyz", [bullet, iron])
    options = ("both.xyz", "--ensemble", "nve", "--velocities", "given", "--interval", 5)
    ran = cli(*options, "--steps", 20, "--out", "run", "--json")
    broken, whole = json.loads(ran.out)
    assert ran.status == 1 and whole["reason"] is None and whole["steps"] == 20
    assert "overlap" in broken["reason"] and 0 < broken["steps"] < 20
    assert any(line.startswith(f"error: {broken['name']}: stopped after") for line in ran.lines)
    steps = [atoms.info["step"] for atoms in ase.io.read(broken["trajectory"], ":")]
    assert steps == [*range(0, broken["steps"], 5), broken["steps"]]
    # it stays out when the run goes on
    again = cli(*options, "--steps", 25, "--out", "run", "--json", "--resume")
    assert again.status == 1 and [row["steps"] for row in json.loads(again.out)] == [broken["steps"], 25]
    assert [atoms.info["step"] for atoms in ase.io.read(broken["trajectory"], ":")] == steps
    ase.io.write("alone.xyz", bullet)
    assert cli("alone.xyz", *options[1:], "--steps", 20, "--out", "alone").status == 2


def test_a_time_step_that_explodes(cli: Cli) -> None:
    ran = cli(
        "two.xyz",
        "--ensemble",
        "nve",
        "--timestep",
        5000,
        "--steps",
        50,
        "--temperature",
        3000,
        "--out",
        "run",
    )
    assert ran.status == 2
    assert len(ran.lines) == 2 and all("stopped after" in line for line in ran.lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", 0), "the temperature must be above zero: 0 K"),
        (("--temperature", 300, "--temperature", -1), "the temperature must be above zero: -1 K"),
        (("--timestep", 0), "the timestep must be between 1e-06 and 1e+12 fs: 0"),
        (("--timestep", "nan"), "the timestep must be between 1e-06 and 1e+12 fs: nan"),
        (("--steps", 0), "steps must be at least 1: 0"),
        (("--replicas", 0), "replicas must be at least 1: 0"),
        (("--interval", -1), "interval must be at least 1: -1"),
        (("--seed", -1), "the seed must be between 0 and 2^63 - 1: -1"),
        (("--ensemble", "npt", "--thermostat", "langevin"), "npt does not run with the thermostat langevin"),
        (("--charge-table", "nothing.yaml"), "nothing.yaml: cannot be read"),
    ],
)
def test_options_that_make_no_sense(cli: Cli, options: tuple, message: str) -> None:
    ran = cli("two.xyz", "--out", "run", *options)
    assert ran.status == 2 and len(ran.lines) == 1 and message in ran.lines[0]
    assert not Path("run").exists()


def test_a_run_is_not_mixed_with_another(cli: Cli) -> None:
    options = ("two.xyz", "--out", "run", "--steps", 2, "--interval", 2)
    assert cli(*options).status == 0
    before = contents("run")
    ran = cli(*options)
    assert ran.status == 2 and ran.lines == ["error: run: holds a run already; --resume goes on with it"]
    for changed, name in (
        (("--timestep", 2), "timestep is 1.0 there and 2.0 here"),
        (("--temperature", 301), "temperatures is another there"),
        (("--dtype", "float64"), "dtype is torch.float32 there"),
    ):
        ran = cli(*options, *changed, "--resume")
        assert ran.status == 2 and "cannot go on with other options" in ran.lines[0] and name in ran.lines[0]
    ran = cli("iron.xyz", *options[1:], "--resume")
    assert ran.status == 2 and "crystals is" in ran.lines[0]
    save_potential(potential(SMALL, seed=1), "model.safetensors")
    ran = cli(*options, "--resume")
    assert ran.status == 2 and "model is" in ran.lines[0]
    assert contents("run") == before


def test_a_damaged_folder_is_one_line(cli: Cli) -> None:
    options = ("iron.xyz", "--out", "run", "--steps", 4, "--interval", 2)
    assert cli(*options).status == 0
    (trajectory,) = Path("run").glob("*.extxyz")
    whole = trajectory.read_bytes()
    trajectory.write_bytes(whole[:-5])
    ran = cli(*options, "--resume")
    assert ran.status == 2 and "shorter than when the state was saved" in ran.lines[0]
    trajectory.write_bytes(whole)
    Path("run", RESTART).write_bytes(b"no state")
    ran = cli(*options, "--resume")
    assert ran.status == 2 and len(ran.lines) == 1 and "damaged" in ran.lines[0]


def test_charges(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    ase.io.write("oxide.xyz", bulk("MgO", "rocksalt", a=4.2))
    options = ("--steps", 2, "--interval", 2, "--json")
    (row,) = json.loads(cli("oxide.xyz", "--out", "run", "--charges", *options).out)
    frames = ase.io.read(row["trajectory"], ":")
    assert [atoms.get_initial_charges().tolist() for atoms in frames] == [[2.0, -2.0]] * 2
    assert [atoms.info["total_charge"] for atoms in frames] == [0.0, 0.0] and row["frames_with_charges"] == 2
    ran = cli("iron.xyz", "--out", "other", "--charges", *options)
    assert ran.status == 2 and "iron.xyz:0: charges: no oxidation states are known for Fe" in ran.lines[0]
    Path("table.yaml").write_text("ranges: {Fe: [[100, 101, 3]]}")
    (row,) = json.loads(cli("iron.xyz", "--out", "other", "--charge-table", "table.yaml", *options).out)
    assert row["frames_with_charges"] == 0 and "total_charge" not in ase.io.read(row["trajectory"]).info


def test_sums_give_the_slope_and_the_means() -> None:
    rng = np.random.default_rng(0)
    times, energies = np.sort(rng.uniform(0, 10, 30)), rng.normal(size=30) - 5000.0
    sums = Sums.empty(2)
    assert np.isnan(sums.drift(1, 4)) and np.isnan(sums.means(1)).all()
    for t, energy in zip(times, energies, strict=True):
        sums.add(SimpleNamespace(number=1, conserved=energy, temperature=10 * t, pressure=0.0), t, t > 5)
    expected = 1000 * np.polyfit(times, energies, 1)[0] / 4
    assert sums.drift(1, 4) == pytest.approx(expected, rel=1e-9)
    assert sums.means(1)[0] == pytest.approx(10 * times.mean())
    assert sums.counts(1) == (30, int((times > 5).sum()))


def test_states_are_saved_when_it_is_time(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda self, d: (saved.append(d.n_steps), save(self, d)))
    assert cli("iron.xyz", "--out", "seldom", "--steps", 6, "--interval", 2).status == 0
    assert saved == [0, 0, 6]  # before and after the first frames
    monkeypatch.setattr(md_files, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(md_files, "_SAVE_SHARE", 1e9)
    assert cli("iron.xyz", "--out", "often", "--steps", 6, "--interval", 2).status == 0
    assert saved[3:] == [0, 0, 2, 4, 6, 6]


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("fastchgnet.sim.md.files.RunFolder._append", InputError("disk: no space left"), "no space left"),
        ("fastchgnet.sim.md.MolecularDynamics._step", torch.OutOfMemoryError(), "out of memory; run fewer"),
    ],
)
def test_a_full_disk_or_memory_costs_what_was_not_saved(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, message: str
) -> None:
    options = ("two.xyz", "--interval", 2, "--steps", 8)
    assert cli("two.xyz", "--interval", 2, "--steps", 4, "--out", "run").status == 0
    calls = []

    def fails(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error
        real(*args)

    with monkeypatch.context() as patch:
        module, kind, name = method.rsplit(".", 2)
        real = getattr(getattr(importlib.import_module(module), kind), name)
        patch.setattr(method, fails)
        ran = cli(*options, "--out", "run", "--resume")
    assert ran.status == 2 and len(ran.lines) == 1 and message in ran.lines[0]
    assert cli(*options, "--out", "run", "--resume").status == 0
    assert cli(*options, "--out", "whole").status == 0
    assert contents("run") == contents("whole")


def test_a_page(cli: Cli) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("chemiscope")
    ran = cli("two.xyz", "--out", "run", "--steps", 4, "--interval", 2, "--report", "page.html")
    assert ran.status == 0
    page = Path("page.html").read_text()
    for text in ("Molecular dynamics", "Temperature", "Conserved energy", "000-two-300K", "001-two-300K"):
        assert text in page
