"""Simulations against chgnet's: what the rows say; figures themselves are nobody's expectation."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import pytest
from crystals import crystals
from test_bench import program

from fastchgnet.bench import rows
from fastchgnet.bench.rows import read
from fastchgnet.bench.table_ii import TABLE_II, tables


@pytest.fixture
def files(tmp_path, monkeypatch) -> list[Path]:
    """Write two crystals and work beside them."""
    monkeypatch.chdir(tmp_path)
    for name, atoms in (("salt", crystals()[0]), ("iron", crystals()[3])):
        ase.io.write(f"{name}.xyz", atoms)
    ase.io.write("both.xyz", crystals()[2:])
    return [Path("salt.xyz"), Path("iron.xyz")]


def test_steps_of_dynamics_give_a_row_for_each_crystal(files, monkeypatch, capsys) -> None:
    args = [word for file in files for word in ("--frames", file)]
    options = ("--repeat", "1x1x2", "--rounds", 1, "--no-chgnet", "--json", "--out", "rows.json")
    status, out, _ = program(monkeypatch, capsys, "md", *args, *options)
    assert status == 0
    found = read(Path("rows.json"))
    assert json.loads(out) == found
    assert [row["crystal"] for row in found] == ["ClNa", "Fe"]
    assert [row["batch"]["atoms"] for row in found] == [4, 2]
    assert all(row["ours"]["wall_seconds"][1] > 0 and row["ours_ase"]["wall_seconds"][1] > 0 for row in found)
    (table,) = tables(found)
    # no arm of chgnet, and none of the paper's crystals
    assert [line[4] for line in table.rows[:2]] == ["—", "—"]
    assert [line[0] for line in table.rows[2:]] == [f"{one.crystal} (absent)" for one in TABLE_II]


def test_the_papers_figures_stand_beside_its_crystals(files, monkeypatch, capsys) -> None:
    program(
        monkeypatch, capsys, "md", "--frames", files[0], "--rounds", 1, "--no-chgnet", "--out", "rows.json"
    )
    (row,) = read(Path("rows.json"))
    row |= {"crystal": "LiMnO2", "batch": row["batch"] | {"atoms": 8}}
    first, *absent = tables([row])[0].rows
    assert first[-3:] == ("22.0", "7.7", "2.86")
    assert [line[0] for line in absent] == ["LiTiPO5 (absent)", "Li9Co7O16 (absent)"]


def test_both_arms_relax_to_the_same_energies(files, monkeypatch, capsys) -> None:
    pytest.importorskip("chgnet")
    args = ("--frames", "both.xyz", "--batch", 2, "--steps", 3, "--json")
    status, out, _ = program(monkeypatch, capsys, "relax", *args)
    (row,) = json.loads(out)
    assert status == 0
    assert row["ours"]["steps"] == row["chgnet"]["steps"] == 6
    # both in single precision, three steps from the same start
    assert row["energy_difference_ev_per_atom"][-1] < 1e-5


def test_documented_tables_are_those_of_the_rows() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "performance.md").read_text()
    shown = {"dynamics-cpu": tables, "relaxation-cpu": rows.tables, "large-cpu": rows.tables}
    for name, as_tables in shown.items():
        found = read(root / "benchmarks" / "results" / f"{name}.json")
        assert rows.markdown(found, as_tables) in page


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("md", "--frames", "nowhere.xyz"), "nowhere.xyz: no such file"),
        (("md", "--frames", "salt.xyz", "--repeat", "2x2"), "expected three numbers"),
        (("md", "--frames", "salt.xyz", "--repeat", "2x0x2"), "expected three numbers"),
        (("relax", "--frames", "salt.xyz", "--batch", "5"), "fewer than a batch of 5"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(files, monkeypatch, capsys, args, reason) -> None:
    status, out, lines = program(monkeypatch, capsys, *args, "--no-chgnet")
    assert (status, out) == (2, "")
    assert lines[-1].startswith("error: ") and reason in lines[-1]
