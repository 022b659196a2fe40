"""Where simulations write: what comes out can be read again, and nothing else is lost."""

from __future__ import annotations

import json
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import ase.io
import pytest
import torch
from crystals import crystals, potential
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastchgnet.cli import main
from fastchgnet.config import ModelConfig
from fastchgnet.sim.md.files import read_log
from fastchgnet.sim.outputs import read_frames
from fastchgnet.weights import fingerprint, save_potential

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


@pytest.mark.parametrize("command", ["md", "relax"])
def test_a_page_that_cannot_be_written_is_refused_before_the_run(cli: Cli, command: str) -> None:
    pytest.importorskip("plotly")
    ase.io.write("iron.xyz", crystals()[3])
    before = Path("iron.xyz").read_bytes()
    Path("folder.html").mkdir()
    for page, reason in (
        ("iron.xyz", "pages are written as .html"),
        (".run.extxyz.part", "pages are written as .html"),
        ("folder.html", "it is a folder"),
        ("iron.xyz/page.html", "cannot be written"),
    ):
        status, lines = cli(command, "iron.xyz", "--out", "run.extxyz", "--report", page)
        assert status == 2 and len(lines) == 1 and reason in lines[0]
    assert not Path("run.extxyz").exists() and Path("iron.xyz").read_bytes() == before


def test_every_relaxation_has_a_trajectory_that_ase_reads(cli: Cli) -> None:
    names = ("POSCAR", "a b.xyz", "a_b.xyz", "two\nlines.xyz", "x" * 230 + ".xyz")
    for name, atoms in zip(names, [*crystals(), crystals()[0]], strict=True):
        ase.io.write("crystal", atoms, format="vasp" if name == "POSCAR" else "extxyz")
        Path("crystal").rename(name)
    out = ("--out", "out.extxyz", "--trajectory", "steps", "--fmax", 1e-6)
    assert cli("relax", *names, "--steps", 2, *out) == (0, [])
    paths = [ase.io.read(path, ":") for path in Path("steps").iterdir()]
    assert sorted(str(path[0].symbols) for path in paths) == sorted(
        str(atoms.symbols) for atoms in ase.io.read("out.extxyz", ":")
    )
    assert [len(path) for path in paths] == [3] * len(names)
    # all are found again
    assert cli("relax", *names, "--steps", 2, *out[:2], "--fmax", 1e-6) == (0, [])
    assert len(ase.io.read("out.extxyz", ":")) == len(names)


@pytest.mark.parametrize("where", ["--trajectory", "--out"])
def test_a_place_that_takes_no_results_is_refused_before_they_are_there(cli: Cli, where: str) -> None:
    ase.io.write("iron.xyz", crystals()[3])
    Path("folder.extxyz").mkdir()
    place = "iron.xyz" if where == "--trajectory" else "folder.extxyz"
    status, lines = cli("relax", "iron.xyz", where, place)
    assert status == 2 and len(lines) == 1 and f"{place}: cannot be written" in lines[0]
    assert sorted(path.name for path in Path().iterdir()) == [
        "folder.extxyz",
        "iron.xyz",
        "model.safetensors",
        "model.safetensors.json",
    ]


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "iron.xyz", "index": 0, "start": "", "crystal": "", "settings": 3, "failed": false}',
        '{"file": ["iron.xyz"], "index": 0, "start": "", "crystal": "", "settings": {}, "failed": false}',
        "[1]",
        "",
    ],
)
def test_lines_that_are_of_no_relaxation_are_refused(cli: Cli, line: str) -> None:
    ase.io.write("iron.xyz", crystals()[3])
    Path("out.jsonl").write_text(f"{line}\n")
    status, lines = cli("relax", "iron.xyz", "--out", "out.extxyz")
    assert (status, lines) == (
        2,
        ["error: out.jsonl: line 1 is not of a relaxation; name another --out"],
    )
    assert Path("out.jsonl").read_text() == f"{line}\n"


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("md", ["run.extxyz/.restart.safetensors"]),
        ("relax", [".run.extxyz", ".run.jsonl", "..run.extxyz.part"]),
    ],
)
def test_what_killed_processes_left_is_removed(cli: Cli, command: str, names: list[str]) -> None:
    ase.io.write("iron.xyz", crystals()[3])
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(f"{name}.{uuid.uuid4().hex}.part").write_text("half")
    Path(".mine.extxyz.part").write_text("of another")
    assert cli(command, "iron.xyz", "--steps", 1, "--out", "run.extxyz") == (0, [])
    assert [path.name for path in Path().rglob("*.part")] == [".mine.extxyz.part"]


def test_a_state_that_is_not_of_the_run_is_refused(cli: Cli) -> None:
    ase.io.write("two.xyz", crystals()[:2])
    run = ("--steps", 4, "--interval", 2, "--out", "run")
    assert cli("md", "two.xyz", *run) == (0, [])
    path = Path("run/restart.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["run"])
    before = {path.name: path.read_bytes() for path in Path("run").glob("000-*")}
    for changed in (
        {"options": None},
        {"sizes": {name: -1 for name in header["sizes"]}},
        {"members": [0, 7]},
        {"members": [0]},
        {"lost": [[1, 0, "why"]]},
        {"position": tensors["position"][1:]},
        {"velocity": tensors["velocity"].float()},
        {"step": torch.tensor(-1)},
        {"sums": tensors["sums"][1:]},
    ):
        run_part = {name: value for name, value in changed.items() if name in header}
        tensor_part = {name: value for name, value in changed.items() if name in tensors}
        save_file({**tensors, **tensor_part}, path, {"run": json.dumps({**header, **run_part})})
        status, lines = cli("md", "two.xyz", *run, "--resume")
        assert status == 2 and len(lines) == 1 and "damaged, or not the state" in lines[0]
    save_file(tensors, path, {"run": json.dumps(header)})
    Path("two.xyz").rename("renamed.xyz")
    status, lines = cli("md", "renamed.xyz", *run, "--resume")
    assert (status, lines) == (2, ["error: run: cannot go on with crystals of other names"])
    assert before == {path.name: path.read_bytes() for path in Path("run").glob("000-*")}
    Path("renamed.xyz").rename("two.xyz")
    assert cli("md", "two.xyz", *run, "--resume") == (0, [])


def test_a_state_with_a_damaged_byte_is_refused(cli: Cli) -> None:
    ase.io.write("iron.xyz", crystals()[3])
    run = ("iron.xyz", "--steps", 2, "--interval", 1, "--out", "run")
    assert cli("md", *run) == (0, [])
    path = Path("run/restart.safetensors")
    whole = path.read_bytes()
    for place in (-1, -20, -90):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[len(whole) + place + 1 :])
        status, lines = cli("md", *run, "--resume")
        assert status == 2 and len(lines) == 1
        assert lines[0].startswith(f"error: {path}: damaged, ") and "checksum does not match" in lines[0]
    path.write_bytes(whole)
    assert cli("md", *run, "--resume") == (0, [])


def test_some_frames_and_rows_are_read(cli: Cli) -> None:
    ase.io.write("iron.xyz", crystals()[0])
    assert cli("md", "iron.xyz", "--steps", 6, "--interval", 1, "--out", "run") == (0, [])
    (path,) = Path("run").glob("*.extxyz")
    every = ase.io.read(path, ":")
    for kept in ([], [0], [6], [0, 1, 5, 6], [2, 4]):
        assert list(read_frames(path, kept)) == [every[index] for index in kept]
        assert read_log(path.with_suffix(".csv"), kept)["step"] == kept
    assert list(read_frames(path, [5, 7, 9])) == [every[5]]  # there are no more


def test_velocities_beside_frames_that_cannot_be_read(cli: Cli) -> None:
    moving = crystals()[3]
    moving.set_velocities([[0.01, 0, 0]])
    ase.io.write("good.xyz", moving)
    good = Path("good.xyz").read_text()
    moving.set_velocities([[float("nan"), 0, 0]])
    ase.io.write("nan.xyz", moving)
    torn = good.replace("Fe ", "Fe x", 1)
    Path("all.xyz").write_text(good + torn + Path("nan.xyz").read_text() + good)
    options = ("--velocities", "given", "--ensemble", "nve", "--steps", 1, "--out", "run")
    status, lines = cli("md", "all.xyz", *options)
    assert status == 1 and len(lines) == 2
    assert lines[0].startswith("error: all.xyz:1: ")
    assert lines[1] == "error: all.xyz:2: velocities contain NaN or infinity"
    assert len(list(Path("run").glob("*.extxyz"))) == 2


def test_a_full_disk_is_one_line_and_leaves_no_lock(cli: Cli) -> None:
    """The limit on the size of files stands for the disk."""
    resource = pytest.importorskip("resource")
    ase.io.write("iron.xyz", [crystals()[3]] * 9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        status, lines = cli("relax", "iron.xyz", "--steps", 1, "--out", "out.extxyz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (status, lines) == (2, ["error: out.extxyz: cannot be written (File too large)"])
    assert not list(Path().glob(".*.lock"))
    assert cli("relax", "iron.xyz", "--steps", 1, "--out", "out.extxyz") == (0, [])
    assert len(ase.io.read("out.extxyz", ":")) == 9 and not list(Path().glob(".*"))


def test_models_with_equal_parameters_are_told_apart() -> None:
    """A cutoff, as an example, is no parameter."""
    one, same = potential(SMALL), potential(SMALL)
    other = potential(SMALL.model_copy(update={"envelope_p": 6}))
    parameters = [dict(model.named_parameters()) for model in (one, other)]
    assert all(torch.equal(value, parameters[1][name]) for name, value in parameters[0].items())
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
