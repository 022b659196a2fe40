"""The published MPtrj JSON: labels and units, choice of the energy, memory, truncation."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.units import GPa
from frames import labelled_atoms

from fastchgnet.config import Provenance
from fastchgnet.data.formats import detect_format, read_frames
from fastchgnet.data.prepare import prepare
from fastchgnet.data.reading import ReadOptions
from fastchgnet.errors import InputError


def as_structure(atoms: Atoms) -> dict[str, object]:
    """What pymatgen's Structure.as_dict writes, as far as MPtrj has it."""
    return {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "charge": 0,
        "lattice": {"matrix": atoms.cell.array.tolist(), "volume": atoms.get_volume()},
        "sites": [
            {
                "species": [{"element": symbol, "occu": 1}],
                "abc": abc.tolist(),
                "xyz": xyz.tolist(),
                "label": symbol,
            }
            for symbol, abc, xyz in zip(
                atoms.get_chemical_symbols(),
                atoms.get_scaled_positions(wrap=False),
                atoms.positions,
                strict=True,
            )
        ],
    }


def as_mptrj(atoms: Atoms, mp_id: str, magmoms: bool) -> dict[str, object]:
    results = atoms.calc.results
    stress = results["stress"][[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)
    return {
        "structure": as_structure(atoms),
        "uncorrected_total_energy": results["energy"],
        "corrected_total_energy": results["energy"] - 1.5,
        "energy_per_atom": (results["energy"] - 1.5) / len(atoms),
        "force": results["forces"].tolist(),
        "stress": (-10 * stress / GPa).tolist(),
        "magmom": results["magmoms"].tolist() if magmoms else None,
        "bandgap": 0.0,
        "mp_id": mp_id,
    }


def write_mptrj(path: Path, atoms: list[Atoms], per_material: int = 3) -> None:
    materials: dict[str, dict[str, object]] = {}
    for index, frame in enumerate(atoms):
        mp_id = f"mp-{index // per_material}"
        frame_id = f"{mp_id}-0-{index % per_material}"
        materials.setdefault(mp_id, {})[frame_id] = as_mptrj(frame, mp_id, magmoms=index % 2 == 0)
    path.write_text(json.dumps(materials))


def test_frames_carry_labels_in_internal_units(tmp_path: Path) -> None:
    written = labelled_atoms(7)
    path = tmp_path / "MPtrj.json"
    write_mptrj(path, written)
    assert detect_format(path) == "mptrj"
    frames = list(read_frames(path))
    assert [frame.group for frame in frames] == ["mp-0"] * 3 + ["mp-1"] * 3 + ["mp-2"]
    assert frames[4].source == "MPtrj.json:mp-1-0-1"
    for index, (frame, atoms) in enumerate(zip(frames, written, strict=True)):
        frame.check()
        results = atoms.calc.results
        np.testing.assert_allclose(frame.positions, atoms.positions, atol=1e-12)
        np.testing.assert_allclose(frame.forces, results["forces"])
        np.testing.assert_allclose(frame.stress[0, 0], results["stress"][0])
        np.testing.assert_allclose(frame.stress[1, 2], results["stress"][3])
        assert frame.energy == pytest.approx(results["energy"] - 1.5)
        assert (frame.magmoms is None) == (index % 2 == 1)


def test_energy_is_chosen_by_name_and_decides_the_correction(tmp_path: Path) -> None:
    path = tmp_path / "MPtrj.json"
    write_mptrj(path, labelled_atoms(2))
    corrected, raw = (
        prepare([path], tmp_path / f"store-{key}", ReadOptions(energy_key=key), Provenance(name="test"))
        for key in ("corrected_total_energy", "uncorrected_total_energy")
    )
    assert corrected.provenance.energy_correction == "MP2020"
    assert raw.provenance.energy_correction == "none"
    assert corrected.provenance.functional == "PBE/PBE+U"
    with pytest.raises(InputError, match="MPtrj has the energies"):
        next(read_frames(path, ReadOptions(energy_key="energy_per_atom")))


def peak_memory(path: Path, n_frames: int) -> int:
    """Peak of Python's own memory, bytes, while the frames of a file of `n_frames` pass by."""
    write_mptrj(path, labelled_atoms(12) * (n_frames // 12))
    tracemalloc.start()
    assert sum(1 for _ in read_frames(path)) == n_frames
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    small = max(peak_memory(tmp_path / "MPtrj.json", 120) for _ in range(2))
    assert peak_memory(tmp_path / "MPtrj.json", 1200) < 2 * small


def test_truncated_file_gives_its_whole_materials_then_says_where_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "MPtrj.json"
    write_mptrj(path, labelled_atoms(9))
    text = path.read_text()
    path.write_text(text[: int(len(text) * 0.8)])
    frames = read_frames(path)
    with pytest.raises(InputError, match=r"MPtrj\.json:mp-1-0-2: what follows cannot be read"):
        for count, _ in enumerate(frames, start=1):
            last = count
    assert last == 6


def test_bad_frames_name_themselves(tmp_path: Path) -> None:
    path = tmp_path / "MPtrj.json"
    good = as_mptrj(labelled_atoms(1)[0], "mp-1", magmoms=True)
    for place, (flaw, reason) in enumerate(
        [
            ({"structure": {**good["structure"], "lattice": None}}, "mp-1-0-1: "),
            ({"corrected_total_energy": "low"}, "mp-1-0-1: "),
            ({"stress": [1.0, 2.0]}, "mp-1-0-1: the stress has shape"),
        ]
    ):
        path.write_text(json.dumps({"mp-1": {"mp-1-0-0": good, "mp-1-0-1": {**good, **flaw}}}))
        with pytest.raises(InputError) as caught:
            list(read_frames(path))
        assert reason in str(caught.value)
        out = tmp_path / f"store-{place}"
        summary = prepare([path], out, ReadOptions(), Provenance(name="test"), skip_bad=True)
        assert summary.counts.n_frames == 1 and len(summary.skipped) == 1


def test_extended_xyz_form(tmp_path: Path) -> None:
    """One file for each material, all in one folder, as the converted data set is unpacked."""
    folder = tmp_path / "mptrj"
    folder.mkdir()
    written = labelled_atoms(4)
    for index, atoms in enumerate(written):
        atoms.info.update(mp_id=f"mp-{index}", task_id=f"mp-{index}", calc_id=0, ionic_step=0)
        ase.io.write(folder / f"mp-{index}.extxyz", atoms)
    prepared = prepare([folder], tmp_path / "store", ReadOptions(), Provenance(name="test"))
    assert prepared.counts.n_frames == 4 and prepared.counts.with_magmoms == 4
    frame = next(read_frames(folder / "mp-2.extxyz"))
    assert frame.group == "mp-2"
    assert frame.energy == pytest.approx(written[2].calc.results["energy"])
