"""What a store on disk looks like: its arrays, its header, and how both are written and checked."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from fastchgnet.config import Config, Provenance
from fastchgnet.errors import InputError

SCHEMA_VERSION = 1
HEADER = "header.json"
SKIPPED = "skipped.txt"


class ArraySpec(NamedTuple):
    """One array of a store: its type, the shape of a row, and what a row belongs to."""

    dtype: str
    row: tuple[int, ...]
    per: Literal["atom", "frame", "fence", "byte"]  # a fence has one row more than there are frames


ARRAYS = {
    "position": ArraySpec("<f4", (3,), "atom"),  # A
    "atomic_number": ArraySpec("|u1", (), "atom"),
    "forces": ArraySpec("<f4", (3,), "atom"),  # eV/A, NaN = missing
    "magmoms": ArraySpec("<f4", (), "atom"),  # mu_B, NaN = missing
    "pointer": ArraySpec("<i8", (), "fence"),  # atoms of frame k are pointer[k] : pointer[k + 1]
    "cell": ArraySpec("<f8", (3, 3), "frame"),  # A
    "pbc": ArraySpec("|b1", (3,), "frame"),
    "energy": ArraySpec("<f8", (), "frame"),  # total, eV, NaN = missing
    "stress": ArraySpec("<f4", (6,), "frame"),  # xx yy zz yz xz xy, eV/A^3, tension, NaN = missing
    "sizes": ArraySpec("<i4", (4,), "frame"),  # atoms, edges, short bonds, angles
    "group": ArraySpec("<u8", (), "frame"),  # hash of the material
    "config_type": ArraySpec("<i4", (), "frame"),  # index into the header's names
    "id_text": ArraySpec("|u1", (), "byte"),  # utf-8
    "id_pointer": ArraySpec("<i8", (), "fence"),
}


class Source(Config):
    """One file, or one folder of files, that a store was made from."""

    name: str
    format: str
    energy: str = Field(description="The key the energies were read from.")
    stress: str = Field(description="Unit and sign the stresses were read in.")
    bytes: int
    modified_ns: int


class ArrayInfo(Config):
    """What the header records of one array."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class Plan(Config):
    """What a store is made from, known before the first frame; an unfinished store resumes under it only."""

    provenance: Provenance
    atom_cutoff: float = Field(6.0, gt=0, description="Cutoff of the edges counted in `sizes`, A.")
    bond_cutoff: float = Field(3.0, gt=0, description="Cutoff of the short bonds counted in `sizes`, A.")
    sources: tuple[Source, ...] = ()


class Counts(Config):
    """What writing a store counted."""

    n_frames: int = 0
    n_atoms: int = 0
    with_energy: int = 0
    with_forces: int = 0
    with_stress: int = 0
    with_magmoms: int = 0
    n_skipped: int = 0
    n_stress_dropped: int = Field(0, description="Stresses of frames not periodic in three directions.")
    n_wrapped: int = Field(0, description="Frames with atoms far out that were wrapped into the cell.")

    def __add__(self, other: Counts) -> Counts:
        """Add the counts of two disjoint sets of frames."""
        return Counts(**{name: value + getattr(other, name) for name, value in self})


class Header(Config):
    """The JSON beside the arrays of a store."""

    schema_version: int
    plan: Plan
    counts: Counts
    config_types: tuple[str, ...]
    arrays: dict[str, ArrayInfo]

    @property
    def provenance(self) -> Provenance:
        """What the energies of the store mean."""
        return self.plan.provenance

    @classmethod
    def read(cls, folder: Path) -> Header:
        """Read and check the header of the store in `folder`."""
        path = folder / HEADER
        try:
            header = cls.model_validate_json(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{folder}: no store here, {HEADER} is missing") from None
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise InputError(f"{path}: not the header of a store: {one_line(error)}") from error
        if header.arrays.keys() != ARRAYS.keys():
            other = ", ".join(sorted(header.arrays.keys() ^ ARRAYS.keys()))
            raise InputError(
                f"{path}: not the header of a store: lacks or has beside the known arrays {other}"
            )
        if header.schema_version != SCHEMA_VERSION:
            raise InputError(
                f"{path}: schema version {header.schema_version}, this program reads {SCHEMA_VERSION}; "
                "prepare the store again"
            )
        return header

    def expected_shape(self, name: str) -> tuple[int, ...]:
        """Shape that array `name` must have for the counted frames and atoms; the recorded one for text."""
        spec = ARRAYS[name]
        n_rows = {
            "atom": self.counts.n_atoms,
            "frame": self.counts.n_frames,
            "fence": self.counts.n_frames + 1,
            "byte": self.arrays[name].shape[0],
        }[spec.per]
        return (n_rows, *spec.row)


def open_array(folder: Path, name: str, header: Header) -> NDArray[Any]:
    """Map array `name` of a store into memory and check its type and shape against the header."""
    path = folder / f"{name}.npy"
    try:
        # A plain view: indexing np.memmap itself costs several microseconds more each time.
        array = np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: missing or truncated: {one_line(error)}") from error
    expected = header.expected_shape(name)
    if array.shape != expected or array.dtype != np.dtype(ARRAYS[name].dtype):
        raise InputError(
            f"{path}: holds {array.dtype} {array.shape}, the header wants {ARRAYS[name].dtype} {expected}"
        )
    return array


def group_hash(group: str) -> int:
    """First 8 bytes of the sha256 of a group key, as an unsigned integer."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "little")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printable(path: Path | str) -> str:
    """Write a path as text, whatever bytes it has."""
    return os.fsencode(path).decode(errors="backslashreplace")


def one_line(error: Exception) -> str:
    """Squeeze the message of an exception into one line; of pydantic's, take the first flaw."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return " ".join(str(error).split()) or type(error).__name__
