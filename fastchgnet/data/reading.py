"""What the readers of all formats share: options, progress, and the step from raw values to a frame."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError

from fastchgnet.config import Config
from fastchgnet.data.frame import Frame, reduced_formula
from fastchgnet.data.layout import one_line
from fastchgnet.errors import InputError
from fastchgnet.units import GPA, MATRIX_FROM_VOIGT

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
            stress = stress[MATRIX_FROM_VOIGT]
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
