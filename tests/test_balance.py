"""`bench balance`: what it simulates, measures, writes and draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_bench import file, program  # noqa: F401, a fixture
from test_sampler import made_up

from fastchgnet.bench.balance import STRATEGIES, evenness, fillers, simulate
from fastchgnet.train.sampler import DEFAULT_COST


def test_evenness_of_loads() -> None:
    assert evenness(np.array([1.0, 1.0, 4.0])) == pytest.approx({"cv": 2**0.5 / 2, "efficiency": 0.5})


def test_simulated_shares_are_those_of_the_sampler() -> None:
    found = simulate(made_up(300)[:, :4], 4, 32, DEFAULT_COST, seed=0)
    efficiency = [found[strategy]["efficiency_cost"] for strategy in ("sequential", "paper", "lpt")]
    assert efficiency == sorted(efficiency) and efficiency[0] > 0.5 and efficiency[2] > 0.99
    for plan in found.values():
        assert all(low <= high for low, high in zip(*plan["features"], strict=True))


def test_equal_frames_need_no_sampler() -> None:
    found = simulate(np.tile([4, 200, 16, 180], (10, 1)), 2, 3, DEFAULT_COST, seed=0)
    for plan in found.values():
        assert plan["efficiency_features"] == 1 and plan["cv_features"] == 0


def test_even_batches_need_fewer_fillers() -> None:
    found = fillers(made_up(600), 16, seed=0)
    for kind in ("atoms", "short_bonds", "long_bonds", "angles"):
        shares = [found[strategy][kind] for strategy in ("lpt", "paper", "sequential")]
        assert shares == sorted(shares) and shares[0] > 0 and shares[2] < 1


def test_rows_plot_and_table(file, monkeypatch, capsys) -> None:  # noqa: F811
    args = ("--frames", file, "--batch", 2, "--out", "rows.json", "--label", "here")
    status, out, _ = program(monkeypatch, capsys, "balance", *args, "--ranks", 2, "--ranks", 4, "--json")
    rows = json.loads(Path("rows.json").read_text())
    assert status == 0 and json.loads(out) == rows
    assert [row["case"]["ranks"] for row in rows] == [2, 4]
    assert ["fillers" in row for row in rows] == [True, False]
    for row in rows:
        assert row["command"] == "balance" and row["label"] == "here" and "measured" not in row
        assert row["cost"]["of"] == "operations" and set(row["strategies"]) == set(STRATEGIES)
    args = ("--ranks", 2, "--measure", "--readout", "direct", "--rounds", 1, *args)
    status, out, _ = program(monkeypatch, capsys, "balance", *args)
    assert status == 0 and "measured steps" in out
    row = json.loads(Path("rows.json").read_text())[-1]
    measured = row["measured"]
    assert row["cost"] == {**measured["cost"], "of": "measured steps"} and row["readout"] == "direct"
    for strategy in STRATEGIES:
        seconds = measured["strategies"][strategy]["seconds"]
        assert len(seconds) == 2 and measured["strategies"][strategy]["efficiency"] == pytest.approx(
            np.mean(seconds) / max(seconds)
        )
    assert program(monkeypatch, capsys, "plot", "rows.json", "--out", "balance.png")[0] == 0
    assert Path("balance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--frames", "nowhere.xyz"), "nowhere.xyz: no such file"),
        (("--frames", "crystals.xyz", "--out", "crystals.xyz"), "crystals.xyz: not JSON"),
        (("--frames", "crystals.xyz", "--measure"), "8 frames, fewer than a batch of 128"),
        (("--frames", "crystals.xyz", "--device", "nodevice"), "device nodevice cannot be used"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(file, monkeypatch, capsys, args, reason) -> None:  # noqa: F811
    status, out, lines = program(monkeypatch, capsys, "balance", *args)
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ") and reason in lines[0]
