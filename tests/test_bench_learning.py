"""`bench lr`: three real runs with different learning rates, as rows, table and picture."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from test_bench import program
from test_train import emt_frames

from fastchgnet.bench import learning, learning_plot, rows
from fastchgnet.config import Provenance, RunConfig
from fastchgnet.data.store import write_store
from fastchgnet.loss import REPORT_UNITS
from fastchgnet.train import train
from fastchgnet.train.log import read_metrics

ARGS = ("lr", "--train", "train", "--val", "val", "--batch", 8, "--base-batch", 2, "--epochs", 2)


@pytest.fixture(autouse=True)
def stores(tmp_path, monkeypatch) -> None:
    """Write stores of 8 and 3 small crystals, without magnetic moments, and work beside them."""
    monkeypatch.chdir(tmp_path)
    for number, (name, size) in enumerate((("train", 8), ("val", 3))):
        write_store(emt_frames(size, number), Path(name), Provenance(name="emt"))


def test_rows_table_and_plot(monkeypatch, capsys) -> None:
    args = (*ARGS, "--rate", 1e-3, "--readout", "direct", "--label", "here", "--out", "rows.json", "--json")
    status, out, said = program(monkeypatch, capsys, *args)
    written = json.loads(Path("rows.json").read_text())
    assert status == 0 and json.loads(out) == written
    assert [(row["arm"], row["batch_size"], row["learning_rate"]) for row in written] == [
        ("default", 8, 1e-3),
        ("scaled", 8, 4e-3),
        ("base", 2, 1e-3),
    ]
    for row in written:
        assert (row["command"], row["readout"], row["label"]) == ("lr", "direct", "here")
        assert row["options"]["train"] == "train" and row["frames"] == {"train": 8, "val": 3}
        n_batches = 8 // row["batch_size"]
        assert [(point["epoch"], point["step"]) for point in row["curve"]] == [
            (1, n_batches),
            (2, 2 * n_batches),
        ]
        assert row["failed_in_epoch"] is None and row["curve"][1]["magmoms_mmub"] is None
    assert sum("epoch 2:" in line for line in said) == 3

    status, out, _ = program(monkeypatch, capsys, "table", "rows.json")
    last = written[1]["curve"][1]
    assert status == 0 and f"| scaled here | 8 | 0.004 | 2 | {last['energy_mev_per_atom']:,.0f} |" in out
    assert out.count("\n") == 5 and out.count("| — |") == 3

    assert program(monkeypatch, capsys, "plot", "rows.json", "--out", "rates.png")[0] == 0
    assert Path("rates.png").read_bytes().startswith(b"\x89PNG")


def test_an_arm_is_the_run_that_its_row_describes(monkeypatch, capsys) -> None:
    args = (*ARGS, "--rate", 1e-3, "--readout", "direct", "--seed", 3, "--out", "rows.json")
    assert program(monkeypatch, capsys, *args)[0] == 0
    values = {
        "model": {"readout": "direct"},
        "optim": {"learning_rate": 1e-3, "base_batch_size": 2},
        "data": {"train": "train", "val": "val", "batch_size": 8},
        "train": {"out": "run", "epochs": 2, "seed": 3, "device": "cpu"},
    }
    train(RunConfig.model_validate(values))
    scaled = rows.read(Path("rows.json"))[1]
    for mine, point in zip(read_metrics(Path("run")), scaled["curve"], strict=True):
        assert {name: point[name] for name in REPORT_UNITS} == {
            name: mine["val"][name] for name in REPORT_UNITS
        }


def test_a_rate_that_is_too_high_is_a_result(monkeypatch, capsys) -> None:
    monkeypatch.setattr(learning, "train", _trainer_of_patience(1e30, learning.train))
    args = (*ARGS, "--rate", 1e-3, "--readout", "direct", "--out", "rows.json")
    status, out, _ = program(monkeypatch, capsys, *args)
    assert status == 0 and "failed in epoch" in out
    found = rows.read(Path("rows.json"))
    assert [bool(row["failed_in_epoch"]) for row in found] == [False, True, False]
    assert len(found[1]["curve"]) == found[1]["failed_in_epoch"] - 1
    assert program(monkeypatch, capsys, "plot", "rows.json", "--out", "rates.png")[0] == 0


def _trainer_of_patience(rate, trainer):
    """Train scaled runs with this rate."""

    def patched(config, **options):
        if config.optim.base_batch_size is not None:
            config = config.model_copy(
                update={"optim": config.optim.model_copy(update={"learning_rate": rate})}
            )
        return trainer(config, **options)

    return patched


def test_ctrl_c_leaves_no_rows(monkeypatch, capsys) -> None:
    class Interrupter(learning._Follower):
        def finish(self, row):
            super().finish(row)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(learning, "_Follower", Interrupter)
    status, out, _ = program(monkeypatch, capsys, *ARGS, "--readout", "direct", "--out", "rows.json")
    assert (status, out) == (130, "") and not Path("rows.json").exists()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--train", "nowhere"), "nowhere"),
        (("--batch", 9), "--batch 9: train has only 8 training frames"),
        (("--base-batch", 8), "--base-batch 8: expected fewer frames than --batch 8"),
        (("--rate", "inf"), "--rate inf: expected a positive number"),
        (("--rate", 1e308), "--rate 1e+308: expected a positive number"),
        (("--rate", 0), "--rate 0: expected a positive number"),
        (("--device", "nodevice"), "device nodevice cannot be used"),
        (("--out", "train/header.json"), "not a list of rows"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(monkeypatch, capsys, args, reason) -> None:
    before = sorted(Path().rglob("*"))
    status, out, lines = program(monkeypatch, capsys, *ARGS, *args)
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ") and reason in lines[0]
    assert sorted(Path().rglob("*")) == before


def test_where_every_rate_fails_there_are_no_rows(monkeypatch, capsys) -> None:
    args = (*ARGS, "--rate", 1e30, "--readout", "direct", "--out", "rows.json")
    status, _, lines = program(monkeypatch, capsys, *args)
    assert status == 2 and lines[-1] == "error: --rate 1e+30: no run finished an epoch; try a lower one"
    assert not Path("rows.json").exists()


def test_the_last_comparison_is_drawn_where_there_are_labels() -> None:
    def made(arm: str, seed: int, error: float) -> dict:
        point = dict.fromkeys(REPORT_UNITS, error) | {"magmoms_mmub": None}
        return {
            "options": {"seed": seed},
            "arm": arm,
            "readout": "direct",
            "frames": {"train": 8, "val": 3},
            "batch_size": 8,
            "learning_rate": 1e-3,
            "curve": [{"epoch": epoch, **point} for epoch in (1, 2)],
            "failed_in_epoch": None,
        }

    found = [made(arm, seed, seed + 1.0) for seed in (0, 1) for arm in ("default", "scaled", "base")]
    axes = learning_plot.figure(found).axes
    assert [one.get_title() for one in axes] == ["Energy", "Force", "Stress"]
    for one in axes:
        assert [list(line.get_ydata()) for line in one.lines] == [[2.0, 2.0]] * 3
        colors = [line.get_color() for line in one.lines]
        assert colors[1:] == ["#d1603d", "#2f6690"]  # red and blue, as in the paper


def test_documented_table_is_that_of_the_rows() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "training.md").read_text()
    for path in sorted((root / "benchmarks" / "results").glob("learning-rate*.json")):
        assert rows.markdown(rows.read(path), learning.tables) in page
