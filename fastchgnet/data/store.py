"""The store: labelled crystals as flat memory-mapped arrays, about 1 KB a frame, gathered in batches.

No graphs and no pickles. The whole of a large data set opens in milliseconds and is shared by processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastchgnet.data.layout import ARRAYS, Header, file_sha256, open_array
from fastchgnet.data.writer import write_store
from fastchgnet.errors import InputError
from fastchgnet.graph import Labels, Systems
from fastchgnet.units import MATRIX_FROM_VOIGT

__all__ = ["Split", "Store", "write_store"]

Split = Literal["train", "val", "test", "all"]
_GATHERED = ("pointer", "atomic_number", "position", "cell", "pbc", "energy", "forces", "stress", "magmoms")
_COUNTED_AT_ONCE = 65_536
_UPPER_EDGE = {"train": 0.9, "val": 0.95, "test": 1.0}


class Store:
    """A folder written by `write_store`, opened for reading.

    Attributes:
        path: The folder.
        header: Counts, provenance of the energies, cutoffs, sources, hashes.
        sizes: [n, 4] int32 atoms, directed edges, short bonds, angles of each frame, within the header's
            cutoffs.
    """

    def __init__(self, path: Path | str) -> None:
        """Open a store; raise InputError where it is none, or truncated."""
        self.path = Path(path)
        self.header = Header.read(self.path)
        self._arrays = {name: open_array(self.path, name, self.header) for name in ARRAYS}
        for fence, rows in (("pointer", "position"), ("id_pointer", "id_text")):
            if self._arrays[fence][-1] != len(self._arrays[rows]):
                raise InputError(f"{self.path}: {fence} does not fit {rows}; prepare the store again")
        if self._arrays["config_type"].max(initial=0) >= len(self.header.config_types):
            raise InputError(f"{self.path}: config_type does not fit the header; prepare the store again")
        self.sizes = self._arrays["sizes"]

    @classmethod
    def verified(cls, path: Path | str) -> Store:
        """Open a store after `verify`, which takes about a second for each gigabyte."""
        store = cls(path)
        store.verify()
        return store

    def __len__(self) -> int:
        """Count the frames."""
        return self.header.counts.n_frames

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        """Pickle as the path: a worker process maps the files itself."""
        return type(self), (self.path,)

    @property
    def config_types(self) -> NDArray[np.str_]:
        """The config_type of every frame, [n]."""
        return np.array(self.header.config_types)[self._arrays["config_type"]]

    @property
    def energies(self) -> NDArray[np.float64]:
        """Total energies, eV, [n]; NaN where missing."""
        return self._arrays["energy"]

    @property
    def stresses(self) -> NDArray[np.float32]:
        """Stresses xx yy zz yz xz xy, eV/A^3, positive = tension, [n, 6]; NaN where missing."""
        return self._arrays["stress"]

    @property
    def groups(self) -> NDArray[np.uint64]:
        """Hash of the material of every frame, [n]."""
        return self._arrays["group"]

    @property
    def cells(self) -> NDArray[np.float64]:
        """Lattice vectors, A, [n, 3, 3]."""
        return self._arrays["cell"]

    @property
    def pbc(self) -> NDArray[np.bool_]:
        """Directions of periodicity, [n, 3]."""
        return self._arrays["pbc"]

    @property
    def volumes(self) -> NDArray[np.float64]:
        """Volume of every cell, A^3, [n]; NaN unless periodic in three directions."""
        volume = np.abs(np.linalg.det(self.cells))
        return np.where(self.pbc.all(axis=1), volume, np.nan)

    def element_counts(self) -> NDArray[np.int64]:
        """Count the atoms of every element, [95]; entry Z is that of atomic number Z."""
        return np.bincount(self._arrays["atomic_number"], minlength=95)

    def ids(self, indices: NDArray[np.int64]) -> list[str]:
        """Name frames as `file:frame`."""
        pointer, text = self._arrays["id_pointer"], self._arrays["id_text"]
        return [text[pointer[k] : pointer[k + 1]].tobytes().decode() for k in np.atleast_1d(indices)]

    def split(self, name: Split, seed: int = 0) -> NDArray[np.int64]:
        """Indices of the frames of a split, ascending: 0.9 train, 0.05 val, 0.05 test of the materials.

        A material falls into a split by the hash of its key alone, so all its frames go together, the
        same in every store, whatever else the store holds.
        """
        if name == "all":
            return np.arange(len(self))
        if name not in _UPPER_EDGE:
            raise InputError(f"unknown split {name!r}; known are train, val, test and all")
        fraction = (_mix(self.groups, seed) >> np.uint64(11)) / 2.0**53
        edges = [0.0, *_UPPER_EDGE.values()]
        place = list(_UPPER_EDGE).index(name)
        return np.flatnonzero((fraction >= edges[place]) & (fraction < edges[place + 1]))

    def gather(self, indices: NDArray[np.int64]) -> tuple[Systems, Labels]:
        """Copy frames out of the store as one batch, in the order of `indices`.

        Returns:
            Geometry in float64 (positions rounded to float32 when stored) and labels; energies in float64,
            forces, stress and magmoms in float32.
        """
        frames = np.asarray(indices, dtype=np.int64)
        arrays = self._arrays
        start = arrays["pointer"][frames]
        n_atoms = arrays["pointer"][frames + 1] - start
        ends = np.cumsum(n_atoms)
        atoms = np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - (ends - n_atoms), n_atoms)
        systems = Systems(
            atomic_number=torch.from_numpy(arrays["atomic_number"].take(atoms).astype(np.int64)),
            position=torch.from_numpy(arrays["position"].take(atoms, axis=0).astype(np.float64)),
            cell=torch.from_numpy(arrays["cell"].take(frames, axis=0)),
            pbc=torch.from_numpy(arrays["pbc"].take(frames, axis=0)),
            n_atoms=tuple(n_atoms.tolist()),
        )
        stress = arrays["stress"].take(frames, axis=0).take(MATRIX_FROM_VOIGT, axis=1)
        labels = Labels(
            energy=torch.from_numpy(arrays["energy"].take(frames)),
            forces=torch.from_numpy(arrays["forces"].take(atoms, axis=0)),
            stress=torch.from_numpy(stress.reshape(-1, 3, 3)),
            magmoms=torch.from_numpy(arrays["magmoms"].take(atoms)),
        )
        return systems, labels

    def label_counts(self) -> NDArray[np.int64]:
        """Count the labels of every frame, [n, 4], by the rules of `fastchgnet.loss` and in its order.

        A crystal that is not periodic in three directions has no stress; others have nine components.
        """
        arrays, fence = self._arrays, self._arrays["pointer"]
        counts = np.empty((len(self), 4), dtype=np.int64)
        counts[:, 0] = ~np.isnan(self.energies)
        counts[:, 2] = (~np.isnan(self.stresses))[:, MATRIX_FROM_VOIGT].sum(1) * self.pbc.all(1)
        for column, name in ((1, "forces"), (3, "magmoms")):
            for first in range(0, len(self), _COUNTED_AT_ONCE):
                edges = fence[first : first + _COUNTED_AT_ONCE + 1]
                present = ~np.isnan(arrays[name][edges[0] : edges[-1]])
                before = np.concatenate([[0], present.reshape(len(present), -1).sum(1).cumsum()])
                counts[first : first + _COUNTED_AT_ONCE, column] = np.diff(before[edges - edges[0]])
        return counts

    def raw(self) -> dict[str, NDArray]:
        """Return the arrays that `gather` reads, as they are on disk; see `layout.ARRAYS`."""
        return {name: self._arrays[name] for name in _GATHERED}

    def verify(self) -> None:
        """Read every byte and compare with the hashes of the header; raise InputError where they differ."""
        for name, info in self.header.arrays.items():
            path = self.path / f"{name}.npy"
            if file_sha256(path) != info.sha256:
                raise InputError(f"{path}: damaged: its sha256 is not the one in the header")


def _mix(values: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Scramble hashes with a seed: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    mixed = values + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
