"""The command line: `fastchgnet COMMAND`. Every handler calls one library function."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastchgnet.bench.cli import app as bench
from fastchgnet.errors import InputError, ToldElsewhere

app = typer.Typer(
    name="fastchgnet",
    help="Train, fine-tune and run CHGNet interatomic potentials, fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")


@app.command(epilog="Example: fastchgnet train examples/example.yaml --set optim.learning_rate=1e-3")
def train(
    config: Annotated[
        Path, typer.Argument(readable=False, help="YAML file of the run; docs/training.md explains its keys.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; repeatable")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in its folder, if it holds one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a potential; Ctrl-C stops between two steps, and --resume continues there.

    On several GPUs: torchrun --nproc-per-node 8 -m fastchgnet train CONFIG --resume
    """
    # where processes lose each other we say so in a line, and torch would in pages
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from fastchgnet.train.launcher import is_first
    from fastchgnet.train.progress import train_in_terminal

    summary = train_in_terminal(config, overrides or [], resume)
    if as_json and is_first():
        print(json.dumps(summary.as_dict(), indent=2))
    if not summary.finished:
        raise typer.Exit(130)


Model = Annotated[str, typer.Option(help="Name of a published model, or a .safetensors file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")]
Precision = Annotated[Literal["float32", "float64"], typer.Option(help="Precision of the network.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Frames in a batch; large ones come fewer at a time.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(epilog="Example: fastchgnet weights chgnet-0.3.0")
def weights(
    names: Annotated[
        list[str] | None, typer.Argument(help="chgnet-0.2.0, chgnet-0.3.0, chgnet-r2scan; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch published CHGNet weights into the cache, and say what they are and where."""
    from fastchgnet.published import PUBLISHED, describe

    rows = [describe(name) for name in names or PUBLISHED]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    # Not a rich table, which would cut the paths to the width of the terminal.
    for line in (rows[0], *(row.values() for row in rows)):
        print("{:<15}{:>12}   {:<13}{:<13}{}".format(*line))


@app.command(epilog="Example: fastchgnet predict POSCAR trajectory.xyz --out predictions.extxyz")
def predict(
    files: Annotated[
        list[Path], typer.Argument(readable=False, help="CIF, POSCAR, xyz, pymatgen JSON, ...; all frames.")
    ],
    model: Model = "chgnet-0.3.0",
    as_json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Also write this .json or .extxyz file.")] = None,
    device: Device = "auto",
    dtype: Precision = "float32",
    batch_size: BatchSize = 64,
) -> None:
    """Predict energies, forces, stresses and magnetic moments of the crystals in files."""
    from fastchgnet.prediction import check_output, predict_crystals, read_crystals
    from fastchgnet.published import load
    from fastchgnet.report import progress_bar, show_predictions

    check_output(out)
    crystals, errors = read_crystals(files)
    if crystals:
        with progress_bar("predict", len(crystals)) as progress:
            done, failed = predict_crystals(load(model, device, dtype), crystals, batch_size, progress)
        errors += failed
        if done:
            show_predictions(done, out, as_json)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        raise typer.Exit(1 if crystals and done else 2)


Ensemble = Annotated[Literal["nve", "nvt", "npt"], typer.Option(help="What is kept.")]
Thermostat = Annotated[Literal["nose-hoover", "langevin"], typer.Option(help="Of NVT; NPT has the first.")]
Temperatures = Annotated[list[float], typer.Option(help="K; repeatable: every crystal runs at each.")]
Velocities = Annotated[
    Literal["random", "given"], typer.Option(help="At the start: drawn, or those of the files.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if any.")]
Page = Annotated[Path | None, typer.Option(help="Also write this page, with curves and movies.")]


@app.command(epilog="Example: fastchgnet md LiMnO2.cif --ensemble nvt --temperature 600 --out runs/md")
def md(
    files: Annotated[
        list[Path], typer.Argument(readable=False, help="Crystals, as for predict; all run at the same time.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of trajectories, logs and the state to go on from.")],
    ensemble: Ensemble = "nvt",
    thermostat: Thermostat = "nose-hoover",
    temperature: Temperatures = [300.0],  # noqa: B006, as typer wants it
    replicas: Annotated[int, typer.Option(help="Of every crystal at each temperature.")] = 1,
    pressure: Annotated[float, typer.Option(help="GPa, of NPT.")] = 0.0,
    timestep: Annotated[float, typer.Option(help="Time of a step, fs.")] = 1.0,
    steps: Annotated[int, typer.Option(help="In all, with those before --resume.")] = 10_000,
    interval: Annotated[int, typer.Option(help="Steps from frame to frame.")] = 10,
    thermostat_time: Annotated[float, typer.Option(help="fs; of Langevin's, 1 / friction.")] = 100.0,
    barostat_time: Annotated[float, typer.Option(help="fs, of NPT.")] = 1000.0,
    velocities: Velocities = "random",
    seed: Annotated[int, typer.Option(help="Of velocities and noise.")] = 0,
    charges: Annotated[bool, typer.Option("--charges", help="Oxidation states from magmoms.")] = False,
    charge_table: Annotated[Path | None, typer.Option(help="YAML of oxidation states to use.")] = None,
    resume: Resume = False,
    report: Page = None,
    model: Model = "chgnet-0.3.0",
    as_json: Json = False,
    device: Device = "auto",
    dtype: Precision = "float32",
) -> None:
    """Run molecular dynamics; Ctrl-C stops between two steps, and --resume continues there."""
    from fastchgnet.sim.md.ensemble import Settings
    from fastchgnet.sim.md.report import show
    from fastchgnet.sim.md.run import Plan, charge_table_of, run_files
    from fastchgnet.units import GPA

    settings = Settings(
        ensemble=ensemble,
        thermostat=thermostat,
        timestep=timestep,
        thermostat_time=thermostat_time,
        barostat_time=barostat_time,
        pressure=pressure * GPA,
        velocities=velocities,
        seed=seed,
    )
    plan = Plan(
        files=files,
        out=out,
        settings=settings,
        temperatures=temperature,
        replicas=replicas,
        steps=steps,
        interval=interval,
        charges=charge_table_of(charges, charge_table),
        report=report,
        resume=resume,
    )
    outcome = run_files(plan, model, device, dtype)
    show(outcome.rows, as_json)
    for error in outcome.errors:
        print(f"error: {error}", file=sys.stderr)
    if outcome.status:
        raise typer.Exit(outcome.status)


@app.command(epilog="Example: fastchgnet relax *.cif --out relaxed.extxyz --fmax 0.02 --report relaxed.html")
def relax(
    files: Annotated[
        list[Path], typer.Argument(readable=False, help="CIF, POSCAR, xyz, pymatgen JSON, ...; all frames.")
    ],
    out: Annotated[Path, typer.Option(help="File of the relaxed crystals; a .jsonl goes beside it.")] = Path(
        "relaxed.extxyz"
    ),
    fmax: Annotated[float, typer.Option(help="Longest force of a converged crystal, eV/A.")] = 0.05,
    steps: Annotated[int, typer.Option(help="Steps, at most.")] = 500,
    cell: Annotated[
        str, typer.Option(help="full, fixed, hydrostatic, constant-volume, or free strains, as xx,yy,xy.")
    ] = "full",
    pressure: Annotated[float, typer.Option(help="External pressure, GPa.")] = 0.0,
    model: Model = "chgnet-0.3.0",
    device: Device = "auto",
    dtype: Precision = "float32",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Crystals at a time, at most; default: what fits in memory.")
    ] = None,
    trajectory: Annotated[Path | None, typer.Option(help="Folder for every step of each crystal.")] = None,
    report: Annotated[Path | None, typer.Option(help="HTML page with curves and crystals in 3-D.")] = None,
    as_json: Json = False,
) -> None:
    """Relax atoms and cells of the crystals in files; the same command goes on where one was stopped."""
    from fastchgnet.sim.relax.files import Task
    from fastchgnet.sim.relax.result import Settings
    from fastchgnet.sim.relax.terminal import relax_in_terminal
    from fastchgnet.units import GPA

    task = Task(out, Settings(fmax, steps, cell, pressure * GPA), batch_size, trajectory)
    status = relax_in_terminal(files, (model, device, dtype), task, as_json, report)
    if status:
        raise typer.Exit(status)


@app.command(epilog="Example: fastchgnet evaluate runs/first/best.safetensors STORE --out report")
def evaluate(
    model: Annotated[str, typer.Argument(help="Name of a published model, or a .safetensors file.")],
    store: Annotated[Path, typer.Argument(readable=False, help="Folder from `fastchgnet prepare`.")],
    split: Annotated[Literal["train", "val", "test", "all"], typer.Option(help="Which frames.")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split, as in training.")] = 0,
    as_json: Json = False,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics, plots and a report.")] = None,
    device: Device = "auto",
    dtype: Precision = "float32",
    batch_size: BatchSize = 64,
) -> None:
    """Compare a model with the labels of a store: errors, R², parity plots, a report."""
    from fastchgnet.data.store import Store
    from fastchgnet.evaluate import evaluate
    from fastchgnet.published import load
    from fastchgnet.report import check_report, progress_bar, show_evaluation

    check_report(out)
    potential, data = load(model, device, dtype), Store.verified(store)
    indices = data.split(split, seed)
    with progress_bar("evaluate", len(indices)) as progress:
        evaluation = evaluate(potential, data, indices, batch_size, progress)
    about = {"file": model, "store": str(store), "split": split, "seed": str(seed)}
    show_evaluation(evaluation, about, out, as_json)


@app.command(
    epilog="Example: fastchgnet prepare train.xyz --out runs/train --functional PBE --energy-correction none"
)
def prepare(
    files: Annotated[
        list[Path], typer.Argument(readable=False, help="Files of labelled crystals, or folders of .xyz.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new store; resumes an unfinished one.")],
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip and list bad frames (status 1) instead of refusing.")
    ] = False,
    functional: Annotated[str, typer.Option(help="Functional of the labels, such as PBE/PBE+U.")] = "unknown",
    energy_correction: Annotated[str, typer.Option(help="none, MP2020, ...")] = "unknown",
    read_format: Annotated[
        str | None, typer.Option("--format", help="extxyz, vasp, ase, pymatgen or mptrj.")
    ] = None,
    energy_key: Annotated[str | None, typer.Option(help="Key of the total energy, as REF_energy.")] = None,
    forces_key: Annotated[str | None, typer.Option(help="Key of the forces.")] = None,
    stress_key: Annotated[str | None, typer.Option(help="Key of the stress.")] = None,
    magmoms_key: Annotated[str | None, typer.Option(help="Key of the magnetic moments.")] = None,
    stress_unit: Annotated[str | None, typer.Option(help="eV/A^3, GPa or kbar.")] = None,
    stress_sign: Annotated[
        str | None, typer.Option(help="What positive means: tension or compression.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read files of labelled crystals into a store, checking every frame."""
    from fastchgnet.config import Provenance
    from fastchgnet.data.reading import ReadOptions
    from fastchgnet.data.terminal import prepare_in_terminal

    keys = {"energy_key": energy_key, "forces_key": forces_key, "stress_key": stress_key}
    stress = {"stress_unit": stress_unit, "stress_sign": stress_sign, "magmoms_key": magmoms_key}
    options = ReadOptions.of_user(format=read_format, **keys, **stress)
    provenance = Provenance(name=out.name, functional=functional, energy_correction=energy_correction)
    prepared = prepare_in_terminal(files, out, options, provenance, skip_bad)
    if as_json:
        print(prepared.model_dump_json(indent=2))
    if prepared.skipped:
        raise typer.Exit(1)


@app.command(epilog="Example: fastchgnet inspect runs/train --png sizes.png")
def inspect(
    store: Annotated[Path, typer.Argument(readable=False, help="Folder written by prepare.")],
    png: Annotated[Path | None, typer.Option(help="Draw atoms, bonds and angles per frame here.")] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a store: counts, elements, labels, sizes."""
    from rich import print as show

    from fastchgnet.data import report
    from fastchgnet.data.store import Store
    from fastchgnet.files import check_new

    if png:
        check_new(png)
    opened = Store.verified(store)
    if png:
        report.plot(opened, png)
    found = report.inspect(opened)
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        show(report.render(found))


def main() -> None:
    """Run the command line; bad input, or a disk that is full, ends in one line and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # nothing where it is closed
            stream.reconfigure(errors="replace")  # terminals and pipes may lack letters that we print
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except ToldElsewhere:
        sys.exit(2)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
