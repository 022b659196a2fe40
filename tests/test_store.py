"""The store: what goes in comes out, in batches; killed, full or truncated, it never lies."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from frames import labelled_frames

from fastchgnet.config import Provenance
from fastchgnet.data.frame import Frame
from fastchgnet.data.layout import ARRAYS, HEADER
from fastchgnet.data.store import Store, write_store
from fastchgnet.data.writer import FAR
from fastchgnet.errors import InputError
from fastchgnet.neighbors import graph_sizes

PROVENANCE = Provenance(name="test", functional="PBE", energy_correction="none")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store") / "frames"
    write_store(labelled_frames(60), path, PROVENANCE)
    return Store(path)


def test_gather_equals_the_frames(store: Store) -> None:
    frames = list(labelled_frames(60))
    indices = np.random.default_rng(1).permutation(60)[:23]
    systems, labels = store.gather(indices)
    assert systems.n_atoms == tuple(len(frames[k].numbers) for k in indices)
    # Stored in float32: half a unit in the last place.
    close = {"rtol": 2**-24, "atol": 1e-30}
    start = 0
    for place, k in enumerate(indices):
        frame, atoms = frames[k], slice(start, start + len(frames[k].numbers))
        start = atoms.stop
        assert systems.atomic_number[atoms].tolist() == frame.numbers.tolist()
        np.testing.assert_allclose(systems.position[atoms], frame.positions, **close)
        np.testing.assert_array_equal(systems.cell[place], frame.cell)
        assert systems.pbc[place].tolist() == frame.pbc.tolist()
        assert labels.energy[place] == frame.energy
        np.testing.assert_allclose(labels.forces[atoms], frame.forces, **close)
        np.testing.assert_allclose(labels.stress[place], frame.stress, **close)
        if frame.magmoms is None:
            assert labels.magmoms[atoms].isnan().all()
        else:
            np.testing.assert_allclose(labels.magmoms[atoms], frame.magmoms, **close)
    assert store.ids(indices) == [frames[k].source for k in indices]
    assert store.config_types[indices].tolist() == [frames[k].config_type for k in indices]
    assert systems.position.dtype == systems.cell.dtype == labels.energy.dtype == torch.float64


def test_header_counts_and_sizes(store: Store) -> None:
    counts = store.header.counts
    assert (
        len(store) == counts.n_frames == counts.with_energy == counts.with_forces == counts.with_stress == 60
    )
    assert counts.with_magmoms == 48
    assert store.header.provenance == PROVENANCE
    systems, _ = store.gather(np.arange(60))
    np.testing.assert_array_equal(store.sizes, graph_sizes(systems, 6.0, 3.0))
    store.verify()
    assert len(pickle.dumps(store)) < 1000
    assert len(pickle.loads(pickle.dumps(store))) == 60


def test_splits_keep_materials_together_and_repeat(tmp_path: Path) -> None:
    frames = (replace(frame, group=f"material {k // 3}") for k, frame in enumerate(labelled_frames(6000)))
    write_store(frames, tmp_path / "store", PROVENANCE)
    store = Store(tmp_path / "store")
    splits = {name: store.split(name) for name in ("train", "val", "test")}
    together = np.concatenate(list(splits.values()))
    assert sorted(together.tolist()) == store.split("all").tolist() == list(range(6000))
    materials = {name: set(store.groups[indices].tolist()) for name, indices in splits.items()}
    assert not materials["train"] & materials["val"] | materials["train"] & materials["test"]
    assert not materials["val"] & materials["test"]
    # Four standard deviations of a binomial count of 2000 materials.
    for name, share in (("train", 0.9), ("val", 0.05), ("test", 0.05)):
        assert abs(len(materials[name]) - 2000 * share) < 4 * np.sqrt(2000 * share * (1 - share))
    np.testing.assert_array_equal(store.split("val", seed=0), splits["val"])
    assert store.split("val", seed=1).tolist() != splits["val"].tolist()
    with pytest.raises(InputError, match="unknown split 'dev'"):
        store.split("dev")


def test_stress_without_a_volume_is_dropped_and_counted(tmp_path: Path) -> None:
    frame = next(labelled_frames(1))
    slab = replace(frame, pbc=np.array([True, True, False]))
    header = write_store([frame, slab], tmp_path / "store", PROVENANCE)
    assert header.counts.n_stress_dropped == 1 and header.counts.with_stress == 1
    _, labels = Store(tmp_path / "store").gather(np.array([0, 1]))
    assert labels.stress.isnan().flatten(1).any(1).tolist() == [False, True]


def test_far_atoms_are_wrapped_before_rounding(tmp_path: Path) -> None:
    frame = list(labelled_frames(3))[2]
    far = frame.positions + np.array([20_000, -5_000, 300]) @ frame.cell
    out = replace(frame, positions=far)
    header = write_store([frame, out], tmp_path / "store", PROVENANCE)
    assert header.counts.n_wrapped == 1
    store = Store(tmp_path / "store")
    systems, _ = store.gather(np.array([0, 1]))
    near, wrapped = systems.position.reshape(2, -1, 3)
    assert wrapped.abs().max() < FAR
    shifts = (wrapped - near).numpy() @ np.linalg.inv(frame.cell)
    np.testing.assert_allclose(shifts, np.round(shifts), atol=1e-6)  # float32 of a few A, in cells of 5.6 A
    np.testing.assert_array_equal(store.sizes[0], store.sizes[1])


def test_a_molecule_far_from_the_origin_keeps_its_shape(tmp_path: Path) -> None:
    """At 1e6 A, float32 is coarser than 0.06 A."""
    far = 1e6 * np.ones(3) - 10
    frame = Frame(
        numbers=np.array([11, 17]),
        positions=np.stack([far, far + np.array([2.3456789, 0, 0])]),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        source="far.xyz:0",
        group="NaCl",
    )
    write_store([frame], tmp_path / "store", PROVENANCE)
    systems, _ = Store(tmp_path / "store").gather(np.array([0]))
    apart = systems.position[1] - systems.position[0]
    np.testing.assert_allclose(apart, [2.3456789, 0, 0], atol=1e-6)  # float32 of a few A


def test_a_store_is_not_written_over_the_current_folder() -> None:
    for out in ("", ".", "/"):
        with pytest.raises(InputError, match="exists already"):
            write_store(labelled_frames(1), out, PROVENANCE)


def test_bad_frames_are_refused_or_skipped_and_listed(tmp_path: Path) -> None:
    good, other = labelled_frames(2)
    bad = replace(good, energy=float("inf"), source="made.xyz:7")
    unreadable = InputError("made.xyz:8: truncated")
    for item in (bad, unreadable):
        with pytest.raises(InputError, match=r"made\.xyz:[78]: "):
            write_store([good, item, other], tmp_path / "refused", PROVENANCE)
    assert list(tmp_path.iterdir()) == []
    header = write_store([good, bad, unreadable, other], tmp_path / "store", PROVENANCE, skip_bad=True)
    assert header.counts.n_frames == 2 and header.counts.n_skipped == 2
    listed = (tmp_path / "store" / "skipped.txt").read_text().splitlines()
    assert listed == ["made.xyz:7: energy is infinite", "made.xyz:8: truncated"]
    with pytest.raises(InputError, match=r"no good frame to store; the first bad one: made\.xyz:7"):
        write_store([bad], tmp_path / "nothing", PROVENANCE, skip_bad=True)
    with pytest.raises(InputError, match="exists already"):
        write_store([good], tmp_path / "store", PROVENANCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


WRITER = """
import os, resource, signal, sys
from frames import labelled_frames
from test_store import PROVENANCE, write_store

def frames(kill_at):
    for index, frame in enumerate(labelled_frames(60)):
        if index == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield frame

kill_at, limit = int(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
write_store(frames(kill_at), sys.argv[1], PROVENANCE, shard_frames=10)
"""


def write_in_process(path: Path, kill_at: int = -1, limit: int = 0) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    command = [sys.executable, "-c", WRITER, str(path), str(kill_at), str(limit)]
    return subprocess.run(command, cwd=tests, capture_output=True, text=True, check=False)


def assert_same_arrays(found: Store, expected: Store) -> None:
    hashes = [{name: info.sha256 for name, info in s.header.arrays.items()} for s in (found, expected)]
    assert hashes[0] == hashes[1]
    assert found.header.counts == expected.header.counts
    found.verify()


@pytest.mark.parametrize("kill_at", [5, 25])
def test_killed_run_leaves_no_store_and_resumes(tmp_path: Path, store: Store, kill_at: int) -> None:
    path = tmp_path / "store"
    assert write_in_process(path, kill_at=kill_at).returncode == -signal.SIGKILL
    assert not path.exists()
    seen: list[int] = []
    write_store(labelled_frames(60), path, PROVENANCE, shard_frames=10, progress=seen.append)
    assert seen[0] == kill_at // 10 * 10 + 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]
    assert {entry.name for entry in path.iterdir()} == {HEADER, *(f"{name}.npy" for name in ARRAYS)}
    assert_same_arrays(Store(path), store)


def test_full_disk_leaves_no_store_and_resumes(tmp_path: Path, store: Store) -> None:
    """The limit on the size of a file stands for a full disk: writing fails in the middle of an array."""
    path = tmp_path / "store"
    failed = write_in_process(path, limit=2000)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert "InputError" in last and "cannot be written" in last and "run again to go on" in last
    assert not path.exists()
    write_store(labelled_frames(60), path, PROVENANCE, shard_frames=10)
    assert_same_arrays(Store(path), store)


@pytest.mark.skipif(os.name != "posix", reason="locks are for POSIX")
def test_two_writers_of_one_store_do_not_mix(tmp_path: Path) -> None:
    def frames() -> Iterator[Frame]:
        """While these are written, somebody else tries."""
        for frame in labelled_frames(2):
            with pytest.raises(InputError, match=r"another process is writing this store"):
                write_store(labelled_frames(3), tmp_path / "store", PROVENANCE)
            yield frame

    assert write_store(frames(), tmp_path / "store", PROVENANCE).counts.n_frames == 2
    Store.verified(tmp_path / "store")


def test_unfinished_store_of_something_else_is_not_resumed(tmp_path: Path) -> None:
    write_in_process(tmp_path / "store", kill_at=25)
    with pytest.raises(InputError, match="an unfinished store of other files or options"):
        write_store(labelled_frames(60), tmp_path / "store", Provenance(name="other"))


def test_damage_is_found(tmp_path: Path) -> None:
    write_store(labelled_frames(8), tmp_path / "store", PROVENANCE)
    forces = tmp_path / "store" / "forces.npy"
    whole = forces.read_bytes()
    forces.write_bytes(whole[:-4])
    with pytest.raises(InputError, match=r"forces\.npy: missing or truncated"):
        Store(tmp_path / "store")
    forces.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"forces\.npy: damaged"):
        Store.verified(tmp_path / "store")
    np.save(forces, np.zeros((3, 3), np.float32))
    with pytest.raises(InputError, match="the header wants"):
        Store(tmp_path / "store")


def test_swapped_arrays_are_found(tmp_path: Path) -> None:
    """Both have the same type and shape; only their hashes tell."""
    write_store(labelled_frames(2), tmp_path / "store", PROVENANCE)
    position, forces = (tmp_path / "store" / f"{name}.npy" for name in ("position", "forces"))
    held = position.read_bytes()
    position.write_bytes(forces.read_bytes())
    forces.write_bytes(held)
    with pytest.raises(InputError, match=r"position\.npy: damaged"):
        Store.verified(tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 0}, "schema version 0"),
        (
            {"schema_version": "x"},
            "not the header of a store: schema_version: Input should be a valid integer",
        ),
        ({"colour": "red"}, "not the header of a store"),
        ({"arrays": {}}, "not the header of a store"),
        ({"config_types": ["bulk"]}, "config_type does not fit the header"),
    ],
)
def test_foreign_headers_are_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    write_store(labelled_frames(2), tmp_path / "store", PROVENANCE)
    path = tmp_path / "store" / HEADER
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=reason) as caught:
        Store(tmp_path / "store")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no store here"):
        Store(tmp_path)
