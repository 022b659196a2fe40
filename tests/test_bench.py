"""The harness: what it times, counts and writes; figures themselves are nobody's expectation."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
import typer
from crystals import crystals
from frames import labelled_atoms

from fastchgnet.bench import correctness, kernels, reference, rows, runs, timing
from fastchgnet.bench.frames import Composition, Pool
from fastchgnet.bench.plot import draw
from fastchgnet.bench.profile import profiled
from fastchgnet.bench.roofline import forward_operations
from fastchgnet.bench.session import Options, Session
from fastchgnet.cli import app, main
from fastchgnet.errors import InputError
from fastchgnet.potential import Potential

CPU = torch.device("cpu")
DESCRIPTIONS = {"options", "environment", "synthetic_labels", "batch"}
BENCH = typer.main.get_command(app).commands["bench"].commands


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """Write eight small frames without labels and work beside them."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("crystals.xyz", [*crystals(), *crystals()])
    return Path("crystals.xyz")


def program(monkeypatch, capsys, *args: object) -> tuple[int, str, list[str]]:
    """Run the command line; return its status, stdout and the lines of stderr."""
    monkeypatch.setattr(sys, "argv", ["fastchgnet", "bench", *map(str, args)])
    with pytest.raises(SystemExit) as exited:
        main()
        sys.exit(0)
    captured = capsys.readouterr()
    return int(exited.value.code or 0), captured.out, captured.err.splitlines()


def test_pool_draws_nested_batches_by_its_seed(file) -> None:
    small, large = (Pool(file, 0).workload(n).frames for n in (2, 5))
    assert [f.source for f in small] == [f.source for f in large[:2]]
    np.testing.assert_array_equal(small[1].forces, large[1].forces)
    assert len({tuple(f.source for f in Pool(file, seed).workload(8).frames) for seed in range(4)}) > 1


def test_own_labels_are_kept_and_drawn_ones_are_named(file) -> None:
    atoms = labelled_atoms(4)
    ase.io.write("labelled.xyz", atoms)
    workload = Pool(Path("labelled.xyz"), 0).workload(4)
    assert workload.synthetic == ()
    drawn = Pool(Path("labelled.xyz"), 0).workload(4, own_labels=False)
    assert drawn.synthetic == ("energy", "forces", "stress", "magmoms")
    assert {f.energy for f in drawn.frames}.isdisjoint(f.energy for f in workload.frames)
    energies = sorted(frame.energy for frame in workload.frames)
    assert energies == pytest.approx(
        sorted(a.get_potential_energy() for a in atoms), rel=1e-7
    )  # digits in file
    assert Pool(file, 0).workload(2).synthetic == ("energy", "forces", "stress", "magmoms")


def test_a_batch_larger_than_the_file_is_refused(file) -> None:
    with pytest.raises(InputError, match="8 frames, fewer than a batch of 9"):
        Pool(file, 0).workload(9)


def test_arms_take_turns_and_the_order_is_reversed_every_other_round(monkeypatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST", 0.0)
    monkeypatch.setattr(timing, "warm_up", lambda work, device: 1)
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = timing.measure(arms, 3, CPU)
    assert "".join(order) == "abbaab"
    assert all(len(taken.wall) == len(taken.cpu) == 3 for taken in samples.values())


def test_ratio_is_the_median_of_pairs() -> None:
    ours, theirs = (
        timing.Samples(np.array(wall), 2 * np.array(wall), 1) for wall in ([1.0, 2.0, 4.0], [3.0, 4.0, 40.0])
    )
    assert timing.ratios(ours, theirs) == {"ratio": 3.0, "ratio_cpu": 3.0}
    assert ours.percentiles()["cpu_seconds"][1] == 4.0


def test_operations_are_those_of_the_layers() -> None:
    batch = Composition(systems=1, atoms=7, edges=60, short_bonds=5, angles=11)
    atoms, bonds, edges, short, angles = 7, 30, 60, 5, 11
    embeddings = [(rows, 31, 64) for rows in (bonds, bonds, short, angles)]
    atom_conv = [(atoms, 64, 256), (bonds, 64, 128), (edges, 64, 64), (edges, 64, 64), (atoms, 64, 64)]
    first = [(atoms, 64, 128), (short, 64, 256), (angles, 64, 128)]
    bond_conv = [*first, (angles, 64, 64), (angles, 64, 64), (short, 64, 64)]
    layers = embeddings + 4 * atom_conv + 3 * bond_conv + 2 * first
    assert forward_operations(batch) == sum(2 * n * width * out for n, width, out in layers)


def test_profile_counts_outermost_operators(capfd) -> None:
    a = torch.ones(4, 4)
    layer = torch.nn.Linear(4, 4)
    # linear calls t and addmm inside itself
    assert profiled(lambda: torch.relu(layer(a)), CPU, n_top=3).counts == {"ops": 2}
    assert capfd.readouterr() == ("", "")


def test_rows_are_appended_and_other_files_are_left_alone(tmp_path) -> None:
    path = tmp_path / "rows.json"
    for number in range(2):
        rows.append(path, [{"command": "train", "n": number}])
    assert [row["n"] for row in rows.read(path)] == [0, 1]
    for text in ("{}", "[1]", "no json"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"rows\.json: not"):
            rows.append(path, [{"command": "train"}])
        assert path.read_text() == text


def test_documented_table_is_that_of_the_rows() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "performance.md").read_text()
    for path in sorted((root / "benchmarks" / "results").glob("performance-*.json")):
        assert rows.markdown(rows.read(path)) in page


def test_documented_counts_of_kernels_are_those_of_the_rows() -> None:
    root = Path(__file__).parents[1]
    counted = rows.markdown(rows.read(root / "benchmarks" / "results" / "kernels.json"), kernels.counted)
    assert counted in (root / "docs" / "performance.md").read_text()


def test_environment_describes_the_run() -> None:
    described = rows.environment(CPU)
    assert described["threads"] == torch.get_num_threads() and described["device"]
    assert described["versions"]["torch"] == torch.__version__
    json.dumps(described)


def test_float32_on_the_cpu_is_correct_and_a_wrong_force_is_not(file, monkeypatch) -> None:
    pytest.importorskip("chgnet")  # has the weights
    session = Session(Options(file, chgnet=False))
    right = list(correctness.check(session))
    assert [row["readout"] for row in right] == ["conservative", "direct"]
    forward = Potential.forward

    def wrong(self: Potential, batch):
        output = forward(self, batch)
        return output._replace(forces=output.forces * 1.01) if self.dtype == torch.float32 else output

    monkeypatch.setattr(Potential, "forward", wrong)
    found = []
    with pytest.raises(
        InputError,
        match=r"forces_ev_per_angstrom of the conservative readout in fp32 is off by .*; .* of the direct",
    ):
        found.extend(correctness.check(session))


@pytest.mark.parametrize(
    ("command", "arms"),
    [
        ("train", {"ours", "ours_with_graphs"}),
        ("infer", {"ours"}),
        ("graph", {"ours", "ours_one_by_one", "ours_from_arrays"}),
        ("kernels", {"ours"}),
        ("data", {"ours", "gather", "step"}),
    ],
)
def test_every_command_gives_rows(file, monkeypatch, capsys, command, arms) -> None:
    args = ("--frames", file, "--batch", 2, "--rounds", 2, "--no-chgnet", "--no-memory", "--json")
    status, out, _ = program(monkeypatch, capsys, command, *args, "--label", "step", "--out", "rows.json")
    assert status == 0
    written = json.loads(Path("rows.json").read_text())
    assert json.loads(out) == written
    readouts = [None] if command == "graph" else ["conservative", "direct"]
    assert [(row["command"], row["readout"], row["label"]) for row in written] == [
        (command, readout, "step") for readout in readouts
    ]
    for row in written:
        assert (
            row.keys() & {"ours", "ours_with_graphs", "ours_one_by_one", "ours_from_arrays", "gather"}
            | (row.keys() & {"step", "chgnet"})
            == arms
        )
        assert row["batch"]["systems"] == 2 and row["batch"]["angles"] > 0
        if command != "kernels":
            low, median, high = row["ours"]["wall_seconds"]
            assert 0 < low <= median <= high
            assert row["ours"]["systems_per_second"] == pytest.approx(2 / median)
        if command in ("train", "infer", "kernels"):
            assert row["ours"]["counts"]["ops"] > 0


def test_against_chgnet_same_weights_say_the_same(file, monkeypatch, capsys) -> None:
    pytest.importorskip("chgnet")
    args = ("--frames", file, "--readout", "conservative", "--rounds", 1, "--no-memory", "--out", "rows.json")
    for command in ("train", "infer"):
        status, out, _ = program(monkeypatch, capsys, command, *args, "--batch", 2)
        assert status == 0 and "chgnet" in out
    train, infer = rows.read(Path("rows.json"))
    assert train["ratio"] > 0 and train["chgnet"]["counts"]["ops"] > train["ours"]["counts"]["ops"]
    # float32 of the published model is this far from its own float64 at worst
    assert infer["largest_difference"]["forces_ev_per_angstrom"] < 5e-4
    assert infer["chgnet"]["batch_size"] in (1, 4, 16)
    draw(Path("rows.json"), Path("steps.png"))
    assert Path("steps.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_of_all_that_fails_keeps_no_other_from_running(file, monkeypatch, capsys) -> None:
    def broken(session, workload, readout):
        raise RuntimeError("CUDA error: no more\nsecond line")

    def fine(session, workload, readout):
        return session.row("made", workload, readout, "a note")

    made = {name: (broken if name == "infer" else fine, (1,), (1,)) for name in runs.RUNS}
    monkeypatch.setattr(runs, "RUNS", made)
    monkeypatch.setattr(correctness, "check", lambda session: iter(()))
    args = ("--frames", file, "--no-chgnet", "--readout", "direct", "--out", "rows.json")
    status, _, lines = program(monkeypatch, capsys, "all", *args)
    assert status == 2 and lines[-1] == "error: cpu: infer failed, the others are done; see above"
    assert "warning: infer failed, the others go on: CUDA error: no more" in lines
    assert len(rows.read(Path("rows.json"))) == len(runs.ALL) - 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_grows_with_the_batch(file, monkeypatch, capsys) -> None:
    args = ("--frames", file, "--readout", "conservative", "--no-chgnet", "--json")
    _, out, _ = program(monkeypatch, capsys, "memory", *args, "--batch", 1, "--batch", 8)
    small, large = (row["ours"]["peak_memory_mb"] for row in json.loads(out))
    assert 0 < small < large


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("train", "--frames", "nowhere.xyz"), "nowhere.xyz: no such file"),
        (("train", "--frames", "."), ".: is a folder"),
        (("infer", "--frames", "bad.xyz"), "bad.xyz:0: "),
        (("train", "--frames", "crystals.xyz", "--device", "nodevice"), "device nodevice cannot be used"),
        (("train", "--frames", "crystals.xyz", "--out", "crystals.xyz"), "crystals.xyz: not JSON"),
        (("plot", "nowhere.json", "--out", "a.png"), "nowhere.json: cannot be read"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(file, monkeypatch, capsys, args, reason) -> None:
    Path("bad.xyz").write_text("two\n\nH 0 0 0\n")
    options = () if args[0] == "plot" else ("--no-chgnet",)
    status, out, lines = program(monkeypatch, capsys, *args, *options)
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ") and reason in lines[0]


def test_without_chgnet_one_line_says_how_to_get_it(file, monkeypatch, capsys) -> None:
    find = importlib.util.find_spec
    absent = lambda name, *args: None if name == "chgnet" else find(name, *args)  # noqa: E731
    monkeypatch.setattr(reference.importlib.util, "find_spec", absent)
    status, _, lines = program(monkeypatch, capsys, "train", "--frames", file)
    assert status == 2 and len(lines) == 1 and "pip install chgnet==" in lines[0]


@pytest.mark.parametrize("name", sorted(BENCH))
def test_help_has_an_example(monkeypatch, capsys, name) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = program(monkeypatch, capsys, name, "--help")
    assert status == 0 and f"Example: fastchgnet bench {name} " in out
