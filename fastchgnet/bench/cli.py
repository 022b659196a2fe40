"""`fastchgnet bench COMMAND`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fastchgnet.bench.rows import Row

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
    "all": "Check results against float64 on the CPU, then run all of these.",
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
        from fastchgnet.bench.runs import run
        from fastchgnet.bench.session import Options

        readouts = tuple(one.value for one in readout or ReadoutName)
        options = Options(
            frames, tuple(batch or ()), readouts, device, threads, rounds, seed, label, chgnet, memory
        )
        show(run(name, options, out, lambda line: print(line, file=sys.stderr)), as_json)

    return handler


for _name, _help in HELP.items():
    _example = f"Example: fastchgnet bench {_name} --frames crystals.xyz --threads 2 --out rows.json"
    app.command(_name, help=_help, epilog=_example)(_handler(_name))


@app.command(epilog="Example: fastchgnet bench plot benchmarks/results/performance-cpu.json --out steps.png")
def plot(
    rows: Annotated[Path, typer.Argument(help="JSON list of rows from one device.")],
    out: Annotated[Path, typer.Option(help="Write this PNG.")],
) -> None:
    """Draw the rows of training and inference as steps of the optimisation."""
    from fastchgnet.bench.plot import draw

    draw(rows, out)


@app.command(epilog="Example: fastchgnet bench table benchmarks/results/performance-cpu.json")
def table(rows: Annotated[Path, typer.Argument(help="JSON list of rows from one device.")]) -> None:
    """Print rows as a Markdown table, as docs/performance.md has it."""
    from fastchgnet.bench.rows import markdown, read

    print(markdown(read(rows)), end="")


def show(rows: list[Row], as_json: bool) -> None:
    """Print rows as JSON or as tables."""
    from fastchgnet.bench.rows import tables
    from fastchgnet.report import print_tables

    if as_json:
        print(json.dumps(rows, indent=2, allow_nan=False))
    else:
        print_tables(tables(rows))
