"""`fastchgnet bench COMMAND`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fastchgnet.bench.rows import Row
    from fastchgnet.report import Table

app = typer.Typer(
    help="Time ours and the published chgnet in one process, on the same frames.",
    no_args_is_help=True,
    epilog="Example: fastchgnet bench train --frames crystals.xyz --batch 16 --threads 2",
)

HELP = {
    "train": "Time one optimiser step.",
    "infer": "Time energies, forces, stresses and magnetic moments of frames, graphs included.",
    "graph": "Time graph building.",
    "kernels": "Count and rank what a training step executes, and at half the batch.",
    "memory": "Measure the peak memory of a training step.",
    "data": "Time reading frames and building graphs, beside a training step.",
    "all": "Check results against float64 on the CPU, then run train, infer, graph, kernels and data.",
}


class ReadoutName(StrEnum):
    """A readout; typer repeats options of enumerations, not of literals."""

    conservative = "conservative"
    direct = "direct"


Frames = Annotated[Path, typer.Option(help="File of crystals, such as .xyz; its own labels are used.")]
Batch = Annotated[list[int] | None, typer.Option(min=1, help="Frames in a batch; repeatable.")]
Readout = Annotated[list[ReadoutName] | None, typer.Option(help="Repeatable; default: both.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: as torch chooses.")]
Rounds = Annotated[int, typer.Option(min=1, help="Times that each arm is timed, in turn.")]
Seed = Annotated[int, typer.Option(min=0, help="Draws the frames, and labels where they have none.")]
Label = Annotated[str, typer.Option(help="Name of this step of the optimisation.")]
Chgnet = Annotated[bool, typer.Option("--chgnet/--no-chgnet", help="Compare with chgnet.")]
Memory = Annotated[bool, typer.Option("--memory/--no-memory", help="train, infer: measure peak memory too.")]
Out = Annotated[Path | None, typer.Option(help="Also append the rows to this JSON list.")]
Json = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")]


def _handler(name: str) -> Callable[..., None]:
    """Make the handler of a sub-command; all take the same options."""

    def handler(
        frames: Frames,
        batch: Batch = None,
        readout: Readout = None,
        device: Device = "cpu",
        threads: Threads = None,
        rounds: Rounds = 5,
        seed: Seed = 0,
        label: Label = "",
        chgnet: Chgnet = True,
        memory: Memory = True,
        out: Out = None,
        as_json: Json = False,
    ) -> None:
        from fastchgnet.bench.rows import tables
        from fastchgnet.bench.runs import run
        from fastchgnet.bench.session import Options

        readouts = tuple(one.value for one in readout or ReadoutName)
        options = Options(
            frames, tuple(batch or ()), readouts, device, threads, rounds, seed, label, chgnet, memory
        )
        show(run(name, options, out, _say), as_json, tables)

    return handler


for _name, _help in HELP.items():
    _example = f"Example: fastchgnet bench {_name} --frames crystals.xyz --threads 2 --out rows.json"
    app.command(_name, help=_help, epilog=_example)(_handler(_name))


@app.command(epilog="Example: fastchgnet bench balance --frames crystals.xyz --ranks 32 --batch 64 --measure")
def balance(
    frames: Frames,
    ranks: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; default: 4, 8, 16, 32.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Frames of each rank; repeatable; default: 32, 64, 128.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Fit the cost to steps, and time those of the first case.")
    ] = False,
    readout: Annotated[ReadoutName, typer.Option(help="Of the steps.")] = ReadoutName.conservative,
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Times that each step is timed; the shortest counts.")
    ] = 3,
    seed: Seed = 0,
    label: Label = "",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Divide global batches among ranks by every strategy, simulated, and tell how even the shares are."""
    from fastchgnet.bench import balance as bench
    from fastchgnet.bench.rows import append, check_out
    from fastchgnet.bench.session import Options, Session

    check_out(out)
    options = Options(
        frames, tuple(batch or ()), (readout.value,), device, threads, rounds, seed, label, False, False
    )
    session = Session(options, _say)
    rows = bench.run(session, ranks or bench.RANKS, measure)
    if out is not None:
        append(out, rows)
    show(rows, as_json, bench.tables)


@app.command(epilog="Example: fastchgnet bench scaling --frames crystals.xyz --batch 4096 --out scaling.json")
def scaling(
    frames: Frames,
    ranks: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; default: 1, 2, ... 32.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Strong: frames in all; repeatable; default: 2048.")
    ] = None,
    per_rank: Annotated[
        list[int] | None, typer.Option(min=1, help="Weak: frames of each rank; repeatable; default: 512.")
    ] = None,
    timed: Annotated[
        int | None, typer.Option(min=2, help="Frames of a process in timed steps; default: CPU 32, GPU 128.")
    ] = None,
    frame_us: Annotated[
        float | None, typer.Option(min=0.001, help="Time nothing; assume that a mean frame takes this long.")
    ] = None,
    fixed_us: Annotated[float, typer.Option(min=0, help="With --frame-us: what any step takes on top.")] = 0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Simulated GPUs with fast links.")] = 4,
    latency_us: Annotated[float, typer.Option(min=0, help="Simulated, of a message between nodes.")] = 10,
    bandwidth: Annotated[float, typer.Option(min=0.001, help="Simulated, GB/s between nodes.")] = 25,
    readout: Annotated[ReadoutName, typer.Option(help="Of the steps.")] = ReadoutName.direct,
    device: Device = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Times that each step is timed.")] = 5,
    seed: Seed = 0,
    label: Label = "",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure scaling with a process for each core or GPU, and simulate it beyond them."""
    from fastchgnet.bench import scaling as bench
    from fastchgnet.bench.rows import append, check_out
    from fastchgnet.bench.scaling_tables import tables
    from fastchgnet.bench.session import Options, Session
    from fastchgnet.errors import InputError

    if fixed_us and frame_us is None:
        raise InputError("--fixed-us goes with --frame-us; without it, steps are timed")
    check_out(out)
    options = Options(frames, (), (readout.value,), device, None, rounds, seed, label, False, False)
    asked = bench.Asked(
        tuple(ranks or bench.RANKS),
        tuple(batch or bench.STRONG),
        tuple(per_rank or bench.WEAK),
        timed,
        None if frame_us is None else (1e-6 * frame_us, 1e-6 * fixed_us),
        bench.Network(gpus_per_node, 1e-6 * latency_us, 1e9 * bandwidth),
    )
    rows = bench.run(Session(options, _say), asked)
    if out is not None:
        append(out, rows)
    show(rows, as_json, tables)


@app.command(epilog="Example: fastchgnet bench lr --train runs/train --val runs/val --out learning-rate.json")
def lr(
    train: Annotated[Path, typer.Option(help="Store of training frames, from `fastchgnet prepare`.")],
    val: Annotated[Path | None, typer.Option(help="That of validation frames; default: a split.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Frames in a large batch.")] = 2048,
    base_batch: Annotated[int, typer.Option(min=1, help="Frames for which the rate is meant.")] = 128,
    rate: Annotated[float, typer.Option(help="Highest learning rate for base batches.")] = 3e-4,
    epochs: Annotated[int, typer.Option(min=1, help="Of each run.")] = 30,
    readout: Annotated[ReadoutName, typer.Option(help="Of the model.")] = ReadoutName.conservative,
    device: Device = "cpu",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of weights and order of frames.")] = 0,
    label: Label = "",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train in large batches with the default learning rate and the scaled one, and in base batches."""
    from fastchgnet.bench import learning
    from fastchgnet.bench.rows import append, check_out

    check_out(out)
    asked = learning.Comparison(
        train, val, batch, base_batch, rate, epochs, readout.value, device, threads, seed, label
    )
    rows = learning.run(asked, _say)
    if out is not None:
        append(out, rows)
    show(rows, as_json, learning.tables)


@app.command(epilog="Example: fastchgnet bench md --frames LiMnO2.cif --repeat 4x4x2 --threads 2")
def md(
    frames: Annotated[list[Path], typer.Option(help="File of a crystal; its first frame. Repeatable.")],
    repeat: Annotated[str, typer.Option(help="Cells of a supercell along each axis.")] = "1x1x1",
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Rounds = 5,
    seed: Seed = 0,
    label: Label = "",
    chgnet: Chgnet = True,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time steps of molecular dynamics, and print them as the paper's Table II."""
    from fastchgnet.bench.simulate import run_md
    from fastchgnet.bench.table_ii import tables

    common = {"device": device, "threads": threads, "rounds": rounds, "seed": seed, "label": label}
    show(run_md(frames, repeat, {**common, "chgnet": chgnet}, out, _say), as_json, tables)


@app.command(epilog="Example: fastchgnet bench relax --frames crystals.xyz --batch 100 --rounds 1")
def relax(
    frames: Frames,
    batch: Annotated[int, typer.Option(min=1, help="Frames to relax.")] = 10,
    fmax: Annotated[float, typer.Option(help="Largest force at the end, eV/A.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="At most so many for each.")] = 500,
    device: Device = "cpu",
    threads: Threads = None,
    rounds: Rounds = 1,
    seed: Seed = 0,
    label: Label = "",
    chgnet: Chgnet = True,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time the relaxation of many crystals."""
    from fastchgnet.bench.rows import tables
    from fastchgnet.bench.simulate import run_relax

    common = {"device": device, "threads": threads, "rounds": rounds, "seed": seed, "label": label}
    asked = {"frames": frames, "chgnet": chgnet, **common}
    show(run_relax(asked, batch, fmax, steps, out, _say), as_json, tables)


@app.command(epilog="Example: fastchgnet bench plot benchmarks/results/performance-cpu.json --out steps.png")
def plot(
    rows: Annotated[Path, typer.Argument(help="JSON list of rows from one device.")],
    out: Annotated[Path, typer.Option(help="Write this PNG.")],
) -> None:
    """Draw rows of training and inference as steps of the optimisation, or of balance, scaling or lr."""
    from fastchgnet.bench.plot import draw

    draw(rows, out)


@app.command(epilog="Example: fastchgnet bench table benchmarks/results/performance-cpu.json")
def table(rows: Annotated[Path, typer.Argument(help="JSON list of rows from one device.")]) -> None:
    """Print rows as a Markdown table, as docs/performance.md has it."""
    from fastchgnet.bench import kernels, learning, scaling_tables, table_ii
    from fastchgnet.bench.rows import markdown, read, tables

    found = read(rows)
    commands = {row["command"] for row in found}
    if commands == {"scaling"}:
        print(scaling_tables.markdown(found), end="")
        return
    own = {"md": table_ii.tables, "lr": learning.tables, kernels.COUNTED: kernels.counted}
    print(markdown(found, next((own[name] for name in own if commands == {name}), tables)), end="")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def show(rows: list[Row], as_json: bool, as_tables: Callable[[Sequence[Row]], list[Table]]) -> None:
    """Print rows as JSON or as tables."""
    from fastchgnet.report import print_tables

    if as_json:
        print(json.dumps(rows, indent=2, allow_nan=False))
    else:
        print_tables(as_tables(rows))
