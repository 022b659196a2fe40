"""Rows: what was run, where, and what came out; plain JSON objects that only a run writes."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastchgnet.errors import InputError
from fastchgnet.files import write_atomically
from fastchgnet.report import Table, text

Row = dict[str, Any]

PACKAGES = ("triton", "numpy", "vesin", "chgnet")


def environment(device: torch.device) -> Row:
    """Describe machine, software and what else the machine was doing."""
    return {
        "device": _device_name(device),
        "device_type": device.type,
        "n_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "platform": platform.platform(),
        # torch's own word tells the build, too
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def read(path: Path) -> list[Row]:
    """Read the rows of a file.

    Raises:
        InputError: the file cannot be read, or holds no list of rows.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "command" in row for row in rows):
        raise InputError(f"{path}: not a list of rows of `fastchgnet bench`")
    return rows


def check_out(path: Path | None) -> None:
    """Look before a long run whether a file takes rows, as `read` does."""
    if path is not None and path.exists():
        read(path)


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to those of a file, which is as before or complete."""
    before = read(path) if path.exists() else []
    write_atomically(path, json.dumps([*before, *rows], indent=1, allow_nan=False) + "\n")


def tables(rows: Sequence[Row]) -> list[Table]:
    """Show rows to a reader: medians, ratios and counts, an arm that was not run as a dash; then details."""
    times = ("run", "systems", "ours ms", "chgnet ms", "ratio", "ratio CPU s", "systems/s", "roofline")
    counts = ("ops, ours", "ops, chgnet", "MB, ours", "MB, chgnet", "others, cores", "commit")
    device = rows[0]["environment"]
    title = f"{device['device']}, {device['threads']} threads"
    run = [_cells(row) for row in rows if "deviations" not in row]
    return [*([Table(title, (*times, *counts), run)] if run else []), *_details(rows)]


def markdown(rows: Sequence[Row], as_tables: Callable[[Sequence[Row]], list[Table]] = tables) -> str:
    """Show the rows as the documentation does."""
    first = as_tables(rows)[0]
    lines = [first.header, ("---", *["---:"] * (len(first.header) - 1)), *first.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _details(rows: Sequence[Row]) -> Iterator[Table]:
    """Rank the operators, and list the deviations, of the rows that have them."""
    for row in rows:
        if "deviations" in row:
            allowed = {name: f"{limit:.0e}" for name, limit in row["allowed"].items()}
            found = [
                (name, f"{value:.1e}", allowed.get(name, "")) for name, value in row["deviations"].items()
            ]
            title = f"correctness, {row['readout']}, {row['precision']}"
            yield Table(title, ("quantity", "off by", "allowed"), found)
        for arm in ("ours", "chgnet"):
            top = row.get(arm, {}).get("top", ())
            cells = [
                (op["name"], f"{op['calls']:,}", f"{op['self_ms']:,.2f}", f"{op['share']:.1%}") for op in top
            ]
            if cells:
                title = f"{arm}, {row['readout']}, {row['batch']['systems']} systems"
                yield Table(title, ("operator", "calls", "own ms", "share"), cells)


def _cells(row: Row) -> tuple[str, ...]:
    ours, chgnet = (row.get(arm) or {} for arm in ("ours", "chgnet"))
    return (
        " ".join(filter(None, (row["command"], row.get("readout"), row["label"]))),
        text(row["batch"]["systems"], "{:,}"),
        *(text(_median(arm), "{:,.2f}", 1e3) for arm in (ours, chgnet)),
        *(text(row.get(name), "{:.2f}") for name in ("ratio", "ratio_cpu")),
        text(ours.get("systems_per_second"), "{:,.1f}"),
        text(ours.get("roofline_fraction"), "{:.1%}"),
        *(text(_executed(arm), "{:,}") for arm in (ours, chgnet)),
        *(text(arm.get("peak_memory_mb"), "{:,.0f}") for arm in (ours, chgnet)),
        text(row.get("other_work_cores"), "{:.2f}"),
        row["environment"]["commit"] or "—",
    )


def _median(arm: Mapping[str, Any]) -> float | None:
    return arm["wall_seconds"][1] if "wall_seconds" in arm else None


def _executed(arm: Mapping[str, Any]) -> int | None:
    counts = arm.get("counts") or {}
    return counts.get("kernels") or counts.get("ops")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def _commit() -> str | None:
    """Name the commit of this package; None where its files are not those of a repository."""
    here = Path(__file__).parents[1]
    # An installed copy may lie within some other repository, whose commit would say nothing.
    commands = (["ls-files", "--error-unmatch", "__init__.py"], ["describe", "--always", "--dirty"])
    try:
        tracked, described = (
            subprocess.run(["git", *command], capture_output=True, text=True, cwd=here, check=False)
            for command in commands
        )
    except OSError:
        return None
    return described.stdout.strip() or None if tracked.returncode == 0 else None
