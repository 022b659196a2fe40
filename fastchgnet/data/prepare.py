"""Files into a store: what `fastchgnet prepare` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastchgnet.config import Config, Provenance
from fastchgnet.data.formats import detect_format, scan_frames
from fastchgnet.data.frame import Frame
from fastchgnet.data.layout import SKIPPED, Counts, Plan, Source, printable
from fastchgnet.data.pressure import PressureCheck, check_pressure
from fastchgnet.data.reading import Meter, ReadOptions
from fastchgnet.data.store import Store, write_store
from fastchgnet.errors import InputError


class Prepared(Config):
    """What was stored, what was not, and what looks wrong."""

    store: str
    counts: Counts
    provenance: Provenance
    skipped: tuple[str, ...]
    pressure: PressureCheck | None
    warnings: tuple[str, ...]


def prepare(
    inputs: Sequence[Path],
    out: Path,
    options: ReadOptions,
    provenance: Provenance,
    *,
    skip_bad: bool = False,
    progress: Callable[[int, float], None] | None = None,
) -> Prepared:
    """Read files into a store, and compare its stresses with its energies.

    Args:
        inputs: Files of any format of `read_frames`, or folders, of which every .xyz and .extxyz is read.
        out: Folder of the store; must not exist. An unfinished run is resumed.
        options: What the files do not say.
        provenance: What the energies mean; what it leaves unknown is filled in where the format knows.
        skip_bad: Skip and list bad frames instead of refusing.
        progress: Called with the number of frames seen and the fraction of the bytes read so far.

    Raises:
        InputError: A file cannot be read, a frame is bad, or the store cannot be written.
    """
    groups = [(path, _files(path)) for path in inputs]
    resolved = [options.resolve(options.format or detect_format(files[0])) for _, files in groups]
    sources = tuple(_source(*group, known) for group, known in zip(groups, resolved, strict=True))
    provenance = _fill_in(provenance, sources)
    files = [file for _, group in groups for file in group]
    meter, total = Meter(), sum(source.bytes for source in sources)
    header = write_store(
        _scan(files, options, meter),
        out,
        Plan(provenance=provenance, sources=sources),
        skip_bad=skip_bad,
        progress=progress and (lambda n_frames: progress(n_frames, meter.n_bytes / max(total, 1))),
    )
    pressure, first = None, resolved[0]
    if len({source.stress for source in sources}) == 1 and first.stress_unit and first.stress_sign:
        pressure = check_pressure(Store(out), first.stress_unit, first.stress_sign)
    skipped = (out / SKIPPED).read_text().splitlines() if header.counts.n_skipped else []
    return Prepared(
        store=str(out),
        counts=header.counts,
        provenance=provenance,
        skipped=tuple(skipped),
        pressure=pressure,
        warnings=tuple(_warnings(header.counts, pressure)),
    )


def _files(path: Path) -> list[Path]:
    """Expand a folder into the extended-XYZ files below it."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(file for suffix in ("xyz", "extxyz") for file in path.rglob(f"*.{suffix}"))
    if not files:
        raise InputError(f"{path}: no .xyz or .extxyz file in this folder")
    return files


def _scan(files: Sequence[Path], options: ReadOptions, meter: Meter) -> Iterator[Frame | InputError]:
    """Chain the files; each is called by its path below the folder they share."""
    shared = os.path.commonpath([file.absolute().parent for file in files])
    for file in files:
        name = printable(os.path.relpath(file.absolute(), shared))
        yield from scan_frames(file, options, name, meter)


def _source(path: Path, files: Sequence[Path], known: ReadOptions) -> Source:
    stats = [file.stat() for file in files]
    return Source(
        name=printable(path.name),
        format=str(known.format),
        energy=str(known.energy_key),
        stress=f"{known.stress_unit}, positive = {known.stress_sign}",
        bytes=sum(stat.st_size for stat in stats),
        modified_ns=max(stat.st_mtime_ns for stat in stats),
    )


def _fill_in(provenance: Provenance, sources: Sequence[Source]) -> Provenance:
    """Take functional and correction from MPtrj, the one format that defines them."""
    energies = {source.energy for source in sources}
    if {source.format for source in sources} != {"mptrj"} or len(energies) > 1:
        return provenance
    known = {
        "functional": "PBE/PBE+U",
        "energy_correction": "MP2020" if energies == {"corrected_total_energy"} else "none",
    }
    return provenance.model_copy(
        update={key: value for key, value in known.items() if getattr(provenance, key) == "unknown"}
    )


def _warnings(counts: Counts, pressure: PressureCheck | None) -> Iterator[str]:
    for label in ("energy", "forces"):
        if not getattr(counts, f"with_{label}"):
            yield f"no frame has a label {label!r}; where the file calls it otherwise, pass --{label}-key"
    if counts.n_stress_dropped:
        yield f"{counts.n_stress_dropped} stresses dropped: their frames are not periodic in three directions"
    if pressure and pressure.advice:
        yield pressure.advice
