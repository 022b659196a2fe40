"""Readers: files of labelled crystals in, frames in internal units out, one at a time.

Every format states here which energy it takes and the unit and sign of its stress; see docs/data.md.
"""

from __future__ import annotations

import io
import stat
import warnings
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fastchgnet.data.extxyz import malformed, without_empty_values
from fastchgnet.data.frame import Frame
from fastchgnet.data.json_formats import detect_json, scan_json
from fastchgnet.data.layout import one_line
from fastchgnet.data.reading import (
    Format,
    Meter,
    ReadOptions,
    attempt,
    make_frame,
)
from fastchgnet.errors import InputError
from fastchgnet.neighbors import is_ordered

if TYPE_CHECKING:
    from ase import Atoms


def read_frames(path: Path | str, options: ReadOptions | None = None) -> Iterator[Frame]:
    """Yield the frames of a file one at a time; memory does not grow with the file.

    Frames that can be read are not judged here: `Frame.check` does that, and the store calls it.

    Raises:
        InputError: The file, or a frame of it, cannot be read; names the file, the frame and the reason.
    """
    for item in scan_frames(Path(path), options or ReadOptions()):
        if isinstance(item, InputError):
            raise item
        yield item


def scan_frames(
    path: Path, options: ReadOptions, name: str | None = None, meter: Meter | None = None
) -> Iterator[Frame | InputError]:
    """Yield what `read_frames` yields, and an InputError in place of each frame that cannot be read.

    Args:
        path: The file.
        options: What the file does not say.
        name: What frames and errors call the file; its own name by default.
        meter: Told what is read.
    """
    name, meter = name or path.name, meter or Meter()
    if reason := _no_file(path):
        yield InputError(f"{path}: {reason}")
        return
    try:
        kind = options.format or detect_format(path)
        resolved = options.resolve(kind)
    except InputError as error:
        yield error
        return
    if kind == "extxyz":
        yield from _scan_extxyz(path, name, resolved, meter)
    elif kind in ("pymatgen", "mptrj"):
        yield from scan_json(path, name, resolved, meter)
    else:
        yield from _scan_ase(path, name, resolved)
    meter.finish(path)


def _no_file(path: Path) -> str | None:
    """Say why a path is no file that can be read from its beginning, again and again."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if stat.S_ISDIR(mode):
        return "is a folder"
    return None if stat.S_ISREG(mode) else "is a pipe or a device; write its content to a file"


def detect_format(path: Path) -> Format:
    """Tell the format of a file from its name, and of a JSON file from its first keys."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if suffixes[-1:] == [".json"]:
        return detect_json(path)
    if suffixes[-1:] in ([".xyz"], [".extxyz"]):
        return "extxyz"
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    try:
        name = filetype(str(path))
    except (UnknownFileTypeError, OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: unknown format: {one_line(error)}") from error
    if name not in ioformats:
        raise InputError(f"{path}: unknown format: ASE knows none called {name}; pass --format")
    if name == "extxyz":
        return "extxyz"
    return "vasp" if name in ("vasp-xml", "vasp-out") else "ase"


def _scan_extxyz(path: Path, name: str, options: ReadOptions, meter: Meter) -> Iterator[Frame | InputError]:
    """Split the file into frames here and let ASE parse each: one bad frame then costs no other."""
    index = 0
    try:
        with io.TextIOWrapper(meter.open(path), encoding="utf-8-sig") as lines:
            while head := lines.readline():
                if not head.strip():
                    continue
                source = f"{name}:{index}"
                if not head.strip().isdecimal() or len(head.strip()) > 9:
                    yield InputError(f"{source}: expected a number of atoms, found {head.strip()[:40]!r}")
                    return
                n_atoms = int(head)
                block = [head, *islice(lines, n_atoms + 1)]
                if len(block) < n_atoms + 2:
                    found = max(len(block) - 2, 0)
                    yield InputError(f"{source}: the file ends after {found} of {n_atoms} atoms; truncated")
                    return
                yield attempt(source, partial(_parse_extxyz, block, source, options))
                index += 1
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        yield InputError(f"{name}:{index}: cannot be read: {one_line(error)}")
        return
    if index == 0:
        yield InputError(f"{name}: the file is empty")


def _parse_extxyz(block: list[str], source: str, options: ReadOptions) -> Frame:
    """Let ASE parse one frame, having looked for what it would pass over without a word."""
    from ase.io.extxyz import key_val_str_to_dict, read_extxyz

    block[1] = without_empty_values(block[1])
    header = key_val_str_to_dict(block[1])
    keys = (options.energy_key or "", options.forces_key, options.stress_key, options.magmoms_key)
    if flaw := malformed(header, block, keys):
        raise ValueError(flaw)
    atoms = next(read_extxyz(io.StringIO("".join(block))))
    if atoms.calc is not None and "stress" in atoms.calc.results:
        atoms.calc.results["stress"] = header["stress"]  # of nine numbers ASE keeps six
    return _from_atoms(atoms, source, options)


def _scan_ase(path: Path, name: str, options: ReadOptions) -> Iterator[Frame | InputError]:
    """Read every frame of a file by ASE."""
    cut = _vasp_truncated(path) if options.format == "vasp" else None
    index = 0
    frames = _iterate_ase(path, options)
    while True:
        source = f"{name}:{index}"
        try:
            with warnings.catch_warnings():
                # ASE leaves out the rows of a CIF that it cannot read: atoms would be lost.
                warnings.filterwarnings("error", "Wrong number .* of tokens")
                atoms = next(frames)
        except StopIteration:
            break
        except Exception as error:
            # A generator that has raised is finished: nothing behind this frame can be read.
            reason = f"{source}: cannot be read: {type(error).__name__}: {one_line(error)}"
            yield InputError(f"{name}: {cut}" if cut else reason)
            return
        yield attempt(source, lambda atoms=atoms, source=source: _from_atoms(atoms, source, options))  # type: ignore[misc]
        index += 1
    if cut:
        yield InputError(f"{name}: {cut}")
    elif index == 0:
        yield InputError(f"{name}: no frame in this file")


def _iterate_ase(path: Path, options: ReadOptions) -> Iterator[Atoms]:
    """Yield ASE's atoms, of a database with the keys beside them, which ase.io would drop."""
    if path.suffix in (".db", ".json", ".aselmdb"):
        from ase.db import connect

        for row in connect(path).select():
            yield row.toatoms(add_additional_information=True)
    else:
        from ase.io import iread

        vasp = "vasp-xml" if ".xml" in path.suffixes else "vasp-out"
        known = vasp if options.format == "vasp" else None
        yield from iread(str(path), index=":", format=known, do_not_split_by_at_sign=True)


def _vasp_truncated(path: Path) -> str | None:
    """Tell whether a run of VASP lacks its end, or goes on behind it; ASE drops that without a word."""
    end = b"</modeling>" if ".xml" in path.suffixes else b"General timing and accounting"
    tail = b""
    try:
        with Meter().open(path) as file:
            while block := file.read(1 << 20):
                tail = (tail + block)[-20_000:]
    except (OSError, EOFError, zlib.error) as error:
        return f"cannot be read: {one_line(error)}"
    if end not in tail:
        return f"truncated: {end.decode()!r} is missing at its end"
    if end == b"</modeling>" and tail.partition(end)[2].strip():
        return "mixed: something follows '</modeling>'"
    return None


def _from_atoms(atoms: Atoms, source: str, options: ReadOptions) -> Frame:
    """Take geometry and labels from ASE's atoms; absent labels stay absent."""
    if not is_ordered(atoms):
        raise ValueError("partially occupied sites; order the structure first")
    info = {**atoms.info.get("key_value_pairs", {}), **atoms.info}
    # `results` holds what the file held; asking the calculator for the rest would raise.
    labels = {**atoms.arrays, **info, **(atoms.calc.results if atoms.calc is not None else {})}
    return make_frame(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell.array,
        pbc=atoms.pbc,
        source=source,
        info=info,
        energy=labels.get(options.energy_key),
        forces=labels.get(options.forces_key),
        stress=None if (stress := labels.get(options.stress_key)) is None else options.stress_matrix(stress),
        magmoms=labels.get(options.magmoms_key),
    )
