"""No command replaces a file that is there: it says so in a line and with status 2, before any work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import ase.io
import pytest
from crystals import crystals, potential
from frames import labelled_frames

from fastchgnet import cli as commands
from fastchgnet.config import ModelConfig, Provenance
from fastchgnet.data.store import write_store
from fastchgnet.potential import Potential
from fastchgnet.sim.md.files import RESTART
from fastchgnet.weights import save_potential

SMALL = ModelConfig(atom_cutoff=4.0, n_radial=5, n_angular=5, readout_hidden=(16,))
MODEL = ("--model", "model.safetensors", "--device", "cpu")
RELAX = ("relax", "iron.xyz", "--steps", 1, *MODEL)
MD = ("md", "iron.xyz", "--steps", 2, "--interval", 1, *MODEL)

Cli = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path) -> Cli:
    """Run the program in a folder with a model, a crystal and a store; return status and lines of stderr."""
    monkeypatch.chdir(tmp_path)
    save_potential(potential(SMALL), "model.safetensors")
    ase.io.write("iron.xyz", crystals()[3])
    write_store(list(labelled_frames(8)), "store", Provenance(name="store"))
    Path("run.yaml").write_text("data: {train: store, val: store}\ntrain: {out: run, device: cpu}\n")

    def run(*args: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["fastchgnet", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            commands.main()
            sys.exit(0)
        return int(exited.value.code or 0), capsys.readouterr().err.splitlines()

    return run


def contents() -> dict[str, bytes]:
    """Everything in the folder."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("there", "command"),
    [
        ("out.json", ("predict", "iron.xyz", "--out", "out.json", *MODEL)),
        ("out.extxyz", ("predict", "iron.xyz", "--out", "out.extxyz", *MODEL)),
        ("out.extxyz", (*RELAX, "--out", "out.extxyz")),
        ("page.html", (*RELAX, "--report", "page.html")),
        ("steps/iron.xyz-0.extxyz", (*RELAX, "--trajectory", "steps")),
        ("run/000-iron-300K.extxyz", (*MD, "--out", "run")),
        ("run/000-iron-300K.csv", (*MD, "--out", "run")),
        ("run/000-iron-300K.csv", (*MD, "--out", "run", "--resume")),
        ("page.html", (*MD, "--out", "run", "--report", "page.html")),
        ("out/metrics.json", ("evaluate", "model.safetensors", "store", "--out", "out")),
        ("out/parity.png", ("evaluate", "model.safetensors", "store", "--out", "out")),
        ("sizes.png", ("inspect", "store", "--png", "sizes.png")),
        ("new", ("prepare", "iron.xyz", "--out", "new")),
        ("run/best.safetensors", ("train", "run.yaml")),
        ("run/metrics.jsonl", ("train", "run.yaml", "--resume")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_is_there_is_not_replaced(cli: Cli, monkeypatch, there: str, command: tuple) -> None:
    monkeypatch.setattr(Potential, "forward", lambda *args: pytest.fail("work was done"))
    Path(there).parent.mkdir(exist_ok=True)
    Path(there).write_text("of somebody\n")
    before = contents()
    status, lines = cli(*command)
    place = Path(there).resolve() if command[0] == "train" else there  # configurations hold whole paths
    assert (status, lines) == (2, [f"error: {place}: exists already; choose another name or remove it"])
    assert contents() == before


@pytest.mark.parametrize("lines_are", ["missing", "of the first crystal alone"])
def test_relaxed_crystals_without_their_lines_are_not_replaced(cli: Cli, lines_are: str) -> None:
    ase.io.write("two.xyz", crystals()[2:])
    command = ("relax", "two.xyz", "--steps", 1, "--out", "out.extxyz", *MODEL)
    assert cli(*command) == (0, [])
    relaxed, lines = Path("out.extxyz").read_bytes(), Path("out.jsonl")
    lines.write_text(lines.read_text().splitlines(keepends=True)[0])
    if lines_are == "missing":
        lines.unlink()
    status, errors = cli(*command)
    assert status == 2 and len(errors) == 1 and errors[0].startswith("error: out.extxyz: exists already")
    assert Path("out.extxyz").read_bytes() == relaxed


@pytest.mark.parametrize("addition", [b"2\nmine\nH 0 0 0\nH 0 0 1\n", b"a note\n"])
def test_what_others_put_among_relaxed_crystals_is_not_replaced(cli: Cli, addition: bytes) -> None:
    assert cli(*RELAX, "--out", "out.extxyz") == (0, [])
    with Path("out.extxyz").open("ab") as file:
        file.write(addition)
    before = contents()
    status, errors = cli(*RELAX, "--out", "out.extxyz")
    assert (status, errors) == (
        2,
        [
            "error: out.extxyz: exists already and holds what out.jsonl does not name; "
            "name another --out or remove it"
        ],
    )
    assert contents() == before


def test_steps_of_the_same_relaxation_are_written_again(cli: Cli) -> None:
    """A process may be killed between the steps of a crystal and its line."""
    command = (*RELAX, "--out", "out.extxyz", "--trajectory", "steps")
    assert cli(*command) == (0, [])
    (steps,) = Path("steps").iterdir()
    before = steps.read_bytes()
    for name in ("out.extxyz", "out.jsonl"):
        Path(name).unlink()
    assert cli(*command) == (0, [])
    assert steps.read_bytes() == before
    status, lines = cli(*command[:-4], "--out", "other.extxyz", "--trajectory", "steps", "--fmax", 1e-3)
    assert status == 2 and lines == [f"error: {steps}: exists already; choose another name or remove it"]
    assert steps.read_bytes() == before and not Path("other.jsonl").exists()


@pytest.mark.parametrize(
    ("command", "more"), [((*RELAX, "--out", "run.extxyz"), ()), ((*MD, "--out", "run"), ("--resume",))]
)
def test_a_run_that_goes_on_replaces_its_page_and_no_other_file(
    cli: Cli, command: tuple, more: tuple
) -> None:
    pytest.importorskip("chemiscope")
    pytest.importorskip("plotly")
    assert cli(*command, "--report", "page.html") == (0, [])
    assert cli(*command, *more, "--report", "page.html") == (0, [])
    Path("mine.html").write_text("<!doctype html>\n<p>of somebody</p>")
    status, lines = cli(*command, *more, "--report", "mine.html")
    assert status == 2 and lines == ["error: mine.html: exists already; choose another name or remove it"]
    assert "of somebody" in Path("mine.html").read_text()


@pytest.mark.parametrize("place", ["RunFolder.record", "write_atomically"])
def test_a_run_that_was_killed_before_its_first_frame_goes_on(cli: Cli, monkeypatch, place: str) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"fastchgnet.sim.md.files.{place}", killed)
        assert cli(*MD, "--out", "run")[0] == 130
    assert Path("run", RESTART).exists() == (place == "RunFolder.record")
    assert len(list(Path("run").glob("000-*"))) == 2
    assert cli(*MD, "--out", "run", "--resume") == (0, [])
    (trajectory,) = Path("run").glob("*.extxyz")
    assert [atoms.info["step"] for atoms in ase.io.read(trajectory, ":")] == [0, 1, 2]
    assert len(trajectory.with_suffix(".csv").read_text().splitlines()) == 4


def test_a_folder_without_permission_is_found_before_any_work(cli: Cli, monkeypatch) -> None:
    monkeypatch.setattr(Potential, "forward", lambda *args: pytest.fail("work was done"))
    Path("closed").mkdir(mode=0o555)
    if os.access("closed", os.W_OK):
        pytest.skip("this user may do everything")
    for command in (
        ("predict", "iron.xyz", "--out", "closed/out.json", *MODEL),
        (*RELAX, "--out", "closed/out.extxyz"),
        (*RELAX, "--trajectory", "closed/new/steps"),
        (*MD, "--out", "closed/run"),
        ("evaluate", "model.safetensors", "store", "--out", "closed"),
        ("inspect", "store", "--png", "closed/sizes.png"),
    ):
        status, lines = cli(*command)
        assert status == 2 and len(lines) == 1 and lines[0].startswith("error: closed")
        assert "cannot be written (Permission denied)" in lines[0]
