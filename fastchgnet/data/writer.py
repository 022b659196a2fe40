"""Frames into a store, atomically and resumably.

The arrays grow in a folder `STORE.partial` beside the final name. Every `shard_frames` frames they are
synced to disk and a journal records how long each of them is; a killed run truncates them to the journal
and goes on from there. Only a complete store is renamed to its final name.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from fastchgnet.config import Config, Provenance
from fastchgnet.data.frame import Frame, periodic_box
from fastchgnet.data.layout import (
    ARRAYS,
    HEADER,
    SCHEMA_VERSION,
    SKIPPED,
    ArrayInfo,
    Counts,
    Header,
    Plan,
    file_sha256,
    group_hash,
    one_line,
)
from fastchgnet.device import own_settings
from fastchgnet.errors import InputError
from fastchgnet.files import lock, refuse_existing, sync_folder, write_atomically
from fastchgnet.graph import Systems
from fastchgnet.neighbors import graph_sizes
from fastchgnet.units import VOIGT

JOURNAL = "journal.json"
CHUNK = 128
FAR = 100.0
"""Atoms farther than this from the origin, A, are wrapped: beyond it float32 is coarser than 1e-5 A."""


class Journal(Config):
    """How far an unfinished store has come."""

    plan: Plan
    n_seen: int = 0  # items taken from the frames, bad ones included
    counts: Counts = Counts()
    rows: dict[str, int] = {}  # noqa: RUF012 (pydantic copies defaults)
    config_types: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


@own_settings
def write_store(
    frames: Iterable[Frame | InputError],
    out: Path | str,
    plan: Plan | Provenance,
    *,
    skip_bad: bool = False,
    shard_frames: int = 50_000,
    progress: Callable[[int], None] | None = None,
) -> Header:
    """Write a store, or finish the one a killed run left unfinished.

    Args:
        frames: What to store, checked here; an InputError stands for a frame that could not be read. To
            resume, the same frames in the same order.
        out: Folder of the store; must not exist.
        plan: What the store is made from and the cutoffs of its sizes; a Provenance alone will do.
        skip_bad: Skip bad frames, count them and list them in `skipped.txt`, instead of refusing.
        shard_frames: Frames between two points from which a killed run resumes.
        progress: Called with the number of frames seen so far, every few hundred frames.

    Returns:
        The header of the finished store.

    Raises:
        InputError: `out` exists; a frame is bad; nothing is left to store; the disk is full.
    """
    plan = plan if isinstance(plan, Plan) else Plan(provenance=plan)
    writer = _Writer(Path(out), plan, skip_bad)
    chunk = min(CHUNK, shard_frames)
    items = islice(iter(frames), writer.journal.n_seen, None)
    with writer.guarded():
        unsynced = 0
        while batch := list(islice(items, chunk)):
            writer.append(batch)
            unsynced += len(batch)
            if unsynced >= shard_frames:
                writer.sync()
                unsynced = 0
            if progress:
                progress(writer.journal.n_seen)
        return writer.finish()


class _Writer:
    """An unfinished store: its folder, its open files, and its journal."""

    def __init__(self, out: Path, plan: Plan, skip_bad: bool) -> None:
        self.out = out
        self.skip_bad = skip_bad
        refuse_existing([out])
        self.folder = out.with_name(out.name + ".partial")
        self.journal = self._resume(plan)
        self.resumable = self.journal.n_seen > 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.files = {name: (self.folder / f"{name}.npy").open("a+b") for name in ARRAYS}
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {one_line(error)}") from error
        if not lock(self.files["position"]):
            for file in self.files.values():
                file.close()
            raise InputError(f"{self.folder}: another process is writing this store")
        for name, file in self.files.items():
            file.truncate(len(_npy_header(name, 0)) + self.journal.rows.get(name, 0) * _row_bytes(name))

    def _resume(self, plan: Plan) -> Journal:
        path = self.folder / JOURNAL
        if not path.exists():
            return Journal(plan=plan)
        try:
            journal = Journal.model_validate_json(path.read_text())
        except ValidationError as error:
            raise InputError(f"{path}: not a journal of this program: {one_line(error)}") from error
        if journal.plan != plan:
            raise InputError(
                f"{self.folder}: an unfinished store of other files or options; remove it to start anew"
            )
        return journal

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Close the files at the end; leave a partial folder behind an error only where it can be resumed."""
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written: {one_line(error)}{self._kept()}") from error
        except InputError as error:
            raise InputError(f"{error}{self._kept()}") from error
        finally:
            for file in self.files.values():
                # What a full disk refused to take is in the buffer still, and closing tries once more.
                try:
                    file.close()
                except OSError:
                    file.raw.close()
            if not self.resumable and not self.out.exists():
                shutil.rmtree(self.folder, ignore_errors=True)

    def _kept(self) -> str:
        if not self.resumable:
            return ""
        return f" ({self.journal.counts.n_frames} frames are kept in {self.folder}: run again to go on)"

    def append(self, items: Sequence[Frame | InputError]) -> None:
        """Append a chunk of frames to the arrays; refuse or skip the bad ones."""
        good: list[Frame] = []
        skipped: list[str] = []
        for item in items:
            try:
                if isinstance(item, InputError):
                    raise item
                item.check()
                good.append(item)
            except InputError as error:
                if not self.skip_bad:
                    raise
                skipped.append(str(error))
        journal = self.journal
        names = tuple(dict.fromkeys([*journal.config_types, *(frame.config_type for frame in good)]))
        counts = Counts(n_skipped=len(skipped))
        if good:
            arrays, counts = _columns(good, names, journal)
            counts = counts.model_copy(update={"n_skipped": len(skipped)})
            for name, array in arrays.items():
                self.files[name].write(array.tobytes())
        rows = {name: journal.rows.get(name, 0) + (len(arrays[name]) if good else 0) for name in ARRAYS}
        self.journal = Journal(
            plan=journal.plan,
            n_seen=journal.n_seen + len(items),
            counts=journal.counts + counts,
            rows=rows,
            config_types=names,
            skipped=(*journal.skipped, *skipped),
        )

    def sync(self) -> None:
        """Make everything up to here durable: from now on a killed run resumes here."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_atomically(self.folder / JOURNAL, self.journal.model_dump_json())
        self.resumable = True

    def finish(self) -> Header:
        """Write the headers, and give the store its name."""
        journal = self.journal
        if journal.counts.n_frames == 0:
            first = "".join(f"; the first bad one: {line}" for line in journal.skipped[:1])
            raise InputError(f"{self.out}: no good frame to store{first}")
        for name, file in self.files.items():
            file.flush()
            with (self.folder / f"{name}.npy").open("r+b") as whole:
                whole.write(_npy_header(name, journal.rows[name]))
                whole.flush()
                os.fsync(whole.fileno())
        arrays = {
            name: ArrayInfo(
                dtype=spec.dtype,
                shape=(journal.rows[name], *spec.row),
                sha256=file_sha256(self.folder / f"{name}.npy"),
            )
            for name, spec in ARRAYS.items()
        }
        header = Header(
            schema_version=SCHEMA_VERSION,
            plan=journal.plan,
            counts=journal.counts,
            config_types=journal.config_types,
            arrays=arrays,
        )
        if journal.skipped:
            write_atomically(self.folder / SKIPPED, "\n".join(journal.skipped) + "\n")
        write_atomically(self.folder / HEADER, header.model_dump_json(indent=1))
        os.rename(self.folder, self.out)
        sync_folder(self.out.absolute().parent)
        (self.out / JOURNAL).unlink(missing_ok=True)
        return header


def _npy_header(name: str, n_rows: int) -> bytes:
    """Return the head of an .npy file; numpy pads it so that its length does not depend on the rows."""
    spec = ARRAYS[name]
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": spec.dtype, "fortran_order": False, "shape": (n_rows, *spec.row)}
    )
    return head.getvalue()


def _row_bytes(name: str) -> int:
    spec = ARRAYS[name]
    return int(np.dtype(spec.dtype).itemsize * np.prod(spec.row, dtype=np.int64))


def _columns(
    frames: list[Frame], config_types: Sequence[str], journal: Journal
) -> tuple[dict[str, NDArray[np.generic]], Counts]:
    """Turn frames into rows of every array, continuing the pointers of the journal."""
    n_atoms = np.array([len(frame.numbers) for frame in frames])
    ids = [frame.source.encode() for frame in frames]
    periodic = np.array([frame.pbc.all() for frame in frames])
    stressed = np.array([frame.stress is not None for frame in frames])
    positions = [_near_origin(frame) for frame in frames]
    arrays = {
        "position": np.concatenate(positions),
        "atomic_number": np.concatenate([frame.numbers for frame in frames]),
        "forces": np.concatenate([_or_nan(frame.forces, (len(frame.numbers), 3)) for frame in frames]),
        "magmoms": np.concatenate([_or_nan(frame.magmoms, (len(frame.numbers),)) for frame in frames]),
        "pointer": _pointer(n_atoms, journal.rows.get("position", 0)),
        "cell": np.stack([frame.cell for frame in frames]),
        "pbc": np.stack([frame.pbc for frame in frames]),
        "energy": np.array([frame.energy for frame in frames]),
        "stress": np.stack([_voigt(frame) for frame in frames]),
        "group": np.array([group_hash(frame.group) for frame in frames], dtype=np.uint64),
        "config_type": np.array([config_types.index(frame.config_type) for frame in frames]),
        "id_text": np.frombuffer(b"".join(ids), dtype=np.uint8),
        "id_pointer": _pointer([len(text) for text in ids], journal.rows.get("id_text", 0)),
    }
    rows = {name: array.astype(ARRAYS[name].dtype) for name, array in arrays.items()}
    systems = Systems(
        atomic_number=torch.from_numpy(rows["atomic_number"].astype(np.int64)),
        # The rounded positions: the sizes are those of the graphs that training will build.
        position=torch.from_numpy(rows["position"].astype(np.float64)),
        cell=torch.from_numpy(rows["cell"]),
        pbc=torch.from_numpy(rows["pbc"]),
        n_atoms=tuple(n_atoms.tolist()),
    )
    plan = journal.plan
    rows["sizes"] = graph_sizes(systems, plan.atom_cutoff, plan.bond_cutoff).astype(ARRAYS["sizes"].dtype)
    counts = Counts(
        n_frames=len(frames),
        n_atoms=int(n_atoms.sum()),
        with_energy=int(np.isfinite(rows["energy"]).sum()),
        with_forces=sum(frame.forces is not None for frame in frames),
        with_stress=int((stressed & periodic).sum()),
        with_magmoms=sum(frame.magmoms is not None for frame in frames),
        n_stress_dropped=int((stressed & ~periodic).sum()),
        n_wrapped=sum(new is not frame.positions for new, frame in zip(positions, frames, strict=True)),
    )
    fences = {"pointer", "id_pointer"}
    if journal.counts.n_frames == 0:
        rows.update({name: np.concatenate([np.zeros(1, np.int64), rows[name]]) for name in fences})
    return rows, counts


def _pointer(lengths: Sequence[int] | NDArray[np.int64], start: int) -> NDArray[np.int64]:
    return start + np.cumsum(lengths, dtype=np.int64)


def _or_nan(label: NDArray[np.float64] | None, shape: tuple[int, ...]) -> NDArray[np.float64]:
    return np.full(shape, np.nan) if label is None else label


def _voigt(frame: Frame) -> NDArray[np.float64]:
    """Stress as xx yy zz yz xz xy; missing where the frame has no volume of its own."""
    if frame.stress is None or not frame.pbc.all():
        return np.full(6, np.nan)
    symmetric = (frame.stress + frame.stress.T) / 2
    return symmetric[VOIGT]


def _near_origin(frame: Frame) -> NDArray[np.float64]:
    """Bring atoms far from the origin near it, before rounding to float32.

    Along periodic axes each is wrapped into the cell; along the others the frame moves as a whole.
    """
    far = np.linalg.norm(frame.positions, axis=1) > FAR
    if not far.any():
        return frame.positions
    box = periodic_box(frame.cell, frame.pbc)
    fractions = frame.positions @ np.linalg.inv(box)
    shift = np.where(far[:, None], np.floor(fractions), 0)
    shift[:, ~frame.pbc] = fractions[:, ~frame.pbc].mean(axis=0)
    return frame.positions - shift @ box
