"""Where simulations write: what comes out can be read again, and nothing else is lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import ase.io
import pytest
from crystals import crystals, potential

from fastchgnet.cli import main
from fastchgnet.config import ModelConfig
from fastchgnet.weights import save_potential

SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))

Cli = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path) -> Cli:
    """Run the program in a folder with a small model; return its status and the lines of stderr."""
    monkeypatch.chdir(tmp_path)
    save_potential(potential(SMALL), "model.safetensors")

    def run(*args: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["fastchgnet", *map(str, args), "--model", "model.safetensors"])
        with pytest.raises(SystemExit) as exited:
            main()
            sys.exit(0)
        return int(exited.value.code or 0), capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("name", ["POSCAR", "CONTCAR_2", "at@1.xyz", "[1] 2{3}.xyz", "x" * 230 + ".xyz"])
def test_ase_reads_trajectories_whatever_the_file_was_called(cli: Cli, name: str) -> None:
    atoms = crystals()[0]
    kind = "vasp" if name.isupper() or "_" in name else "extxyz"
    atoms.set_velocities([[0.01, 0, 0], [-0.01, 0, 0]])
    ase.io.write("crystal", atoms, format=kind)
    Path("crystal").rename(name)
    start = ("--velocities", "given") if kind == "extxyz" else ()
    assert cli("md", "--steps", 2, "--interval", 1, "--out", "run", name, *start) == (0, [])
    (trajectory,) = Path("run").glob("*.extxyz")
    assert [atoms.info["step"] for atoms in ase.io.read(trajectory, ":")] == [0, 1, 2]


@pytest.mark.parametrize("command", ["md"])
def test_a_page_that_cannot_be_written_is_refused_before_the_run(cli: Cli, command: str) -> None:
    pytest.importorskip("plotly")
    ase.io.write("iron.xyz", crystals()[3])
    before = Path("iron.xyz").read_bytes()
    Path("folder").mkdir()
    for page, reason in (
        ("iron.xyz", "is one of the files to read"),
        ("folder", "it is a folder"),
        ("iron.xyz/page.html", "cannot be written"),
    ):
        status, lines = cli(command, "iron.xyz", "--out", "run.extxyz", "--report", page)
        assert status == 2 and len(lines) == 1 and reason in lines[0]
    assert not Path("run.extxyz").exists() and Path("iron.xyz").read_bytes() == before
