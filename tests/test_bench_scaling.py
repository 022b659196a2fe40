"""`bench scaling`: the model against hand-made cases, and the command with real processes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from crystals import crystals
from frames import labelled_atoms
from test_bench import file, program  # noqa: F401, a fixture
from test_sampler import made_up

from fastchgnet.bench import rows as bench_rows
from fastchgnet.bench import scaling, scaling_launch, scaling_tables
from fastchgnet.bench.scaling_model import (
    Case,
    Gradient,
    Model,
    Network,
    add_efficiencies,
    assumed_cost,
    divide,
)
from fastchgnet.bench.session import Options, Session
from fastchgnet.bench.steps import file_sizes
from fastchgnet.data.frame import Frame
from fastchgnet.errors import InputError
from fastchgnet.train.sampler import DEFAULT_COST, Cost

LINKS = Network(gpus_per_node=4, latency=10.0, bandwidth=0.5, inner_latency=1.0, inner_bandwidth=8.0)
FREE = Network(latency=0.0, bandwidth=math.inf, inner_latency=0.0, inner_bandwidth=math.inf)
COST = Cost(frame=0.0, atom=1.0, edge=0.0, angle=0.0, step=0.0)


def test_allreduce_within_a_node_and_between_nodes() -> None:
    assert LINKS.ring(16, 4) == 2 * 3 * (1 + 16 / (4 * 8))
    assert LINKS.tree(16, 4) == 2 * 2 * (1 + 16 / 8)
    # 16 GPUs in 4 nodes: all steps of the ring wait for the slow links, two of the tree's four do
    assert LINKS.ring(16, 16) == 2 * 15 * (10 + 16 / (16 * 0.5))
    assert LINKS.tree(16, 16) == 2 * (2 * (1 + 16 / 8) + 2 * (10 + 16 / 0.5))
    # 5 GPUs need a second node, and what is left of the tree there
    assert LINKS.tree(16, 5) == 2 * (2 * (1 + 16 / 8) + 1 * (10 + 16 / 0.5))
    assert LINKS.ring(16, 1) == LINKS.tree(16, 1) == 0


def test_the_faster_algorithm_wins_by_the_size_of_the_message() -> None:
    assert LINKS.allreduce(1, 16) == LINKS.tree(1, 16) < LINKS.ring(1, 16)
    assert LINKS.allreduce(1e6, 16) == LINKS.ring(1e6, 16) < LINKS.tree(1e6, 16)


def test_messages_follow_each_other() -> None:
    assert Gradient(64, 4).seconds(8, LINKS) == 4 * LINKS.allreduce(16, 8)


def test_a_step_is_the_largest_share_and_what_does_not_shrink() -> None:
    loads = np.array([[1.0, 3.0], [2.0, 2.0]])
    model = Model(COST._replace(step=0.5), Gradient(16, 2), LINKS)
    allreduce = 2 * LINKS.allreduce(8, 2)
    point = model.point(loads, planning=0.0)
    spent = {"work": 2.0, "waiting": 0.5, "fixed": 0.5, "allreduce": allreduce, "planning": 0.0}
    assert point["spent"] == spent
    assert point["seconds"] == pytest.approx(3.0 + allreduce)
    assert point["seconds_hidden"] == pytest.approx(3.0 + allreduce / 2)


def test_planning_shows_where_it_takes_longer_than_the_step() -> None:
    model = Model(COST, Gradient(16, 1), FREE)
    for planning, seconds in ((0.5, 2.0), (2.5, 2.5)):
        point = model.point(np.full((1, 2), 2.0), planning)
        assert point["seconds"] == point["seconds_hidden"] == seconds
        assert point["spent"]["planning"] == seconds - 2.0


def test_efficiencies_by_hand() -> None:
    strong = [{"ranks": n, "frames": 64, "seconds": t} for n, t in ((1, 8.0), (4, 2.5), (8, 1.6))]
    add_efficiencies(strong)
    assert [one["efficiency_1"] for one in strong] == pytest.approx([1, 8 / (4 * 2.5), 8 / (8 * 1.6)])
    assert [one["efficiency_4"] for one in strong] == pytest.approx([2.5 * 4 / 8, 1, 2.5 * 4 / (1.6 * 8)])
    weak = [{"ranks": n, "frames": 64 * n, "seconds": t} for n, t in ((1, 8.0), (8, 10.0))]
    add_efficiencies(weak)
    assert [one["efficiency_1"] for one in weak] == pytest.approx([1, 0.8])
    assert "efficiency_4" not in weak[0]


def test_without_losses_scaling_is_ideal() -> None:
    sizes = np.tile([4, 200, 16, 180, 9], (16, 1))
    for case in (Case("strong", 32), Case("weak", 4)):
        found = scaling.simulate(sizes, case, (2, 8), Model(COST, Gradient(1000, 4), FREE), seed=0)
        assert set(found) == {"sequential", "paper", "lpt"}
        for points in found.values():
            assert [one["ranks"] for one in points] == [1, 2, 4, 8]  # 1 and 4 for the efficiencies
            for one in points:
                assert one["efficiency_1"] == one["efficiency_4"] == pytest.approx(1)
                assert one["efficiency_4_hidden"] == pytest.approx(1)


def test_simulated_losses_are_those_of_the_shares_and_the_links() -> None:
    sizes = made_up(300)
    links = Network(latency=1.0, bandwidth=100.0, inner_latency=0.1, inner_bandwidth=1000.0)
    model = Model(DEFAULT_COST._replace(step=5.0), Gradient(1000, 4), links)
    found = scaling.simulate(sizes, Case("strong", 64), (1, 16), model, seed=0)
    for points in found.values():
        one = points[-1]
        assert one["frames"] == 64 and one["seconds"] == pytest.approx(sum(one["spent"].values()))
        assert one["spent"]["fixed"] == 5 and one["spent"]["allreduce"] == model.gradient.seconds(16, links)
        assert one["efficiency_4"] < one["efficiency_4_hidden"] < 1
        assert points[0]["spent"]["waiting"] == points[0]["spent"]["allreduce"] == 0
    waiting = [found[strategy][-1]["spent"]["waiting"] for strategy in ("lpt", "paper", "sequential")]
    assert waiting == sorted(waiting)


def test_shares_are_those_of_the_sampler() -> None:
    sizes = made_up(64)
    loads, seconds = divide(sizes, [np.arange(64), np.arange(32)], 4, "lpt", COST)
    assert loads.shape == (2, 4) and seconds > 0
    assert loads.sum(1) == pytest.approx([sizes[:, 0].sum(), sizes[:32, 0].sum()])
    assert divide(sizes, [np.arange(64)], 1, "lpt", COST)[1] == 0


def test_an_assumed_cost_has_the_mean_that_was_asked_for() -> None:
    sizes = made_up(50)
    cost = assumed_cost(sizes, 45e-6, 4e-4)
    assert cost.of(sizes).mean() == pytest.approx(45e-6) and cost.step == 4e-4
    assert cost.angle / cost.atom == pytest.approx(DEFAULT_COST.angle / DEFAULT_COST.atom)


def test_sizes_of_a_file(file) -> None:  # noqa: F811
    sizes = file_sizes(file)
    assert sizes.shape == (8, 5) and sizes[:, 0].tolist() == [len(a) for a in crystals()] * 2


def test_an_assumed_step_is_simulated_and_labelled(file, monkeypatch, capsys) -> None:  # noqa: F811
    args = ("--frames", file, "--frame-us", 45, "--fixed-us", 400, "--batch", 64, "--per-rank", 4)
    args = (*args, "--gpus-per-node", 8, "--latency-us", 5, "--bandwidth", 50, "--out", "rows.json")
    status, out, lines = program(monkeypatch, capsys, "scaling", *args, "--label", "here", "--json")
    found = json.loads(Path("rows.json").read_text())
    assert status == 0 and json.loads(out) == found
    assert lines == [
        f"scaling: simulating {text} frames" for text in ("strong scaling, 64", "weak scaling, 4")
    ]
    for row, mode in zip(found, ("strong", "weak"), strict=True):
        assert row["kind"] == "simulated" and row["mode"] == mode and row["label"] == "here"
        assert row["note"].startswith("Simulated: these GPUs were not used")
        assert row["step"]["of"] == "assumption" and row["step"]["cost"]["step"] == pytest.approx(4e-4)
        assert row["network"]["gpus_per_node"] == 8 and row["network"]["bandwidth"] == 50e9
        assert row["network"]["latency"] == pytest.approx(5e-6)
        assert [one["ranks"] for one in row["strategies"]["lpt"]] == [1, 2, 4, 8, 16, 32]
        assert 1.6e6 < row["gradient"]["n_bytes"] < 1.8e6  # 4 bytes for each of 412,000 parameters or so
    status, out, _ = program(monkeypatch, capsys, "table", "rows.json")
    assert status == 0 and "| direct, strong, 64 | assumed: 45 us a frame + 400 us |" in out
    assert "| published, strong, 2,048 | A100 | 82.5% | 79.5% | 65.8% |" in out
    assert program(monkeypatch, capsys, "plot", "rows.json", "--out", "scaling.png")[0] == 0
    assert Path("scaling.png").read_bytes().startswith(b"\x89PNG")


def test_processes_are_timed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ase.io.write("crystals.xyz", labelled_atoms(4))
    said: list[str] = []
    session = Session(Options(Path("crystals.xyz"), (), ("direct",), rounds=2, chgnet=False), said.append)
    point = scaling_launch.measure(session, 2, session.pool.workload(4).frames)
    assert said[0] == "scaling: 4 frames in 2 processes on cpu"
    assert all(line.startswith("warning: other processes") for line in said[1:])
    low, median, high = point["wall_seconds"]
    assert (point["ranks"], point["frames"]) == (2, 4) and 0 < low <= median == point["seconds"] <= high
    assert len(point["cpu_seconds"]) == 2 and min(point["cpu_seconds"]) > 0
    assert point["other_work_cores"] is None or 0 <= point["other_work_cores"] <= (os.cpu_count() or 1)


def test_measured_and_simulated_rows(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    ase.io.write("crystals.xyz", labelled_atoms(16))
    timed: list[tuple[int, int]] = []

    def measure(session: Session, n_ranks: int, frames: list[Frame]) -> dict[str, object]:
        timed.append((n_ranks, n_frames := len(frames)))
        seconds = n_frames / n_ranks + 1.0
        common = {"wall_seconds": [seconds] * 3, "other_work_cores": None}
        return {"ranks": n_ranks, "frames": n_frames, "seconds": seconds, **common}

    monkeypatch.setattr(scaling_launch, "measure", measure)
    monkeypatch.setattr(scaling_launch, "n_devices", lambda device: 2)
    args = (
        "--frames",
        "crystals.xyz",
        "--ranks",
        2,
        "--ranks",
        8,
        "--timed",
        2,
        "--batch",
        16,
        "--rounds",
        1,
    )
    n_threads = torch.get_num_threads()
    status, out, _ = program(monkeypatch, capsys, "scaling", *args, "--per-rank", 2, "--out", "rows.json")
    assert status == 0 and torch.get_num_threads() == n_threads
    assert "measured, a process for each device" in out and "simulated efficiency" in out
    assert timed == [(1, 4), (2, 4), (1, 2)]  # two processes on four frames are both strong and weak
    found = bench_rows.read(Path("rows.json"))
    kinds = [("measured", "strong"), ("measured", "weak"), ("simulated", "strong"), ("simulated", "weak")]
    assert [(row["kind"], row["mode"]) for row in found] == kinds
    for row in found:
        assert row["step"]["of"] == "measurement" and row["step"]["seconds_of"] == "cpu"
        assert row["readout"] == "direct" and row["environment"]["threads"] == 1
    strong, weak = (row["points"] for row in found[:2])
    assert [one["efficiency_1"] for one in strong] == pytest.approx([1, 5 / (2 * 3)])
    assert [one["efficiency_1"] for one in weak] == pytest.approx([1, 1])
    assert all(one["modelled_seconds"] > 0 for one in (*strong, *weak))
    assert [one["ranks"] for one in found[2]["strategies"]["lpt"]] == [1, 2, 4, 8]
    assert program(monkeypatch, capsys, "plot", "rows.json", "--out", "scaling.png")[0] == 0
    assert Path("scaling.png").read_bytes().startswith(b"\x89PNG")


def test_measured_batches_of_weak_scaling_are_of_even_size() -> None:
    sizes = made_up(64)
    found = scaling._batches(sizes, (1, 2, 4))
    for n in (1, 2, 4):
        assert found["strong", n].tolist() == list(range(64))
        weak = found["weak", n]
        assert len(set(weak.tolist())) == len(weak) == 16 * n
        # a quarter of the cost for each; in order, the quarters of these frames differ by 18 to 37%
        assert DEFAULT_COST.of(sizes[weak]).sum() / n == pytest.approx(
            DEFAULT_COST.of(sizes).sum() / 4, rel=0.02
        )


BREAKS = """
import os, sys, time
from pathlib import Path
from fastchgnet.bench import scaling_worker

def broken(folder, asked):
    if os.environ["RANK"] == "1":
        raise RuntimeError("the fan fell off")
    time.sleep(60)

scaling_worker._time = broken
scaling_worker.main(Path(sys.argv[1]))
"""


def test_a_failing_process_is_reported_in_one_line(file, monkeypatch) -> None:  # noqa: F811
    Path("breaks.py").write_text(BREAKS)
    monkeypatch.setattr(scaling_launch, "_WORKER", "breaks")
    session = Session(Options(file, (), ("direct",), rounds=1, chgnet=False))
    with pytest.raises(InputError, match="2 processes failed: rank 1: RuntimeError: the fan fell off"):
        scaling_launch.measure(session, 2, session.pool.workload(4).frames)


@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("import os\nos.kill(os.getpid(), 9)", r"Signal 9 \(SIGKILL\) received by PID \d+"),
        ("", "status 0, and nobody said why"),
    ],
)
def test_processes_that_end_without_a_word(file, monkeypatch, worker, reason) -> None:  # noqa: F811
    Path("silent.py").write_text(worker)
    monkeypatch.setattr(scaling_launch, "_WORKER", "silent")
    session = Session(Options(file, (), ("direct",), rounds=1, chgnet=False))
    with pytest.raises(InputError, match=f"1 process failed: {reason}$"):
        scaling_launch.measure(session, 1, session.pool.workload(2).frames)


def test_processes_that_hang_are_ended(file, monkeypatch, capsys) -> None:  # noqa: F811
    Path("hangs.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(scaling_launch, "_WORKER", "hangs")
    monkeypatch.setattr(scaling_launch, "LIMIT", 3.0)
    monkeypatch.setattr(scaling_launch, "n_devices", lambda device: 1)
    monkeypatch.setattr(scaling, "N_FITTED", 2)
    status, out, lines = program(
        monkeypatch, capsys, "scaling", "--frames", file, "--timed", 2, "--rounds", 1
    )
    assert (status, out) == (2, "")
    assert lines[-1] == "error: 1 process did not end within 3 s"


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--frames", "nowhere.xyz"), "nowhere.xyz: no such file"),
        (("--frames", "crystals.xyz", "--out", "crystals.xyz"), "crystals.xyz: not JSON"),
        (("--frames", "crystals.xyz"), "8 frames, fewer than a batch of 256"),
        (("--frames", "crystals.xyz", "--device", "nodevice"), "device nodevice cannot be used"),
        (("--frames", "crystals.xyz", "--fixed-us", 400), "--fixed-us goes with --frame-us"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(file, monkeypatch, capsys, args, reason) -> None:  # noqa: F811
    status, out, lines = program(monkeypatch, capsys, "scaling", *args)
    assert (status, out) == (2, "")
    assert lines[-1].startswith("error: ") and reason in lines[-1]
    assert all(line.startswith("scaling: ") for line in lines[:-1])


def test_documented_tables_are_those_of_the_rows() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "scaling.md").read_text()
    found = bench_rows.read(root / "benchmarks" / "results" / "scaling.json")
    for table in scaling_tables.markdown(found).split("\n\n"):
        assert table.strip() in page
