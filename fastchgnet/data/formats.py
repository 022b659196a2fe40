"""Readers: files of labelled crystals in, frames in internal units out, one at a time.

Every format states here which energy it takes and the unit and sign of its stress; see docs/data.md.
"""

from __future__ import annotations

import gzip
import io
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError

from fastchgnet.config import Config
from fastchgnet.data.extxyz import malformed, without_empty_values
from fastchgnet.data.frame import Frame, reduced_formula
from fastchgnet.data.layout import one_line
from fastchgnet.errors import InputError
from fastchgnet.neighbors import is_ordered
from fastchgnet.units import GPA

if TYPE_CHECKING:
    from ase import Atoms

Format = Literal["extxyz", "vasp", "ase", "pymatgen", "mptrj"]


class StressUnit(StrEnum):
    """Unit of the stresses of a file."""

    EV_A3 = "eV/A^3"
    GPA = "GPa"
    KBAR = "kbar"


class StressSign(StrEnum):
    """What a positive stress means in a file: ASE's tension, or VASP's compression."""

    TENSION = "tension"
    COMPRESSION = "compression"


STRESS_FACTOR = {StressUnit.EV_A3: 1.0, StressUnit.GPA: GPA, StressUnit.KBAR: 0.1 * GPA}
"""One unit of stress in eV/A^3."""

_ENERGY_KEYS = {"vasp": "free_energy", "mptrj": "corrected_total_energy"}
_MPTRJ_ENERGIES = ("corrected_total_energy", "uncorrected_total_energy")


class ReadOptions(Config):
    """What a user knows about a file that the file does not say; None leaves it to the format."""

    format: Format | None = Field(None, description="Format of the file; by default by name and content.")
    energy_key: str | None = Field(
        None, description="Where the total energy stands, such as REF_energy; an empty key reads no label."
    )
    forces_key: str = Field("forces", description="Where the forces stand.")
    stress_key: str = Field("stress", description="Where the stress stands.")
    magmoms_key: str = Field("magmoms", description="Where the magnetic moments stand.")
    stress_unit: StressUnit | None = Field(None, description="Unit of the stress.")
    stress_sign: StressSign | None = Field(None, description="Meaning of a positive stress.")

    def resolve(self, kind: Format) -> ReadOptions:
        """Fill in what format `kind` defines: the key of the energy, the unit and the sign of the stress."""
        defaults: dict[Format, tuple[StressUnit, StressSign]] = {
            "mptrj": (StressUnit.KBAR, StressSign.COMPRESSION),
            "extxyz": (StressUnit.EV_A3, StressSign.TENSION),
            "vasp": (StressUnit.EV_A3, StressSign.TENSION),  # ASE has converted VASP's kbar
            "ase": (StressUnit.EV_A3, StressSign.TENSION),
        }
        unit, sign = defaults.get(kind, (None, None))
        energy_key = _ENERGY_KEYS.get(kind, "energy") if self.energy_key is None else self.energy_key
        if kind == "mptrj" and self.energy_key not in (None, "", *_MPTRJ_ENERGIES):
            raise InputError(f"MPtrj has the energies {' and '.join(_MPTRJ_ENERGIES)}, not {self.energy_key}")
        return self.model_copy(
            update={
                "format": kind,
                "energy_key": energy_key,
                "stress_unit": self.stress_unit or unit,
                "stress_sign": self.stress_sign or sign,
            }
        )

    @classmethod
    def of_user(cls, **values: str | None) -> ReadOptions:
        """Build options from what a user typed; raise InputError naming the option that is none."""
        try:
            return cls.model_validate({key: value for key, value in values.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            option = "--" + str(first["loc"][0]).replace("_", "-")
            raise InputError(f"{option} {first['input']}: {first['msg']}") from None

    def stress_matrix(self, value: ArrayLike) -> NDArray[np.float64]:
        """Convert a stress of 6 (Voigt), 9 or 3 x 3 numbers to [3, 3], eV/A^3, positive = tension."""
        if self.stress_unit is None or self.stress_sign is None:
            raise ValueError(
                "this format does not define its stress: pass --stress-unit (eV/A^3, GPa, kbar) "
                "and --stress-sign (tension, compression)"
            )
        stress = np.asarray(value, dtype=np.float64)
        if stress.shape == (6,):
            stress = stress[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
        if stress.size != 9:
            raise ValueError(f"the stress has shape {stress.shape}, expected 6, 9 or 3 x 3 numbers")
        sign = 1.0 if self.stress_sign is StressSign.TENSION else -1.0
        return stress.reshape(3, 3) * (sign * STRESS_FACTOR[self.stress_unit])


@dataclass
class Meter:
    """Bytes of input read so far, for progress."""

    before: int = 0  # bytes of the files already finished
    file: IO[bytes] | None = None

    def open(self, path: Path) -> IO[bytes]:
        """Open a file, unpacking .gz on the way, and count from it."""
        if path.suffix != ".gz":
            self.file = path.open("rb")
            return self.file
        unpacked = gzip.GzipFile(path, "rb")
        self.file = unpacked.fileobj  # type: ignore[assignment]
        return unpacked  # type: ignore[return-value]

    def finish(self, path: Path) -> None:
        """Count the whole of a finished file."""
        self.before += path.stat().st_size
        self.file = None

    @property
    def n_bytes(self) -> int:
        """Bytes read, packed ones where the file is packed."""
        return self.before + (0 if self.file is None or self.file.closed else self.file.tell())


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
    if not path.is_file():
        yield InputError(f"{path}: no such file")
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
        from fastchgnet.data.json_formats import scan_json

        yield from scan_json(path, name, resolved, meter)
    else:
        yield from _scan_ase(path, name, resolved)
    meter.finish(path)


def detect_format(path: Path) -> Format:
    """Tell the format of a file from its name, and of a JSON file from its first keys."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    if suffixes[-1:] == [".json"]:
        from fastchgnet.data.json_formats import detect_json

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


def attempt(source: str, build: Callable[[], Frame]) -> Frame | InputError:
    """Build a frame; whatever goes wrong becomes an InputError that names the frame.

    Parsers, ASE's above all, raise exceptions of any kind on bad files; this is the one place, with
    `_scan_ase`, that catches all.
    """
    try:
        return build()
    except KeyError as error:
        return InputError(f"{source}: unknown element or missing key {error}")
    except Exception as error:
        return InputError(f"{source}: {one_line(error)}")


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


def make_frame(
    *,
    numbers: ArrayLike,
    positions: ArrayLike,
    cell: ArrayLike,
    pbc: ArrayLike,
    source: str,
    info: dict[str, object],
    energy: float | None,
    forces: ArrayLike | None,
    stress: NDArray[np.float64] | None,
    magmoms: ArrayLike | None,
) -> Frame:
    """Build a frame of plain numpy arrays; None marks a label the file does not hold."""
    total = np.asarray(np.nan if energy is None else energy)
    if total.ndim or total.dtype.kind not in "fiu":
        raise ValueError(f"the energy is {energy!r}, not a number")
    if energy is not None and not np.isfinite(total):
        raise ValueError("the energy is NaN or infinite")
    numbers = np.asarray(numbers, dtype=np.int64)
    group = info.get("group") or info.get("mp_id")
    return Frame(
        numbers=numbers,
        positions=np.asarray(positions, dtype=np.float64),
        cell=np.asarray(cell, dtype=np.float64),
        pbc=np.asarray(pbc, dtype=np.bool_),
        source=source,
        group=str(group) if group else reduced_formula(numbers),
        config_type=str(info.get("config_type") or "default"),
        energy=float(total),
        forces=_table("forces", forces),
        stress=stress,
        magmoms=_table("magmoms", magmoms),
    )


def _table(name: str, values: ArrayLike | None) -> NDArray[np.float64] | None:
    try:
        return None if values is None else np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"the {name} are not a table of numbers") from None
