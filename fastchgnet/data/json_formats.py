"""JSON files of crystals, streamed: the published MPtrj data set and pymatgen's own serialisation.

pymatgen itself is not needed: its structures are lattice, sites and species, read here in a few lines.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Literal

import numpy as np
from ase.data import atomic_numbers

from fastchgnet.data.frame import Frame
from fastchgnet.data.layout import one_line
from fastchgnet.data.reading import Meter, ReadOptions, attempt, make_frame
from fastchgnet.errors import InputError

Json = dict[str, object]

_PYMATGEN_KEYS = {"@module", "@class", "lattice", "structure"}
_MPTRJ_KEYS = {"structure", "uncorrected_total_energy", "corrected_total_energy", "force", "magmom", "mp_id"}


def detect_json(path: Path) -> Literal["ase", "pymatgen", "mptrj"]:
    """Tell MPtrj's nesting (material, frame, labels) from pymatgen's objects and ASE's database."""
    ijson = _ijson()
    depth = 0
    try:
        with Meter().open(path) as file:
            for _, event, value in islice(ijson.parse(file), 10_000):
                if event == "start_array" and depth == 0:
                    return "pymatgen"
                depth += {"start_map": 1, "end_map": -1}.get(event, 0)
                if event == "map_key" and depth == 1 and value in _PYMATGEN_KEYS:
                    return "pymatgen"
                if event == "map_key" and depth == 3 and value in _MPTRJ_KEYS:
                    return "mptrj"
    except (ijson.JSONError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not JSON: {one_line(error)}") from error
    return "ase"


def scan_json(path: Path, name: str, options: ReadOptions, meter: Meter) -> Iterator[Frame | InputError]:
    """Yield the frames of a JSON file, holding one material (MPtrj) or one object (pymatgen) at a time."""
    ijson = _ijson()
    scan = _scan_mptrj if options.format == "mptrj" else _scan_pymatgen
    last = name
    try:
        with meter.open(path) as file:
            for source, item in scan(file, name, options):
                yield item
                last = source
    except (ijson.JSONError, OSError, EOFError, zlib.error) as error:
        yield InputError(f"{last}: what follows cannot be read, truncated or not JSON: {one_line(error)}")
        return
    if last == name:
        yield InputError(f"{name}: no frame in this file")


def _scan_mptrj(file: IO[bytes], name: str, options: ReadOptions) -> Iterator[tuple[str, Frame | InputError]]:
    for mp_id, frames in _ijson().kvitems(file, "", use_float=True):
        if not isinstance(frames, dict):
            yield f"{name}:{mp_id}", InputError(f"{name}:{mp_id}: holds no frames")
            continue
        for frame_id, frame in frames.items():
            source = f"{name}:{frame_id}"

            def build(frame: Json = frame, source: str = source, mp_id: str = mp_id) -> Frame:
                if not isinstance(frame, dict):
                    raise ValueError("holds no structure and labels")
                labels = {
                    "energy": frame[options.energy_key] if options.energy_key else None,
                    "forces": frame.get("force") if options.forces_key else None,
                    "stress": frame.get("stress") if options.stress_key else None,
                    "magmoms": frame.get("magmom") if options.magmoms_key else None,
                }
                return _from_structure(frame["structure"], labels, source, {"mp_id": mp_id}, options)

            yield source, attempt(source, build)


def _scan_pymatgen(
    file: IO[bytes], name: str, options: ReadOptions
) -> Iterator[tuple[str, Frame | InputError]]:
    is_list = next(iter(_ijson().basic_parse(file)))[0] == "start_array"
    file.seek(0)
    for index, item in enumerate(_ijson().items(file, "item" if is_list else "", use_float=True)):
        source = f"{name}:{index}"
        yield source, attempt(source, lambda item=item, source=source: _from_pymatgen(item, source, options))  # type: ignore[misc]


def _from_pymatgen(item: Json, source: str, options: ReadOptions) -> Frame:
    """Read a Structure, or a ComputedStructureEntry, whose `energy` is the uncorrected one.

    Labels stand, in this order, in the entry, its `data`, and the structure's `properties` and
    site properties.
    """
    structure = _mapping(item).get("structure", item)
    if not isinstance(structure, dict) or "sites" not in structure:
        found = _mapping(item).get("@class", "no @class")
        raise ValueError(f"neither a Structure nor a ComputedStructureEntry: {found}")
    entry = item if "structure" in item else {}
    data = {**_mapping(structure.get("properties")), **_mapping(entry.get("data")), **entry}
    for key in (options.forces_key, options.magmoms_key):
        values = [_mapping(site.get("properties")).get(key) for site in structure["sites"]]
        if key not in data and all(value is not None for value in values):
            data[key] = values
    if options.energy_key == "corrected_energy":
        data["corrected_energy"] = data["energy"] + data["correction"]  # type: ignore[operator]
    labels = {
        "energy": data.get(str(options.energy_key)),
        "forces": data.get(options.forces_key),
        "stress": data.get(options.stress_key),
        "magmoms": data.get(options.magmoms_key),
    }
    return _from_structure(structure, labels, source, data, options)


def _from_structure(
    structure: object, labels: Json, source: str, info: dict[str, object], options: ReadOptions
) -> Frame:
    if not isinstance(structure, dict) or "lattice" not in structure:
        raise ValueError("the structure has no lattice")
    lattice, sites = structure["lattice"], structure["sites"]
    cell = np.array(lattice["matrix"], dtype=np.float64)
    fractions = np.array([site["abc"] for site in sites], dtype=np.float64).reshape(-1, 3)
    stress = labels["stress"]
    return make_frame(
        numbers=[_site_number(site["species"]) for site in sites],
        positions=fractions @ cell,
        cell=cell,
        pbc=lattice.get("pbc", (True, True, True)),
        source=source,
        info=info,
        energy=labels["energy"],  # type: ignore[arg-type]
        forces=labels["forces"],  # type: ignore[arg-type]
        stress=None if stress is None else options.stress_matrix(stress),  # type: ignore[arg-type]
        magmoms=labels["magmoms"],  # type: ignore[arg-type]
    )


def _site_number(species: list[Json]) -> int:
    """Atomic number of a site; a site shared by several elements, or partly empty, is no crystal of atoms."""
    if len(species) != 1 or species[0].get("occu", 1) != 1:
        raise ValueError("the structure is disordered")
    return atomic_numbers[str(species[0]["element"])]


def _mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _ijson() -> ModuleType:
    try:
        import ijson
    except ImportError:
        raise InputError("reading JSON needs ijson: pip install 'fastchgnet[mptrj]'") from None
    return ijson
