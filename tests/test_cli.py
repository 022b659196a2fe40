"""`predict` and `evaluate` on good and bad input, and the help of every command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import typer
from ase import Atoms
from ase.build import bulk
from crystals import benzene, crystals, potential

from fastchgnet.cli import app, main
from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.data.formats import read_frames
from fastchgnet.data.store import write_store
from fastchgnet.weights import save_potential

SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))
KEYS = ["file", "index", "formula", "energy", "energy_per_atom", "forces", "stress", "magmoms"]


@dataclass
class Ran:
    """What a command did."""

    status: int
    out: str
    lines: list[str]  # of stderr


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch, capsys) -> Cli:
    """Run the program in this process, through `main`, as the console script does."""

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["fastchgnet", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            main()
            sys.exit(0)
        captured = capsys.readouterr()
        return Ran(int(exited.value.code or 0), captured.out, captured.err.splitlines())

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Make a folder of good and bad files and work in it."""
    monkeypatch.chdir(tmp_path)
    model = potential(SMALL)
    save_potential(model, "model.safetensors")
    torch.save({"weights": torch.zeros(3)}, "model.pt")
    ase.io.write("crystals.xyz", crystals())
    ase.io.write("cell.cif", bulk("NaCl", "rocksalt", a=5.64))
    ase.io.write("molecule.xyz", benzene(), format="extxyz")
    overlapping, far = bulk("NaCl", "rocksalt", a=5.64), bulk("NaCl", "rocksalt", a=5.64)
    overlapping.positions[1] = 0.1
    far.positions[1] = np.nan
    ase.io.write("mixed.xyz", [bulk("Fe"), overlapping, bulk("Cu")])
    ase.io.write("nan.xyz", far)
    ase.io.write("heavy.xyz", bulk("Am", "fcc", a=4.9))
    ase.io.write("flat.xyz", Atoms("Na", cell=[3, 3, 0], pbc=True))
    whole = Path("crystals.xyz").read_text()
    Path("cut.xyz").write_text(whole[: int(0.9 * len(whole))])
    Path("empty.xyz").touch()
    os.mkfifo("pipe.xyz")
    Path("noise.bin").write_bytes(bytes(range(256)) * 8)
    Path("lattice.json").write_text('{"lattice": ')
    frames = [frame for frame in read_frames("crystals.xyz")]
    write_store(frames, "store", Provenance(name="crystals"))
    return tmp_path


def test_predict_prints_a_table_that_says_what_energies_mean(cli, folder) -> None:
    ran = cli("predict", "crystals.xyz", "cell.cif", "molecule.xyz", "--model", "model.safetensors")
    assert (ran.status, ran.lines) == (0, [])
    assert "Functional unknown, energy correction unknown" in ran.out
    for text in ("crystals.xyz", "O3SrTi", "ClNa", "C6H6", "—"):
        assert text in ran.out


def test_predict_json_has_these_keys_and_is_valid(cli, folder) -> None:
    ran = cli("predict", "crystals.xyz", "molecule.xyz", "--model", "model.safetensors", "--json")
    assert (ran.status, ran.lines) == (0, [])
    rows = json.loads(ran.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [list(row) for row in rows] == [KEYS] * 5
    assert [(row["file"], row["index"]) for row in rows] == [
        *(("crystals.xyz", index) for index in range(4)),
        ("molecule.xyz", 0),
    ]
    assert rows[4]["stress"] == [[None] * 3] * 3
    for row in rows:
        assert np.isfinite(row["forces"]).all()
        assert row["energy_per_atom"] == pytest.approx(row["energy"] / len(row["magmoms"]))


@pytest.mark.parametrize("name", ["out.json", "new/out.extxyz"])
def test_predict_writes_what_it_prints(cli, folder, name) -> None:
    args = ("predict", "crystals.xyz", "--model", "model.safetensors", "--dtype", "float64")
    ran = cli(*args, "--batch-size", 2, "--json", "--out", name)
    rows = json.loads(ran.out)
    if name.endswith(".json"):
        assert json.loads(Path(name).read_text()) == rows
    else:
        frames = ase.io.read(name, ":")
        assert [a.get_potential_energy() for a in frames] == pytest.approx([row["energy"] for row in rows])


def test_predict_runs_the_good_and_lists_the_bad(cli, folder) -> None:
    files = ("mixed.xyz", "nowhere.cif", "cut.xyz", "cell.cif")
    ran = cli("predict", *files, "--model", "model.safetensors", "--json", "--out", "out.json")
    assert ran.status == 1
    done = [(row["file"], row["index"]) for row in json.loads(ran.out)]
    assert done == [("mixed.xyz", 0), ("mixed.xyz", 2), *(("cut.xyz", i) for i in range(3)), ("cell.cif", 0)]
    assert json.loads(Path("out.json").read_text()) == json.loads(ran.out)
    assert len(ran.lines) == 3
    for line, start in zip(ran.lines, ("mixed.xyz:1", "nowhere.cif", "cut.xyz:3"), strict=True):
        assert line.startswith(f"error: {start}: ")


BAD_PREDICT = [
    (["nowhere.cif"], "nowhere.cif: no such file"),
    (["."], ".: is a folder"),
    (["pipe.xyz"], "pipe.xyz: is a pipe or a device"),
    (["cell.cif/crystal.xyz"], "cell.cif/crystal.xyz: no such file"),
    (["nan.xyz"], "nan.xyz:0: positions contain NaN"),
    (["heavy.xyz"], "heavy.xyz:0: unknown element Z = 95"),
    (["flat.xyz"], "flat.xyz:0: the cell has no volume"),
    (["empty.xyz"], "empty.xyz"),
    (["noise.bin"], "noise.bin"),
    (["lattice.json"], "lattice.json"),
    (["crystals.xyz", "--model", "nowhere.safetensors"], "nowhere.safetensors"),
    (["crystals.xyz", "--model", "chgnet-9"], "chgnet-9"),
    (["crystals.xyz", "--model", "model.pt"], "a pickle"),
    (["crystals.xyz", "--model", "crystals.xyz"], "not a safetensors file"),
    (["crystals.xyz", "--out", "out.csv"], "out.csv: predictions are written as"),
    (["crystals.xyz", "--out", "cell.cif/out.json"], "cell.cif/out.json: cannot be written"),
    (["crystals.xyz", "--device", "abacus"], "abacus"),
]

BAD_EVALUATE = [
    (["model.safetensors", "nowhere"], "nowhere: no store here"),
    (["model.safetensors", "store", "--split", "val"], "store: no frames"),
    (["model.safetensors", "store", "--split", "all", "--out", "cell.cif/report"], "cannot be written"),
    (["model.pt", "store"], "a pickle"),
    (["chgnet-9", "store"], "chgnet-9"),
]


@pytest.mark.parametrize(
    ("args", "reason"),
    [(["predict", *args], reason) for args, reason in BAD_PREDICT]
    + [(["evaluate", *args], reason) for args, reason in BAD_EVALUATE],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_line_and_status_2(cli, folder, args, reason) -> None:
    if args[0] == "predict" and "--model" not in args:
        args = [*args, "--model", "model.safetensors"]
    before = sorted(path.name for path in folder.iterdir())
    ran = cli(*args)
    assert ran.status == 2
    assert len(ran.lines) == 1, ran.lines
    assert ran.lines[0].startswith("error: ")
    assert reason in ran.lines[0]
    assert ran.out == ""
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("option", [["--dtype", "float16"], ["--batch-size", "0"], ["--colour"]])
def test_an_option_that_does_not_exist_is_status_2(cli, folder, option) -> None:
    ran = cli("predict", "crystals.xyz", *option)
    assert ran.status == 2
    assert "Traceback" not in "\n".join(ran.lines)


def test_evaluate_prints_tables_and_says_where_labels_come_from(cli, folder) -> None:
    ran = cli("evaluate", "model.safetensors", "store", "--split", "all")
    assert (ran.status, ran.lines) == (0, [])
    for text in ("Energy (meV/atom)", "Force (meV/Å)", "Stress (GPa)", "Magmom (mμ_B)", "R²", "config_type"):
        assert text in ran.out
    assert "Labels: crystals" in ran.out


def test_evaluate_writes_a_report_and_prints_json(cli, folder) -> None:
    row = {"epoch": 1, "val": {"forces_mev_per_angstrom": 90.0}}
    names = ("energy_mev_per_atom", "stress_gpa", "magmoms_mmub")
    row["val"].update(dict.fromkeys(names))
    Path("metrics.jsonl").write_text(json.dumps(row) + "\n")
    ran = cli("evaluate", "model.safetensors", "store", "--split", "all", "--json", "--out", "report")
    assert (ran.status, ran.lines) == (0, [])
    metrics = json.loads(ran.out)
    assert metrics == json.loads(Path("report/metrics.json").read_text())
    assert metrics["n_frames"] == 4
    assert metrics["data"]["name"] == "crystals"
    assert metrics["overall"]["energy"] == {"unit": "meV/atom", "n": 0, "mae": None, "rmse": None, "r2": None}
    assert {path.name for path in Path("report").iterdir()} >= {"parity.png", "learning.png", "report.html"}


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_help_of_every_command_has_an_example(cli, monkeypatch, name) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ran = cli(name, "--help")
    assert ran.status == 0
    assert f"Example: fastchgnet {name} " in ran.out or f"Example: fastchgnet {name}\n" in ran.out


def test_as_a_program_good_and_bad(folder) -> None:
    def program(*files: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "fastchgnet",
            "predict",
            *files,
            "--json",
            "--model",
            "model.safetensors",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = program("cell.cif")
    assert (good.returncode, good.stderr) == (0, "")
    assert [list(row) for row in json.loads(good.stdout)] == [KEYS]
    bad = program("nowhere.cif")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: nowhere.cif: no such file\n"


@pytest.mark.parametrize(
    "command",
    ["--help", "predict cell.cif --model model.safetensors", "evaluate model.safetensors store --split all"],
)
def test_a_terminal_without_our_letters_is_no_error(folder, command) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "fastchgnet", *command.split()],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.isascii() and len(ran.stdout) > 100


def test_what_may_not_be_read_is_listed_and_the_rest_runs(cli, folder) -> None:
    Path("closed").mkdir()
    Path("closed/cell.cif").write_bytes(Path("cell.cif").read_bytes())
    Path("locked.cif").write_bytes(Path("cell.cif").read_bytes())
    Path("closed").chmod(0)
    Path("locked.cif").chmod(0)
    try:
        if os.access("locked.cif", os.R_OK):
            pytest.skip("this user may do everything")
        for command in (["predict"], ["relax", "--steps", 1], ["md", "--steps", 1, "--out", "run"]):
            ran = cli(*command, "locked.cif", "closed/cell.cif", "cell.cif", "--model", "model.safetensors")
            assert ran.status == 1 and len(ran.lines) == 2, ran.lines
            for line, name in zip(ran.lines, ("locked.cif", "closed/cell.cif"), strict=True):
                assert line.startswith(f"error: {name}: ") and "Permission denied" in line
    finally:
        Path("closed").chmod(0o700)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_output_to_a_full_disk_ends_in_one_line(folder) -> None:
    command = [sys.executable, "-m", "fastchgnet", "inspect", "store"]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 2 and ran.stderr == "error: [Errno 28] No space left on device\n"
